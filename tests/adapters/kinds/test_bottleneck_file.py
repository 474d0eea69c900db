"""Promises of a bottleneck adapter's files: what was written comes back, and anything else is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_trainer.adapters.kinds.bottleneck_file import BottleneckFileConfig
from qlora_trainer.adapters.peft_format import read_adapter, write_adapter
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import AdapterConfig

CONFIG = BottleneckFileConfig(bottleneck_size=2, hidden_size=4, activation="silu", placement="mlp")
PATH = "model.layers.0.mlp"
PREFIX = f"base_model.model.{PATH}.bottleneck_"


def tensors() -> dict[str, Tensor]:
    shapes = {"down.weight": (2, 4), "down.bias": (2,), "up.weight": (4, 2), "up.bias": (4,)}
    return {f"{PREFIX}{name}": torch.full(shape, 0.5) for name, shape in shapes.items()}


def test_files_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    write_adapter(tmp_path, tensors(), CONFIG)
    stored = read_adapter(tmp_path)
    assert stored.config == CONFIG
    assert stored.paths == [PATH]
    assert stored.config.folds(stored.tensors) == {}
    assert all(torch.equal(tensor, stored.tensors[name]) for name, tensor in tensors().items())
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "BOTTLENECK",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "revision": None,
        "inference_mode": True,
        "bottleneck_size": 2,
        "hidden_size": 4,
        "activation": "silu",
        "placement": "mlp",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{PREFIX}up.weight": torch.zeros(2, 4)}, r"up\.weight has shape \(2, 4\); .* it should be \(4, 2\)"),
        ({f"{PREFIX}down.bias": torch.zeros(4)}, r"down\.bias has shape \(4,\); .* should be \(2,\)"),
        ({f"{PREFIX}up.bias": None}, r"model\.layers\.0\.mlp has no bottleneck_up\.bias; .* incomplete"),
        ({"base_model.model.lm_head.weight": torch.zeros(4, 4)}, r"also holds base_model\.model\.lm_head\.weight"),
        ({f"{PREFIX}up.scale": torch.zeros(4)}, r"also holds .*bottleneck_up\.scale"),
        ({f"{PREFIX}up.bias": torch.full((4,), float("nan"))}, r"up\.bias holds values that are not finite"),
        ({f"{PREFIX}up.bias": torch.zeros(4, dtype=torch.int64)}, r"up\.bias is torch\.int64; float32"),
        (dict.fromkeys(tensors()), r"holds no tensors of a bottleneck adapter"),
    ],
)
def test_tensors_that_are_none_of_such_an_adapter_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    write_adapter(tmp_path, tensors(), CONFIG)
    weights = tmp_path / "adapter_model.safetensors"
    changed = {**load_file(weights), **changes}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, weights)
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bottleneck_size": 0}, "bottleneck_size: .*greater than or equal to 1"),
        ({"activation": "tanh"}, "activation: .*'relu', 'gelu' or 'silu'"),
        ({"scaling": 2.0}, r"scaling is 2\.0: this key is not known here"),
        ({"activation": None}, "activation"),
    ],
)
def test_a_config_of_another_function_is_refused_by_its_key(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_adapter(tmp_path, tensors(), CONFIG)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path)


def test_settings_of_a_run_that_differ_are_found_also_those_of_another_kind() -> None:
    same = AdapterConfig(kind="bottleneck", bottleneck_size=2, activation="silu", placement="mlp")
    assert CONFIG.differences(tensors(), same) == {}
    assert CONFIG.differences(tensors(), AdapterConfig(rank=8)) == {
        "adapter.kind": ("bottleneck", "lora"),
        "adapter.bottleneck_size": (2, 64),
        "adapter.activation": ("silu", "relu"),
        "adapter.placement": ("mlp", "attention+mlp"),
    }
