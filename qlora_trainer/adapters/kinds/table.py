"""Find a kind of adapter by its name, and the reader of a file by its type."""

from collections.abc import Mapping
from typing import Any

from qlora_trainer.adapters.file_config import FileConfig
from qlora_trainer.adapters.kinds.bottleneck import BOTTLENECK_KIND
from qlora_trainer.adapters.kinds.bottleneck_file import BottleneckFileConfig
from qlora_trainer.adapters.kinds.dora import DORA_KIND
from qlora_trainer.adapters.kinds.ia3 import IA3_KIND
from qlora_trainer.adapters.kinds.ia3_file import Ia3FileConfig
from qlora_trainer.adapters.kinds.kind import AdapterKind
from qlora_trainer.adapters.kinds.lora import LORA_KIND
from qlora_trainer.adapters.kinds.lora_file import LoraFileConfig
from qlora_trainer.adapters.kinds.prefix import PREFIX_KIND
from qlora_trainer.adapters.kinds.prefix_file import PrefixFileConfig
from qlora_trainer.adapters.kinds.prompt import PROMPT_KIND
from qlora_trainer.adapters.kinds.prompt_file import PromptFileConfig
from qlora_trainer.config.schema import AdapterConfig

_KINDS = (LORA_KIND, DORA_KIND, IA3_KIND, BOTTLENECK_KIND, PROMPT_KIND, PREFIX_KIND)
ADAPTER_KINDS: Mapping[str, AdapterKind] = {kind.name: kind for kind in _KINDS}
FILES: Mapping[str, type[FileConfig]] = {
    "LORA": LoraFileConfig,
    "IA3": Ia3FileConfig,
    "BOTTLENECK": BottleneckFileConfig,
    "PROMPT_TUNING": PromptFileConfig,
    "PREFIX_TUNING": PrefixFileConfig,
}
"""Configs of files by peft_type."""


def adapter_kind(settings: AdapterConfig) -> AdapterKind:
    """Return the kind of a run's adapters.

    Args:
        settings: the config's section `adapter`.

    Returns:
        The kind.
    """
    return ADAPTER_KINDS[settings.kind]


def file_type(raw: Mapping[str, Any]) -> type[FileConfig] | None:
    """Find what reads a file of adapter_config.json.

    Args:
        raw: its content.

    Returns:
        The class of its config; None for a kind that is not known here.
    """
    found = raw.get("peft_type")
    return FILES.get(found) if isinstance(found, str) else None
