"""The QLoRA trainer: adapt a large language model on one consumer GPU.

Whole runs: `start_run(load_config(path)).train(...)`, `resume_run`, `merge_run`. In a training loop of your own, on any
nn.Module with linear layers: `add_adapters`, `lora_state_dict` (README). Names are loaded when first used, so that
importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_trainer.adapters.arithmetic.methods import CombineSettings
    from qlora_trainer.adapters.inject import (
        add_adapters,
        load_adapter_state,
        lora_state_dict,
    )
    from qlora_trainer.adapters.trainable import mark_only_lora_as_trainable
    from qlora_trainer.common.errors import QLoRATrainerError
    from qlora_trainer.config.load import load_config
    from qlora_trainer.config.schema import AdapterConfig, RunConfig
    from qlora_trainer.merging.merge_run import merge_run
    from qlora_trainer.runs.adapter_set import AdapterSet
    from qlora_trainer.runs.combined import combine_runs
    from qlora_trainer.runs.start import resume_run, start_run

_HOMES = {
    "AdapterConfig": "config.schema",
    "AdapterSet": "runs.adapter_set",
    "CombineSettings": "adapters.arithmetic.methods",
    "QLoRATrainerError": "common.errors",
    "RunConfig": "config.schema",
    "add_adapters": "adapters.inject",
    "combine_runs": "runs.combined",
    "load_adapter_state": "adapters.inject",
    "load_config": "config.load",
    "lora_state_dict": "adapters.inject",
    "mark_only_lora_as_trainable": "adapters.trainable",
    "merge_run": "merging.merge_run",
    "resume_run": "runs.start",
    "start_run": "runs.start",
}

__all__ = [
    "AdapterConfig",
    "AdapterSet",
    "CombineSettings",
    "QLoRATrainerError",
    "RunConfig",
    "add_adapters",
    "combine_runs",
    "load_adapter_state",
    "load_config",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge_run",
    "resume_run",
    "start_run",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
