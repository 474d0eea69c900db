"""Promises of rows of tokens in PEFT's files: in the order of the ids, and none that the config does not name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora_trainer.adapters.folds import MergedTokens
from qlora_trainer.adapters.peft_format import read_adapter
from qlora_trainer.adapters.tokens.put_tokens import check_token_ids
from qlora_trainer.adapters.tokens.token_file import sorted_ids
from qlora_trainer.common.errors import AdapterError

LAYER = "base_model.model.model.layers.0.mlp.up_proj.lora_"
EMBEDDING = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
HEAD = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
ROWS = torch.arange(12.0).reshape(3, 4)


def write(directory: Path, indices: Any, tensors: dict[str, Tensor]) -> Path:
    """A file as another program writes it."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config | {"trainable_token_indices": indices}))
    layer = {f"{LAYER}A.weight": torch.ones(2, 4), f"{LAYER}B.weight": torch.ones(4, 2)}
    save_file(
        {name: tensor.clone() for name, tensor in (layer | tensors).items()}, directory / "adapter_model.safetensors"
    )
    return directory


@pytest.mark.parametrize(
    ("indices", "tensors"),
    [
        ([7, 2, 5], {EMBEDDING: ROWS}),
        ({"embed_tokens": [7, 2, 5]}, {EMBEDDING: ROWS}),
        ({"embed_tokens": [7, 2, 5], "lm_head": [5, 7, 2]}, {EMBEDDING: ROWS, HEAD: ROWS[[2, 0, 1]]}),
        ({"embed_tokens": [7, 2, 5], "lm_head": [7, 2, 5]}, {EMBEDDING: ROWS}),  # tied, as PEFT writes it
    ],
)
def test_rows_come_in_the_order_of_the_ids(tmp_path: Path, indices: Any, tensors: dict[str, Tensor]) -> None:
    stored = read_adapter(write(tmp_path, indices, tensors))
    assert stored.config.token_ids == (2, 5, 7)
    for name in tensors:
        assert torch.equal(stored.tensors[name], ROWS[[1, 2, 0]])
    found = stored.config.token_rows(stored.tensors)
    assert {f"base_model.model.{path}.token_adapter.trainable_tokens_delta" for path in found} == tensors.keys()
    assert all(rows.ids == (2, 5, 7) for rows in found.values())


@pytest.mark.parametrize(
    ("indices", "tensors", "said"),
    [
        ([7, 2, 7], {EMBEDDING: ROWS}, "trainable_token_indices names a token twice"),
        (
            {"embed_tokens": [7, 2], "lm_head": [7, 3]},
            {EMBEDDING: ROWS[:2], HEAD: ROWS[:2]},
            "other tokens of one matrix",
        ),
        ([7, 2], {EMBEDDING: ROWS}, r"have shape \(3, 4\), and trainable_token_indices names 2 tokens"),
        ([7, 2], {}, "holds no rows of tokens"),
        (None, {EMBEDDING: ROWS}, "holds rows of tokens, and trainable_token_indices is None"),
        ({"wte": [7, 2, 5]}, {EMBEDDING: ROWS}, "of model.embed_tokens, which trainable_token_indices does not name"),
        ([-1], {EMBEDDING: ROWS[:1]}, "greater than or equal to 0"),
        ([7, 2, 5], {EMBEDDING: ROWS, "base_model.model.lm_head.weight": ROWS}, "would overwrite the base"),
        (
            [7, 2, 5],
            {EMBEDDING: ROWS, "base_model.model.model.embed_tokens.token_adapter.base_layer.weight": ROWS},
            "save_embedding_layers=False",
        ),
    ],
)
def test_files_that_say_something_else_are_refused(
    tmp_path: Path, indices: Any, tensors: dict[str, Tensor], said: str
) -> None:
    with pytest.raises(AdapterError, match=said):
        read_adapter(write(tmp_path, indices, tensors))


def test_an_adapter_of_other_tokens_is_refused_by_their_ids(tmp_path: Path) -> None:
    stored = read_adapter(write(tmp_path, [7, 2, 5], {EMBEDDING: ROWS}))
    with pytest.raises(AdapterError, match="has rows of the tokens 2, 5, 7, and the settings train no tokens"):
        check_token_ids(torch.nn.Linear(2, 2), stored.config)
    assert sorted_ids(None) == ()


@pytest.mark.parametrize("cuts", [[10], [3, 7], [1] * 10])
def test_rows_are_merged_over_those_of_the_base_and_after_its_last_however_it_is_cut(cuts: list[int]) -> None:
    base, values = torch.randn(10, 4), torch.randn(5, 4).half()
    tokens = MergedTokens((0, 3, 9, 10, 11), values)
    expected = torch.cat([base, torch.zeros(2, 4)])
    expected[[0, 3, 9, 10, 11]] = values.float()
    assert tokens.height(10) == 12
    assert torch.equal(torch.cat(list(tokens.over(base.split(cuts)))), expected)
