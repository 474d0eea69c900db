"""The frozen NF4 linear layer: exact gradients, nothing kept, recomputation, and a base that does not change."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlora_kernels.lora_linear import nf4_linear
from qlora_kernels.nf4 import NF4Weight, dequantize_nf4, quantize_nf4


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def weight() -> NF4Weight:
    return quantize_nf4(normal(7, 45) / 45**0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_output_and_gradient_equal_a_dense_layer_with_the_dequantised_weight(
    weight: NF4Weight, lead: tuple[int, ...], dtype: torch.dtype
) -> None:
    dense = dequantize_nf4(weight, dtype)
    x, bias = normal(*lead, 45, dtype=dtype).requires_grad_(), normal(7, seed=1, dtype=dtype)
    grad = normal(*lead, 7, seed=2, dtype=dtype)
    output = nf4_linear(x, weight, bias)
    output.backward(grad)
    assert torch.equal(output, F.linear(x, dense, bias))
    assert x.grad is not None
    assert torch.equal(x.grad, grad @ dense)


def test_gradients_are_those_of_finite_differences(weight: NF4Weight) -> None:
    x = normal(2, 45, dtype=torch.float64).requires_grad_()
    bias = normal(7, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, bias: nf4_linear(x, weight, bias), (x, bias))


def test_bias_gets_a_gradient_only_where_it_is_trained(weight: NF4Weight) -> None:
    x = normal(301, 45, dtype=torch.bfloat16).requires_grad_()  # bf16 has no 301: the sum is in the bias' dtype
    frozen, trained = normal(7), normal(7).requires_grad_()
    nf4_linear(x, weight, frozen).sum().backward()
    nf4_linear(x, weight, trained).sum().backward()
    assert frozen.grad is None
    assert trained.grad is not None
    assert torch.equal(trained.grad, torch.full((7,), 301.0))
    assert frozen.dtype == trained.grad.dtype == torch.float32


def test_frozen_input_costs_no_backward(weight: NF4Weight, monkeypatch: pytest.MonkeyPatch) -> None:
    bias = normal(7).requires_grad_()
    output = nf4_linear(normal(2, 45), weight, bias)

    def refuse(*_arguments: object) -> Tensor:
        raise AssertionError("dequantised for a gradient that nobody wants")

    monkeypatch.setattr("qlora_kernels.lora_linear.dequantize_nf4", refuse)
    output.sum().backward()
    assert bias.grad is not None


def test_nothing_is_kept_for_backward(weight: NF4Weight) -> None:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = nf4_linear(normal(4, 45).requires_grad_(), weight, None)
    assert output.grad_fn is not None
    assert kept == []
    held = [value for value in vars(output.grad_fn).values() if isinstance(value, Tensor)]
    assert held == []


def test_checkpointing_gives_the_same_gradient(weight: NF4Weight) -> None:
    def block(x: Tensor) -> Tensor:
        return F.silu(nf4_linear(F.silu(x), weight, None))

    plain, recomputed = normal(4, 45).requires_grad_(), normal(4, 45).requires_grad_()
    block(plain).sum().backward()
    checkpoint(block, recomputed, use_reentrant=False).sum().backward()
    assert plain.grad is not None
    assert recomputed.grad is not None
    assert torch.equal(plain.grad, recomputed.grad)


def test_without_grad_mode_no_graph_is_made(weight: NF4Weight) -> None:
    x = normal(4, 45).requires_grad_()
    with torch.no_grad():
        assert not nf4_linear(x, weight, None).requires_grad


def test_weight_is_not_changed_by_training_through_it(weight: NF4Weight) -> None:
    before = [tensor.clone() for tensor in vars(weight).values() if isinstance(tensor, Tensor)]
    bias = normal(7)
    x = normal(4, 45, dtype=torch.bfloat16).requires_grad_()
    nf4_linear(x, weight, bias).sum().backward()
    after = [tensor for tensor in vars(weight).values() if isinstance(tensor, Tensor)]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert torch.equal(bias, normal(7))
