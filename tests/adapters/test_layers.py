"""The adapted layer: the formula, with a base of four bits and a dense one."""

import pytest
import torch
from spying import noting, unchanged
from torch import nn

from qlora_kernels.nf4 import dequantize_nf4
from qlora_trainer.adapters.formulas import fold_lora, lora_delta, lora_scaling
from qlora_trainer.adapters.layers import LoRALinear
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.weights.nf4 import quantize_weight


def test_scaling_is_alpha_over_rank_or_its_root() -> None:
    assert lora_scaling(16, 32.0, use_rslora=False) == 2.0
    assert lora_scaling(16, 32.0, use_rslora=True) == 8.0


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_layer_is_the_folded_weight(use_rslora: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 80)
    layer = LoRALinear(linear, rank=6, alpha=9.0, use_rslora=use_rslora)
    with torch.no_grad():
        layer.lora_A.weight.normal_()
        layer.lora_B.weight.normal_()
    x = torch.randn(7, 96, dtype=torch.float64)
    A, B, W = (w.detach().double() for w in (layer.lora_A.weight, layer.lora_B.weight, linear.weight))
    scaling = lora_scaling(6, 9.0, use_rslora)
    expected = x @ (W + scaling * B @ A).T + linear.bias.double()
    assert torch.allclose(layer(x.float()).double(), expected, rtol=1e-5, atol=1e-4)
    folded = fold_lora(linear.weight.detach(), layer.lora_A.weight.detach(), layer.lora_B.weight.detach(), scaling)
    assert torch.allclose(folded.double(), W + scaling * B @ A, atol=1e-5)
    assert torch.equal(folded - lora_delta(A, B, scaling), folded - scaling * (B.float() @ A.float()))


def make_layer(base: NF4Linear | nn.Linear, dropout: float) -> LoRALinear:
    layer = LoRALinear(base, rank=6, alpha=9.0, dropout=dropout)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.lora_A.weight.normal_(generator=generator)
        layer.lora_B.weight.normal_(generator=generator)
    return layer


def test_the_layer_over_four_bits_is_the_layer_over_the_dequantized_weight() -> None:
    torch.manual_seed(0)
    four_bit = NF4Linear(quantize_weight(torch.randn(64, 128) / 11), torch.randn(64))
    dense = nn.Linear(128, 64)
    with torch.no_grad():
        dense.weight.copy_(dequantize_nf4(four_bit.nf4_weight, torch.float32))
        assert four_bit.bias is not None
        dense.bias.copy_(four_bit.bias)
    layers = [make_layer(base, dropout=0.0) for base in (four_bit, dense)]
    x = torch.randn(2, 5, 128)
    outputs = [layer(x) for layer in layers]
    for output in outputs:
        output.square().sum().backward()
    largest = float(outputs[1].detach().abs().max())  # sums of terms near it may be in another order
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6 * largest)
    for name in ("lora_A", "lora_B"):
        ours, theirs = (layer.get_submodule(name).weight.grad for layer in layers)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_the_layer_over_four_bits_keeps_its_input_and_a_rank_sized_product() -> None:
    layer = make_layer(NF4Linear(quantize_weight(torch.randn(64, 128)), None), dropout=0.4)
    kept: list[torch.Tensor] = []
    x = torch.randn(7, 128, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(noting(unchanged, kept.append), unchanged):
        layer(x)
    assert [tensor.shape for tensor in kept] == [(7, 128), (7, 6)]


@pytest.mark.parametrize("kind", ["four bits", "dense"])
def test_dropout_is_random_in_training_only_and_follows_the_global_random_state(kind: str) -> None:
    torch.manual_seed(0)
    base = NF4Linear(quantize_weight(torch.randn(64, 128)), None) if kind == "four bits" else nn.Linear(128, 64)
    layer, x = make_layer(base, dropout=0.4), torch.randn(7, 128)
    state = torch.get_rng_state()
    first, second = layer(x), layer(x)
    torch.set_rng_state(state)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(torch.get_rng_state(), state)
    mean = torch.stack([layer.train()(x) for _ in range(2000)]).mean(0)
    assert (mean - layer.eval()(x)).norm() / mean.norm() < 0.03  # without 1 / (1 - p): 0.4


def test_a_layer_shows_what_it_is() -> None:
    layer = LoRALinear(nn.Linear(128, 64), rank=6, alpha=9.0, dropout=0.25)
    assert "rank=6, scaling=1.5, dropout=0.25" in repr(layer)
