"""Adapters on disk for tests that load several: random values, as a run's or another program's directory holds them."""

import copy
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.adapters.inject import adapter_state_dict, add_adapters
from qlora_trainer.adapters.kinds.table import adapter_kind
from qlora_trainer.adapters.peft_format import write_adapter
from qlora_trainer.adapters.trainable import trainable_parameters
from qlora_trainer.config.schema import AdapterConfig
from qlora_trainer.model.load import Base
from qlora_trainer.runs.directory import BaseRecord, write_base_record


class Tokens:
    """A tokenizer of these tokens alone."""

    def __init__(self, ids: dict[str, int]) -> None:
        self.ids = ids

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [self.ids[text]]}

    def get_vocab(self) -> dict[str, int]:
        return self.ids


SIZE = 0.1
"""Of the values that are added to what an adapter starts as: logits then differ by more than a tenth."""


def store_adapter(
    directory: Path,
    base: Base,
    seed: int = 0,
    *,
    has_record: bool = True,
    tokenizer: Tokens | None = None,
    **settings: Any,
) -> Path:
    """Write an adapter of these settings, with a record of its base as a run writes it; returns the directory."""
    model = adapted_copy(base, seed, tokenizer, **settings)
    config = AdapterConfig(**settings)
    tensors = adapter_state_dict(model)
    paths = adapter_kind(config).target_paths(base.model, config)
    named = {"base_model_name_or_path": "tiny", "revision": None}
    directory.mkdir(parents=True)
    write_adapter(directory, tensors, adapter_kind(config).file_config(config, model, tensors, paths, named))
    if has_record:
        write_base_record(directory, BaseRecord(base.fingerprint, 1, directory.name, "rows"))
    return directory


def adapted_copy(base: Base, seed: int = 0, tokenizer: Tokens | None = None, **settings: Any) -> Any:
    """The base's model with an adapter of these settings that is away from its start, as `store_adapter` writes it."""
    model = copy.deepcopy(base.model)
    add_adapters(model, AdapterConfig(**settings), seed, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(SIZE * torch.randn(parameter.shape, generator=generator))
    return model.eval()
