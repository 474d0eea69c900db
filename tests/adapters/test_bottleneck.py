"""Promises of bottleneck adapters on models: no change at the start, what trains, and what keeps working."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from tiny_models import FAMILIES, MORE_FAMILIES, load
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_trainer.adapters.bottleneck import BottleneckLayer
from qlora_trainer.adapters.inject import add_adapters, load_adapter_state, lora_state_dict
from qlora_trainer.adapters.joint import JointForward
from qlora_trainer.adapters.trainable import adapter_modules, trainable_parameters
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import AdapterConfig
from qlora_trainer.training.patches import GatedMLP, patch_model

Models = Callable[[str], Path]
SETTINGS = AdapterConfig(kind="bottleneck", bottleneck_size=8)
TOKENS = torch.arange(2, 22)[None]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits


def set_all(model: nn.Module, seed: int = 0) -> None:
    """Give all that trains values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("family", slow_but([*FAMILIES, *MORE_FAMILIES], "llama", "gpt2", "falcon", "mixtral"))
def test_a_family_starts_at_the_bases_logits_and_trains_all_of_each_adapter(family: str, tiny_models: Models) -> None:
    model = load(tiny_models(family)).model
    before = logits(model)
    assert len(add_adapters(model, SETTINGS)) == 4
    assert torch.equal(logits(model), before)
    set_all(model)
    assert not torch.allclose(logits(model), before, rtol=1e-2)
    model.train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    trained = dict(trainable_parameters(model))
    assert len(trained) == 16
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained.values())
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())


def test_an_adapter_768_wide_with_64_between_has_99136_numbers() -> None:
    """2 x 768 x 64 of the matrices, 64 + 768 of the biases."""
    settings = AdapterConfig(kind="bottleneck")
    assert settings.bottleneck_size == 64
    config = LlamaConfig(
        vocab_size=8, hidden_size=768, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    for placement, count in (("attention+mlp", 2), ("mlp", 1), ("attention", 1)):
        model = LlamaForCausalLM(config)
        paths = add_adapters(model, settings.model_copy(update={"placement": placement}))
        assert len(paths) == count
        assert sum(parameter.numel() for _, parameter in trainable_parameters(model)) == count * 99_136
        assert all(("attn" in path) == (placement == "attention") for path in paths) or count == 2


def test_the_memory_efficient_mlp_and_projections_over_one_input_stay(tiny_llama: Path) -> None:
    model = load(tiny_llama).model
    add_adapters(model, SETTINGS)
    set_all(model)
    before = logits(model)
    report = patch_model(model)
    assert (report.mlps, report.norms, report.projections) == ((2, 2), (5, 5), (0, 0))
    for module in adapter_modules(model).values():
        assert isinstance(module.base.forward, GatedMLP | JointForward)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def test_d_is_drawn_from_the_seed_alone_and_the_rest_is_zero(tiny_llama: Path) -> None:
    drawn = []
    for state, seed in ((1, 0), (2, 0), (1, 1)):
        model = load(tiny_llama).model
        torch.manual_seed(state)
        before = torch.get_rng_state()
        add_adapters(model, SETTINGS, seed)
        assert torch.equal(torch.get_rng_state(), before)
        drawn.append(lora_state_dict(model))
    first, again, other = drawn
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    for name, tensor in first.items():
        is_drawn = name.endswith("bottleneck_down.weight")
        assert bool(tensor.any()) == is_drawn
        assert torch.equal(tensor, other[name]) != is_drawn
        assert not is_drawn or float(tensor.abs().max()) <= 64**-0.5


def test_a_state_is_read_back_and_one_of_another_size_or_place_is_refused(tiny_llama: Path) -> None:
    model, other = load(tiny_llama).model, load(tiny_llama).model
    add_adapters(model, SETTINGS)
    set_all(model)
    state = lora_state_dict(model)
    path = "base_model.model.model.layers.0.mlp"
    assert state[f"{path}.bottleneck_down.weight"].shape == (8, 64)
    assert state[f"{path}.bottleneck_up.weight"].shape == (64, 8)
    assert state[f"{path}.bottleneck_down.bias"].shape == (8,)
    assert state[f"{path}.bottleneck_up.bias"].shape == (64,)
    add_adapters(other, SETTINGS, seed=5)
    load_adapter_state(other, state)
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(AdapterError, match=r"1 tensor missing, such as .*bottleneck_up\.bias"):
        load_adapter_state(other, {k: v for k, v in state.items() if k != f"{path}.bottleneck_up.bias"})
    smaller = load(tiny_llama).model
    add_adapters(smaller, SETTINGS.model_copy(update={"bottleneck_size": 4}))
    with pytest.raises(AdapterError, match="has shape"):
        load_adapter_state(smaller, state)


def test_adapters_in_bfloat16_are_all_of_it(tiny_llama: Path) -> None:
    model = load(tiny_llama).model
    add_adapters(model, SETTINGS.model_copy(update={"dtype": "bfloat16"}))
    assert {parameter.dtype for _, parameter in trainable_parameters(model)} == {torch.bfloat16}


def test_a_part_that_returns_more_than_its_output_still_does() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4), requires_grad=False)

        def forward(self, x: Tensor, scale: float) -> tuple[Tensor, str]:
            return x @ self.weight * scale, "weights"

    layer = BottleneckLayer(Part(), 4, 2, "relu", torch.Generator().manual_seed(0))
    set_all(layer)
    output, more = layer(torch.ones(1, 3, 4), scale=2.0)
    assert more == "weights"
    assert torch.equal(output, layer.adapt(torch.full((1, 3, 4), 2.0)))
