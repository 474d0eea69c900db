"""The kernels between the matrix products, interpreted: they err no more against fp64 than plain torch does."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton_support import between_guards

from qlora_kernels import gated, rms_norm, rotary
from qlora_kernels.gated_triton import gradients_triton, product_triton
from qlora_kernels.rms_norm_triton import backward_triton, normalize_triton
from qlora_kernels.rotary_triton import rotate_triton

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SLACK = {torch.float32: 2e-7, torch.float16: 1e-5, torch.bfloat16: 1e-4}
"""Relative: sums in another order, and exponentials by another formula, can differ so where plain torch is lucky."""


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return between_guards(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def assert_errs_no_more(
    kernel: Callable[..., Sequence[Tensor]], plain: Callable[..., Sequence[Tensor]], *inputs: Tensor
) -> None:
    """Both are given the inputs, plain torch in fp64 too."""
    found, expected = kernel(*inputs), plain(*inputs)
    exact = plain(*(tensor.double() for tensor in inputs))
    for mine, other, truth in zip(found, expected, exact, strict=True):
        assert (mine.dtype, mine.shape, mine.stride()) == (other.dtype, other.shape, other.stride())
        error, allowed = ((value.double() - truth).norm() for value in (mine, other))
        assert error <= 1.02 * allowed + SLACK[inputs[0].dtype] * truth.norm()


# Rows and features: one, odd ones, several rows a program and the last program not full, a head's, more than 4,096.
ROWS = [(1, 1), (3, 65), (70, 64), (5, 5000)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["scale_after_cast", "scale_before_cast", "weight_before_cast"])
@pytest.mark.parametrize(("rows", "features"), ROWS)
def test_norm_and_its_gradient(rows: int, features: int, form: rms_norm.Form, dtype: torch.dtype) -> None:
    x, weight = 3.0 * normal(rows, features, dtype=dtype), normal(features, seed=1, dtype=dtype)
    assert_errs_no_more(
        lambda x, weight: normalize_triton(x, weight, 1e-5, form),
        lambda x, weight: rms_norm.normalize_torch(x, weight, 1e-5, form),
        x,
        weight,
    )
    _, inverse = rms_norm.normalize_torch(x, weight, 1e-5, form)
    assert_errs_no_more(
        lambda grad, x, weight: [backward_triton(grad, x, inverse, weight, form)],
        lambda grad, x, weight: [rms_norm.backward_torch(grad, x, inverse.to(_wide(x)), weight, form)],
        normal(rows, features, seed=2, dtype=dtype),
        x,
        weight,
    )


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def test_norm_of_rows_that_lie_apart_or_of_none() -> None:
    x, weight = normal(7, 130)[:, :64], normal(64, seed=1)
    for rows in (x, x.T.contiguous().T, x[:0], normal(2, 3, 64), normal(2, 64, 3).transpose(1, 2), normal(2, 0, 64)):
        apart = normalize_triton(rows, weight, 1e-5, "scale_after_cast")
        together = normalize_triton(rows.clone(), weight, 1e-5, "scale_after_cast")
        assert all(torch.equal(one, other) for one, other in zip(apart, together, strict=True))
        again = backward_triton(rows, rows, apart[1], weight, "scale_after_cast")
        assert torch.equal(
            again,
            backward_triton(rows.clone(), rows.clone(), apart[1], weight, "scale_after_cast"),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", gated.ACTIVATION_NAMES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 65), (2, 2050), (0, 8)])
def test_gated_product_and_its_gradients(shape: tuple[int, ...], activation: gated.Name, dtype: torch.dtype) -> None:
    gate, up = 3.0 * normal(*shape, dtype=dtype), normal(*shape, seed=1, dtype=dtype)
    assert_errs_no_more(
        lambda gate, up: [product_triton(gate, up, activation)],
        lambda gate, up: [gated.product_torch(gate, up, activation)],
        gate,
        up,
    )

    def both(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
        def gradients(grad: Tensor, gate: Tensor, up: Tensor) -> list[Tensor]:
            changed = grad.clone()
            return [function(changed, gate, up, activation), changed]

        return gradients

    grad = normal(*shape, seed=2, dtype=dtype)
    assert_errs_no_more(both(gradients_triton), both(gated.gradients_torch), grad, gate, up)


def test_gated_product_of_halves_of_one_tensor() -> None:
    gate, up = normal(3, 4, 90).chunk(2, dim=-1)
    found = product_triton(gate, up, "silu")
    assert torch.equal(found, product_triton(gate.contiguous(), up.contiguous(), "silu"))
    grads = [gradients_triton(torch.ones(3, 4, 45), *pair, "silu") for pair in ((gate, up), (gate.clone(), up))]
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "heads", "tokens", "size"), [(1, 1, 1, 2), (2, 3, 37, 16), (1, 5, 7, 80)])
def test_rotary_embedding_and_its_gradient(
    rows: int, heads: int, tokens: int, size: int, transposed: bool, dtype: torch.dtype
) -> None:
    for tables in {1, rows}:
        assert_errs_no_more(
            lambda x, cos, sin: [rotate_triton(x, cos, sin, transposed)],
            lambda x, cos, sin: [rotary.rotate_torch(x, cos, sin, transposed)],
            normal(rows, tokens, heads, size, dtype=dtype).transpose(1, 2),  # as a projection lays heads out
            normal(tables, tokens, size, seed=1, dtype=dtype),
            normal(tables, tokens, size, seed=2, dtype=dtype),
        )


def test_rotary_embedding_of_heads_that_lie_apart_or_of_none() -> None:
    cos, sin = normal(1, 5, 16, seed=1), normal(1, 5, 16, seed=2)
    fused = normal(2, 5, 4, 16)[:, :, :3].transpose(1, 2)  # part of a fused projection
    for x in (fused, fused.contiguous(), fused[:, :0]):
        assert torch.equal(rotate_triton(x, cos, sin, False), rotate_triton(x.clone(), cos, sin, False))
    slow = cos.mT.contiguous().mT
    assert torch.equal(rotate_triton(fused, slow, sin, True), rotate_triton(fused, cos, sin, True))


def test_rotary_embedding_reaches_heads_above_2_to_the_31_elements(tmp_path: Path) -> None:
    """The last of three heads begins there, each stride fits 32 bits; a sparse file represents the memory between."""
    stride, tokens, size = 2**30 + 64, 2, 16
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2 * (2 * stride + tokens * size))
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * stride + tokens * size, dtype=torch.half)
    far = memory.as_strided((1, 3, tokens, size), (0, stride, size, 1))
    near = normal(1, 3, tokens, size, dtype=torch.half)
    far.copy_(near)
    cos, sin = (normal(1, tokens, size, seed=seed, dtype=torch.half) for seed in (1, 2))
    assert torch.equal(rotate_triton(far, cos, sin, False), rotate_triton(near, cos, sin, False))
