"""Promises of a prompt's file: one tensor of the config's shape, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora_trainer.adapters.kinds.prompt_file import PromptFileConfig
from qlora_trainer.adapters.peft_format import read_adapter
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import AdapterConfig


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        ({}, {"lm_head.weight": torch.zeros(5, 8)}, r"also holds lm_head\.weight"),
        ({}, {"prompt_embeddings": None}, "holds no prompt_embeddings"),
        ({"num_virtual_tokens": 4}, {}, r"has shape \(5, 8\); its config says \(4, 8\)"),
        ({"token_dim": 9}, {}, r"has shape \(5, 8\); its config says \(5, 9\)"),
        ({}, {"prompt_embeddings": torch.full((5, 8), torch.inf)}, "not finite"),
        ({"num_transformer_submodules": 2}, {}, "num_transformer_submodules"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules saved whole are not supported"),
        ({"task_type": "SEQ_2_SEQ_LM"}, {}, "task_type"),
    ],
)
def test_a_file_of_another_prompt_is_refused(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, Tensor | None], said: str
) -> None:
    content = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5, "token_dim": 8} | config
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    held = {"prompt_embeddings": torch.zeros(5, 8)} | tensors
    save_file({k: v for k, v in held.items() if v is not None}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=said):
        read_adapter(tmp_path)


def test_a_file_without_what_follows_from_its_tensor_is_read(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5}')
    save_file({"prompt_embeddings": torch.ones(5, 8)}, tmp_path / "adapter_model.safetensors")
    stored = read_adapter(tmp_path)
    assert stored.config == PromptFileConfig(num_virtual_tokens=5)
    assert stored.paths == []
    assert stored.differences(AdapterConfig(kind="prompt", virtual_tokens=6)) == {"adapter.virtual_tokens": (5, 6)}
    assert stored.differences(AdapterConfig(kind="ia3")) == {
        "adapter.kind": ("prompt", "ia3"),
        "adapter.virtual_tokens": (5, 20),
    }, "all that is to be set, at once"
