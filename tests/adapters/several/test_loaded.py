"""An adapter made from its files computes what it computed where it was made, and leaves the base as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from stored_adapters import adapted_copy, store_adapter
from tiny_models import load
from torch import Tensor

from qlora_trainer.adapters.peft_format import read_adapter
from qlora_trainer.adapters.several.changes import apply, undo
from qlora_trainer.adapters.several.loaded import loaded_adapter
from qlora_trainer.adapters.trainable import leading_ids
from qlora_trainer.common.errors import AdapterError

Models = Callable[[str], Path]
IDS = torch.arange(3, 27).reshape(2, 12)
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"rank": 4}),
    "lora of one scaling and another rank": ("llama", {"rank": 8, "alpha": 16}),  # the default is 32 / 16
    "lora by patterns": (
        "llama",
        {
            "rank": 4,
            "alpha": 2,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"v_proj": 9},
            "target_modules": ["q_proj", "v_proj", "up_proj"],
        },
    ),
    "lora of some layers": ("llama", {"rank": 4, "layers_to_transform": [1], "target_modules": "attention"}),
    "lora with biases": ("qwen2", {"rank": 4, "bias": "lora_only"}),
    "lora with all biases": ("gpt2", {"rank": 4, "bias": "all"}),
    "lora of parts": ("gpt2", {"rank": 3, "fused_parts": {"c_attn": ["query", "value"]}}),
    "dora": ("llama", {"kind": "dora", "rank": 4}),
    "ia3": ("llama", {"kind": "ia3"}),
    "ia3 of outputs alone": ("qwen2", {"kind": "ia3", "target_modules": ["down_proj"], "feedforward_modules": []}),
    "ia3 of inputs alone": (
        "llama",
        {"kind": "ia3", "target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["q_proj", "up_proj"]},
    ),
    "bottleneck": ("llama", {"kind": "bottleneck", "bottleneck_size": 8, "activation": "gelu", "placement": "mlp"}),
    "prompt": ("llama", {"kind": "prompt", "virtual_tokens": 5}),
}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    leading = torch.tensor(leading_ids(model), dtype=torch.int64).expand(len(IDS), -1)
    return model(input_ids=torch.cat([leading, IDS], dim=1)).logits


@pytest.mark.parametrize(
    "name", slow_but(SETTINGS, "lora by patterns", "lora with all biases", "dora", "ia3 of inputs alone", "prompt")
)
def test_an_adapter_from_its_files_has_the_bits_of_the_one_that_was_written(
    name: str, tiny_models: Models, tmp_path: Path
) -> None:
    family, settings = SETTINGS[name]
    base = load(tiny_models(family))
    base.model.eval()
    directory = store_adapter(tmp_path / "adapter", base, **settings)
    expected, before = logits(adapted_copy(base, **settings)), logits(base.model)
    tree = str(base.model)
    state = {key: tensor.clone() for key, tensor in base.model.state_dict().items()}
    adapter = loaded_adapter(base.model, read_adapter(directory), "It")
    assert str(base.model) == tree
    assert torch.equal(logits(base.model), before)
    apply(adapter.changes)
    assert torch.equal(logits(base.model), expected)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not any(module.training for module in base.model.modules())
    undo(adapter.changes)
    assert torch.equal(logits(base.model), before)
    assert str(base.model) == tree
    assert all(torch.equal(tensor, state[key]) for key, tensor in base.model.state_dict().items())
    size = (expected[:, -IDS.shape[1] :] - before).abs().max() / before.abs().max()
    assert size > 0.01, "the adapter must matter"


def test_an_adapter_of_another_architecture_is_refused_by_its_module(tiny_models: Models, tmp_path: Path) -> None:
    stored = read_adapter(store_adapter(tmp_path / "adapter", load(tiny_models("gpt2")), rank=2))
    with pytest.raises(AdapterError, match=r"^It adapts transformer\.h\.0\.\S+, which this base has not"):
        loaded_adapter(load(tiny_models("llama")).model, stored, "It")


def test_a_rank_that_no_adapter_of_ours_has_is_refused_by_its_setting(tiny_models: Models, tmp_path: Path) -> None:
    base = load(tiny_models("llama"))
    stored = read_adapter(store_adapter(tmp_path / "adapter", base, rank=2, target_modules=["q_proj"]))
    wide = {
        name: torch.zeros(*((1025, tensor.shape[1]) if ".lora_A." in name else (tensor.shape[0], 1025)))
        for name, tensor in stored.tensors.items()
    }
    changed = type(stored)(stored.config.model_copy(update={"r": 1025}), wide)
    with pytest.raises(AdapterError, match=r"^It needs adapter\.rank to be a value that it cannot have here"):
        loaded_adapter(base.model, changed, "It")
