"""Promises of the bottleneck's function: the formula and its gradients, and little kept for backward."""

import functools
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from random_tensors import normal
from spying import noting, unchanged
from torch import Tensor

from qlora_kernels.bottleneck import BottleneckActivation, add_bottleneck
from qlora_kernels.saved_tensors import KeptBy
from qlora_kernels.torch_internals import FakeTensorMode

ACTIVATIONS: tuple[BottleneckActivation, ...] = get_args(BottleneckActivation)
HIDDEN, WIDTH = 11, 5
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(*lead: int, dtype: torch.dtype = torch.float64, parameters: torch.dtype | None = None) -> Inputs:
    """h (..., H), D, b_D, U and b_U, all of which require gradients."""
    kind = parameters or dtype
    shapes = [(WIDTH, HIDDEN), (WIDTH,), (HIDDEN, WIDTH), (HIDDEN,)]
    drawn = [normal(*shape, seed=1 + seed, dtype=kind) for seed, shape in enumerate(shapes)]
    h, down, down_bias, up, up_bias = (t.requires_grad_() for t in (normal(*lead, HIDDEN, dtype=dtype), *drawn))
    return h, down, down_bias, up, up_bias


def formula(h: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, activation: str) -> Tensor:
    narrow = F.linear(h, down.to(h.dtype), down_bias.to(h.dtype))
    activated = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu}[activation](narrow)
    return h + F.linear(activated, up.to(h.dtype), up_bias.to(h.dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_finite_differences(activation: BottleneckActivation) -> None:
    assert torch.autograd.gradcheck(functools.partial(add_bottleneck, activation=activation), inputs(2, 3))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_output_and_gradients_are_those_of_the_formula_in_plain_torch(
    activation: BottleneckActivation, dtype: torch.dtype
) -> None:
    """Parameters in fp32 are cast where they are multiplied, and have their gradients in fp32."""
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    upstream = normal(2, 9, HIDDEN, seed=9, dtype=dtype)
    given = inputs(2, 9, dtype=dtype, parameters=kind)
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    truth = functools.partial(formula, activation=activation)(*exact)
    true_values = [truth.detach(), *torch.autograd.grad(truth, exact, upstream.double())]
    errors = []
    for function in (add_bottleneck, formula):
        output = function(*given, activation)
        values = [output.detach(), *torch.autograd.grad(output, given, upstream)]
        assert [value.dtype for value in values] == [dtype, dtype, *[kind] * 4]
        pairs = zip(values, true_values, strict=True)
        errors.append([float((value.double() - true).norm() / true.norm()) for value, true in pairs])
    for ours, plain in zip(*errors, strict=True):
        assert ours <= 1.2 * plain + torch.finfo(dtype).eps


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_with_u_and_its_bias_zero_the_output_is_the_input_bit_for_bit(activation: BottleneckActivation) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        h, down, down_bias, up, up_bias = inputs(7, dtype=dtype, parameters=torch.float32)
        given = h, down, down_bias, torch.zeros_like(up), torch.zeros_like(up_bias)
        assert torch.equal(add_bottleneck(*given, activation), h)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_keeps_the_input_and_the_narrow_product_and_nothing_else(activation: BottleneckActivation) -> None:
    given = inputs(2, 3, dtype=torch.bfloat16, parameters=torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(noting(unchanged, kept.append), unchanged):
        output = add_bottleneck(*given, activation)
    assert [tuple(tensor.shape) for tensor in kept] == [(2, 3, HIDDEN), (6, WIDTH)]
    assert kept[0] is given[0]
    assert output.grad_fn is not None
    held = [value for value in vars(output.grad_fn).values() if isinstance(value, Tensor)]
    assert all(any(value is parameter for parameter in given[1:]) for value in held)


def test_gradients_are_made_for_what_asks_for_them_alone() -> None:
    given = inputs(4)
    for asked in range(5):
        for place, tensor in enumerate(given):
            tensor.requires_grad_(place == asked)
        (found,) = torch.autograd.grad(add_bottleneck(*given, "silu").sum(), [given[asked]])
        (expected,) = torch.autograd.grad(formula(*given, "silu").sum(), [given[asked]])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_without_gradients_nothing_is_kept() -> None:
    kept: list[object] = []
    given = inputs(4)
    with KeptBy(kept.append, lambda kept: ()):
        with torch.no_grad():
            add_bottleneck(*given, "silu")
        assert kept == []
        add_bottleneck(*given, "silu")
        assert len(kept) == 1


def test_the_output_may_be_written_to_as_some_models_add_in_place() -> None:
    given = inputs(2, 3)
    output = add_bottleneck(*given, "relu")
    output += 1.0
    grads = torch.autograd.grad(output.sum(), given)
    expected = torch.autograd.grad(formula(*given, "relu").sum(), given)
    for found, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_it_runs_on_fake_tensors() -> None:
    with FakeTensorMode():
        h, *given = [torch.empty(shape, requires_grad=True) for shape in ((2, 3, 8), (4, 8), (4,), (8, 4), (8,))]
        output = functools.partial(add_bottleneck, activation="gelu")(h, *given)
        grads = torch.autograd.grad(output, [h, *given], torch.empty_like(output))
    assert output.shape == (2, 3, 8)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in (h, *given)]
