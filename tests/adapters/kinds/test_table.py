"""Promises of all kinds of adapters: one interface, and files by type."""

from typing import get_args

import pytest

from qlora_trainer.adapters.kinds.kind import AdapterKind
from qlora_trainer.adapters.kinds.lora import LORA_KIND
from qlora_trainer.adapters.kinds.lora_file import LoraFileConfig
from qlora_trainer.adapters.kinds.table import ADAPTER_KINDS, adapter_kind, file_type
from qlora_trainer.config.schema import AdapterConfig


def test_each_value_of_adapter_kind_has_a_kind_of_that_name() -> None:
    allowed = get_args(AdapterConfig.model_fields["kind"].annotation)
    assert set(ADAPTER_KINDS) == set(allowed)
    assert all(isinstance(kind, AdapterKind) and kind.name == name for name, kind in ADAPTER_KINDS.items())
    assert adapter_kind(AdapterConfig(kind="lora")) is LORA_KIND


@pytest.mark.parametrize(("raw", "found"), [({"peft_type": "LORA"}, LoraFileConfig), ({"peft_type": "LOHA"}, None)])
def test_a_file_is_read_by_its_type(raw: dict[str, object], found: object) -> None:
    assert file_type(raw) is found
    assert file_type({"peft_type": ["LORA"]}) is None, "what is no text is no type"
    assert file_type({}) is None
