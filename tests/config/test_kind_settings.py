"""Promises of the settings of adapters: each kind has its own, and those of others are refused by name."""

import re
from typing import Any, get_args

import pytest
from minimal_config import MINIMAL
from pydantic import ValidationError

from qlora_trainer.common.errors import ConfigError
from qlora_trainer.config.adapter_schema import SETTINGS_OF_KIND, AdapterConfig
from qlora_trainer.config.load import make_config


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kind": "bottleneck", "rank": 8}, "adapter.rank has no effect with adapter.kind=bottleneck; leave it out"),
        ({"kind": "bottleneck", "bias": "all"}, "adapter.bias has no effect with adapter.kind=bottleneck"),
        (
            {"kind": "bottleneck", "alpha": 8.0, "target_modules": "mlp"},
            "adapter.alpha and adapter.target_modules have no effect with adapter.kind=bottleneck; leave them out",
        ),
        ({"kind": "ia3", "rank": 8}, "adapter.rank has no effect with adapter.kind=ia3; leave it out"),
        ({"kind": "dora", "fused_parts": {"qkv": ["q"]}}, "adapter.fused_parts has no effect with adapter.kind=dora"),
        ({"kind": "dora", "init": "gaussian"}, "adapter.init has no effect with adapter.kind=dora; leave it out"),
        ({"init": "gaussian", "init_from": "a"}, "adapter.init=gaussian has no effect with adapter.init_from"),
        ({"activation": "gelu"}, "adapter.activation has no effect with adapter.kind=lora; leave it out"),
    ],
)
def test_a_setting_of_another_kind_of_adapter_is_refused_unless_it_is_at_its_default(
    settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValidationError, match=re.escape(named)):
        AdapterConfig(**settings)
    defaults = AdapterConfig().model_dump()
    assert AdapterConfig(**{**defaults, "kind": "bottleneck", "placement": "mlp"}).placement == "mlp"


def test_each_setting_is_of_every_kind_or_in_the_table() -> None:
    in_table = {name for names in SETTINGS_OF_KIND.values() for name in names}
    assert {*AdapterConfig.model_fields} - in_table == {"kind", "dtype", "init_from"}
    assert in_table < {*AdapterConfig.model_fields}
    assert {*SETTINGS_OF_KIND} == {*get_args(AdapterConfig.model_fields["kind"].annotation)}


def test_a_message_on_settings_of_a_kind_names_them_as_they_are_typed() -> None:
    with pytest.raises(ConfigError, match=r"(?m)^ *- adapter\.rank has no effect with adapter\.kind=bottleneck"):
        make_config({**MINIMAL, "adapter": {"kind": "bottleneck", "rank": 4}})
    with pytest.raises(ConfigError, match=r"optimizer\.lora_plus_ratio has no effect with adapter\.kind=bottleneck"):
        make_config({**MINIMAL, "adapter": {"kind": "bottleneck"}, "optimizer": {"lora_plus_ratio": 4.0}})
