"""Promises of files that are one tensor: another, none, or one of another shape is refused by what the file is of."""

import pytest
import torch

from qlora_trainer.adapters.kinds.one_tensor_file import OneTensorFileConfig
from qlora_trainer.adapters.kinds.prefix_file import PrefixFileConfig
from qlora_trainer.adapters.kinds.prompt_file import PromptFileConfig
from qlora_trainer.common.errors import AdapterError

FILES = [
    (PromptFileConfig(num_virtual_tokens=3, token_dim=4), (3, 4), "prompt of virtual tokens"),
    (PromptFileConfig(num_virtual_tokens=3), (3, 9), "prompt of virtual tokens"),
    (PrefixFileConfig(num_virtual_tokens=3, token_dim=4, num_attention_heads=2, num_layers=5), (3, 40), "prefix"),
]


@pytest.mark.parametrize(("config", "shape", "noun"), FILES, ids=["prompt", "any width", "prefix"])
def test_a_file_is_one_tensor_of_its_configs_shape(
    config: OneTensorFileConfig, shape: tuple[int, int], noun: str
) -> None:
    values = torch.zeros(shape)
    config.check_tensors({"prompt_embeddings": values}, "it")
    with pytest.raises(AdapterError, match=rf"it also holds other, which is no part of a {noun}\."):
        config.check_tensors({"prompt_embeddings": values, "other": values}, "it")
    with pytest.raises(AdapterError, match=r"it holds no prompt_embeddings\."):
        config.check_tensors({}, "it")
    with pytest.raises(AdapterError, match=r"has shape \(2, \d+\); its config says \(3, \d+\)"):
        config.check_tensors({"prompt_embeddings": values[:2]}, "it")
