"""Promises of a prefix's file: one tensor of the config's shape, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora_trainer.adapters.peft_format import read_adapter
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import AdapterConfig

CONTENT = {
    "peft_type": "PREFIX_TUNING",
    "num_virtual_tokens": 5,
    "token_dim": 8,
    "num_attention_heads": 2,
    "num_layers": 3,
}


def written(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor | None]) -> Path:
    (directory / "adapter_config.json").write_text(json.dumps(CONTENT | config))
    held = {"prompt_embeddings": torch.zeros(5, 48)} | tensors
    save_file({k: v for k, v in held.items() if v is not None}, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        ({}, {"lm_head.weight": torch.zeros(5, 8)}, r"also holds lm_head\.weight"),
        ({}, {"prompt_embeddings": None}, "holds no prompt_embeddings"),
        ({"num_virtual_tokens": 4}, {}, r"has shape \(5, 48\); its config says \(4, 48\)"),
        ({"num_layers": 2}, {}, r"has shape \(5, 48\); its config says \(5, 32\)"),
        ({"token_dim": None}, {}, "token_dim"),
        ({}, {"prompt_embeddings": torch.full((5, 48), torch.inf)}, "not finite"),
        ({"num_transformer_submodules": 2}, {}, "num_transformer_submodules"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules saved whole are not supported"),
        ({"task_type": "SEQ_2_SEQ_LM"}, {}, "task_type"),
    ],
)
def test_a_file_of_another_prefix_is_refused(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, Tensor | None], said: str
) -> None:
    with pytest.raises(AdapterError, match=said):
        read_adapter(written(tmp_path, config, tensors))


def test_a_file_says_how_long_its_prefix_is(tmp_path: Path) -> None:
    stored = read_adapter(written(tmp_path, {"init_weights": "zero", "encoder_hidden_size": 8}, {}))
    assert stored.paths == []
    assert stored.differences(AdapterConfig(kind="prefix", virtual_tokens=5)) == {}
    assert stored.differences(AdapterConfig(kind="prefix", virtual_tokens=6)) == {"adapter.virtual_tokens": (5, 6)}
    assert stored.differences(AdapterConfig(kind="ia3")) == {
        "adapter.kind": ("prefix", "ia3"),
        "adapter.virtual_tokens": (5, 20),
    }, "all that is to be set, at once"
