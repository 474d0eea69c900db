"""The norms of an adapted weight's rows: those of the whole matrix in fp64, from blocks of it, and at the worst."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from random_tensors import normal, normal64
from spying import TensorSizes
from torch import Tensor

from qlora_kernels import dora
from qlora_kernels.dora import dora_norms, squared_row_norms
from qlora_kernels.nf4 import NF4Weight, dequantize_nf4, quantize_nf4
from qlora_kernels.torch_internals import FakeTensorMode

SCALING = 1.7
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
O, I, R = 200, 320, 8  # noqa: E741


def quantized() -> NF4Weight:
    return quantize_nf4(normal(O, I) / I**0.5)


def explicit(dense: Tensor, A: Tensor, B: Tensor, scaling: float = SCALING) -> Tensor:
    return torch.linalg.norm(dense.double() + scaling * B.double() @ A.double(), dim=1)


def adapter() -> tuple[Tensor, Tensor]:
    return normal(R, I, seed=3) / I**0.5, normal(O, R, seed=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at_once", [1, 1000, 1 << 22])
@pytest.mark.parametrize("is_dense", [False, True])
def test_norms_are_those_of_the_whole_matrix(
    dtype: torch.dtype, at_once: int, is_dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the weight as the layer's products have it, rounded to their dtype."""
    monkeypatch.setattr(dora, "CAST_AT_ONCE", at_once)
    weight, (A, B) = quantized(), adapter()
    dense = dequantize_nf4(weight, dtype)
    given = dequantize_nf4(weight, torch.float32) if is_dense else weight
    squares = squared_row_norms(given, dtype)
    assert squares.dtype == torch.float32
    torch.testing.assert_close(squares.double(), dense.double().square().sum(1), rtol=1e-6, atol=0.0)
    found = dora_norms(given, squares, A, B, SCALING, dtype)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), explicit(dense, A, B), rtol=2e-6, atol=0.0)


def test_an_adapter_that_is_zero_leaves_the_weights_own_norms() -> None:
    weight, (A, B) = quantized(), adapter()
    squares = squared_row_norms(weight, torch.float32)
    found = dora_norms(weight, squares, A, torch.zeros_like(B), SCALING, torch.float32)
    assert torch.equal(found, squares.double().sqrt().float())


@pytest.mark.parametrize("rows", [1, 64, 130, 500])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_workspace_of_any_size_gives_the_same_norms(rows: int, dtype: torch.dtype) -> None:
    weight, (A, B) = quantized(), adapter()
    roomy = replace(weight, workspace=torch.full((rows * I,), torch.nan, dtype=dtype))
    found = dora_norms(roomy, squared_row_norms(roomy, dtype), A, B, SCALING, dtype)
    expected = explicit(dequantize_nf4(weight, dtype), A, B)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("left", [0.5, 0.1, 0.03, 0.0])
def test_norms_hold_what_is_said_where_the_adapter_cancels_the_weight(left: float) -> None:
    """A weight of rank R and an adapter of which s B A is -W, but for a part orthogonal to it of `left` times S."""
    A = torch.linalg.qr(normal64(I, R))[0].T.float()
    B = normal64(O, R, seed=4).float()
    rest = torch.linalg.qr(torch.cat([A.double().T, normal64(I, 1, seed=5)], 1))[0][:, -1]
    products = SCALING * B.double().abs() @ A.double().norm(dim=1)  # of each row
    delta = SCALING * B.double() @ A.double()
    size = delta.norm(dim=1) + products  # S, nearly
    dense = (left * size[:, None] * rest - delta).float()
    truth, S = explicit(dense, A, B), dense.double().norm(dim=1) + products
    found = dora_norms(dense, squared_row_norms(dense, torch.float32), A, B, SCALING, torch.float32).double()
    assert bool(found.isfinite().all())
    assert bool(((found.square() - truth.square()).abs() <= 1e-6 * S.square()).all())
    error = ((found - truth).abs() / truth).max()
    assert float(error) < {0.5: 4e-6, 0.1: 1e-3, 0.03: 1e-3, 0.0: torch.inf}[left]
    assert bool((found <= 1e-3 * S + truth * 1.001).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_the_weights_size_is_made(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dora, "CAST_AT_ONCE", 16 * I)
    weight, (A, B) = quantized(), adapter()
    weight = replace(weight, workspace=torch.empty(O * I, dtype=dtype))
    whole = weight.whole_block
    assert whole is not None
    with TensorSizes() as made:
        dora_norms(weight, squared_row_norms(weight, dtype), A, B, SCALING, dtype)
    assert max(made.sizes) <= 16 * I


def test_norms_have_no_gradient() -> None:
    weight, (A, B) = quantized(), adapter()
    A.requires_grad_()
    B.requires_grad_()
    squares = squared_row_norms(weight, torch.float32)
    assert not dora_norms(weight, squares, A, B, SCALING, torch.float32).requires_grad


def test_norms_are_planned_on_fake_tensors() -> None:
    weight, (A, B) = quantized(), adapter()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fields: Any = {
            name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            for name, value in vars(weight).items()
            if isinstance(value, Tensor)
        }
        fake = replace(weight, **fields, workspace=torch.empty(130 * I, dtype=torch.bfloat16))
        squares = squared_row_norms(fake, torch.bfloat16)
        found = dora_norms(fake, squares, torch.empty(A.shape), torch.empty(B.shape), SCALING, torch.bfloat16)
    assert found.shape == squares.shape == (O,)
    assert found.dtype == squares.dtype == torch.float32
