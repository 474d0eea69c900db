"""Promises of low-rank products: nothing of the rank is lost, exactly or by random projections."""

import pytest
import torch
from torch import Tensor

from qlora_trainer.adapters.arithmetic import low_rank
from qlora_trainer.adapters.arithmetic.low_rank import (
    balanced_factors,
    largest_singular,
    product_norm,
    product_singular,
)


def matrix(rows: int, columns: int, decay: float = 0.9) -> Tensor:
    """A matrix whose singular values fall by `decay`."""
    generator = torch.Generator().manual_seed(rows + columns)
    size = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, size, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, size, generator=generator)).Q
    return left * decay ** torch.arange(size) @ right.T


def best_error(values: Tensor, rank: int) -> Tensor:
    """What no product of the rank is nearer than (Eckart and Young)."""
    return torch.linalg.svdvals(values)[rank:].norm()


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
@pytest.mark.parametrize("is_exact", [True, False])
def test_no_product_of_the_rank_is_nearer(
    shape: tuple[int, int], is_exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_exact:
        monkeypatch.setattr(low_rank, "EXACT_SIDE", 1)
    values = matrix(*shape)
    A, B = balanced_factors(*largest_singular(values, 8, torch.Generator().manual_seed(0)))
    assert (A.shape, B.shape) == ((8, shape[1]), (shape[0], 8))
    best = best_error(values, 8)
    assert best <= (values - B @ A).norm() * (1 + 1e-5)
    assert (values - B @ A).norm() < best * (1.00001 if is_exact else 1.001)


def test_values_that_hardly_fall_are_approximated_nearly_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a quantization's error: there is little to find, and it is found."""
    monkeypatch.setattr(low_rank, "EXACT_SIDE", 1)
    values = torch.randn(256, 192, generator=torch.Generator().manual_seed(3))
    A, B = balanced_factors(*largest_singular(values, 8, torch.Generator().manual_seed(0)))
    assert (values - B @ A).norm() < 1.003 * best_error(values, 8)


def test_a_rank_beyond_the_sizes_gives_the_matrix() -> None:
    values = matrix(20, 12)
    A, B = balanced_factors(*largest_singular(values, 50, torch.Generator()))
    assert len(A) == 12
    torch.testing.assert_close(B @ A, values, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("inputs", "outputs", "total"), [(40, 30, 12), (8, 30, 12), (40, 8, 12)])
def test_a_product_is_decomposed_without_the_matrix(inputs: int, outputs: int, total: int) -> None:
    generator = torch.Generator().manual_seed(1)
    A, B = torch.randn(total, inputs, generator=generator), torch.randn(outputs, total, generator=generator)
    expected = torch.linalg.svdvals(B.double() @ A.double())
    _, s, _ = product_singular(A, B, 100)
    assert len(s) == min(inputs, outputs, total)
    torch.testing.assert_close(s.double(), expected[: len(s)], rtol=1e-6, atol=1e-6)
    first, last = balanced_factors(*product_singular(A, B, 4))
    error = (B.double() @ A.double() - last.double() @ first.double()).norm()
    assert error == pytest.approx(float(expected[4:].norm()), rel=1e-6)


def test_the_norm_of_a_product_is_that_of_the_matrix() -> None:
    generator = torch.Generator().manual_seed(1)
    A, B = torch.randn(5, 40, generator=generator), torch.randn(30, 5, generator=generator)
    assert product_norm(A, B) == pytest.approx(float((B.double() @ A.double()).norm()), rel=1e-12)
    both = torch.cat([A, A]), torch.cat([B, -B], dim=1)
    assert product_norm(*both) < 1e-6 * product_norm(A, B)
