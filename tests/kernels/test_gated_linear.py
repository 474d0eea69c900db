"""The end of a gated MLP as one layer: the bits of the product in autograd, and gate and up all that is kept of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapted_layers import SCALING, SEED, adapter_inputs, fused, output_and_gradients, saved_by
from random_tensors import normal
from torch import Tensor

from qlora_kernels import gated as gated_space
from qlora_kernels import gated_linear, lora_linear
from qlora_kernels.adapter import Adapter
from qlora_kernels.gated_linear import gated_nf4_linear
from qlora_kernels.lora_linear import nf4_linear
from qlora_kernels.nf4 import NF4Weight
from qlora_trainer.training.memory.recompute import Recomputation

# The end of a gated MLP: gate and up (..., I) in the place of x.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,  # has no name of its own
}


def gated_inputs(*lead: int, dtype: torch.dtype = torch.float64, parameters: torch.dtype | None = None) -> list[Tensor]:
    x, *others = adapter_inputs(*lead, dtype=dtype, parameters=parameters)
    return [x, normal(*lead, 45, seed=9, dtype=dtype).requires_grad_(), *others]


def gated(weight: NF4Weight, activation: str, dropout: float = 0.0) -> Callable[..., Tensor]:
    seed = SEED if dropout else None

    def function(gate: Tensor, up: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        adapter = Adapter(A, B, SCALING, dropout, seed)
        named = activation if activation in gated_space.ACTIVATION_NAMES else ACTIVATIONS[activation]
        return gated_nf4_linear(gate, up, named, weight, bias, adapter)

    return function


def ungated(weight: NF4Weight, activation: str, dropout: float = 0.0) -> Callable[..., Tensor]:
    """The same with the product as autograd keeps it."""
    return lambda gate, up, *others: fused(weight, dropout)(ACTIVATIONS[activation](gate) * up, *others)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_making_the_gated_product_again_changes_no_bit(
    weight: NF4Weight, activation: str, dropout: float, dtype: torch.dtype
) -> None:
    inputs = gated_inputs(2, 3, dtype=dtype, parameters=None if dtype == torch.float64 else torch.float32)
    found = output_and_gradients(gated(weight, activation, dropout), inputs)  # type: ignore[arg-type]
    expected = output_and_gradients(ungated(weight, activation, dropout), inputs)  # type: ignore[arg-type]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_gated_gradients_are_those_of_finite_differences(weight: NF4Weight) -> None:
    assert torch.autograd.gradcheck(gated(weight, "silu", 0.3), gated_inputs(2))


def test_a_gated_layer_without_an_adapter_has_the_same_gradients(weight: NF4Weight) -> None:
    gate, up, *_ = gated_inputs(4)
    grad = normal(4, 7, seed=2, dtype=torch.float64)
    found = torch.autograd.grad(gated_nf4_linear(gate, up, "silu", weight, None), (gate, up), grad)
    expected = torch.autograd.grad(nf4_linear(F.silu(gate) * up, weight, None), (gate, up), grad)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_gate_up_and_a_rank_sized_product_are_all_that_a_gated_layer_saves(weight: NF4Weight) -> None:
    inputs = gated_inputs(4, 5)
    kept = saved_by(gated(weight, "silu", 0.3), inputs)  # type: ignore[arg-type]
    assert [tensor.shape for tensor in kept] == [(4, 5, 45), (4, 5, 45), (20, 3)]
    assert [tensor.data_ptr() for tensor in kept[:2]] == [tensor.data_ptr() for tensor in inputs[:2]]


def test_recomputation_stops_before_the_last_large_product(weight: NF4Weight, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two projections run forward; recomputed, only the first: backward needs nothing from the second's output."""
    inputs = gated_inputs(4)
    outputs = 0

    def counting(*arguments: Any, **settings: Any) -> Tensor:
        nonlocal outputs
        outputs += 1
        return original(*arguments, **settings)

    original = lora_linear.output_of
    for module in (lora_linear, gated_linear):
        monkeypatch.setattr(module, "output_of", counting)

    def block(gate: Tensor, up: Tensor, *others: Tensor) -> Tensor:
        first = F.pad(nf4_linear(gate, weight, None), (0, 38))
        return gated(weight, "silu")(first, up, *others)

    gate, *others = inputs
    output = Recomputation(lambda gate: block(gate, *others), gate).run(gate)
    assert outputs == 2
    output.sum().backward()
    assert outputs == 3
    assert all(tensor.grad is not None for tensor in inputs)
