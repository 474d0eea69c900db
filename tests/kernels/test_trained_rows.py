"""Rows of a frozen head that train: the loss and gradients of the whole matrix with them in it."""

from typing import Any

import pytest
import torch
from plain_losses import Quantized, plain_loss
from random_tensors import normal64
from torch import Tensor

from qlora_kernels.card import Card, planned_for
from qlora_kernels.head_rows import DenseRows, HeadRows, TrainedRows
from qlora_kernels.int8 import quantize_int8
from qlora_kernels.linear_cross_entropy import linear_cross_entropy
from qlora_kernels.nf4 import quantize_nf4

TOKENS, WIDTH, VOCABULARY = 37, 64, 101
IDS = {"in it": [3, 64, 100], "in it and after": [0, 64, 101, 102], "after": [101]}
OPTIONS: list[dict[str, float]] = [{}, {"softcap": 2.5}, {"softcap": 4.0, "logit_scale": 1.7}]


def problem(ids: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (T, H), head (V, H), values (R, H), labels (T,) of all tokens, of which a third are -100."""
    height = max(VOCABULARY, ids[-1] + 1)
    labels = torch.randint(height, (TOKENS,), generator=torch.Generator().manual_seed(3))
    labels[1 : len(ids) + 1] = torch.tensor(ids)
    labels[::3] = -100
    hidden, head = normal64(TOKENS, WIDTH, seed=0) / 8, normal64(VOCABULARY, WIDTH, seed=1)
    values = normal64(len(ids), WIDTH, seed=2)
    return hidden.to(dtype).requires_grad_(), head.to(dtype), values.requires_grad_(), labels


def rows_of(frozen: HeadRows, values: Tensor, ids: list[int]) -> TrainedRows:
    return TrainedRows(frozen, values, torch.tensor(ids), max(VOCABULARY, ids[-1] + 1))


def assembled(head: Tensor, values: Tensor, ids: list[int]) -> Tensor:
    """The whole matrix, by indexing alone."""
    whole = torch.zeros(max(VOCABULARY, ids[-1] + 1), WIDTH, dtype=head.dtype)
    whole[:VOCABULARY] = head
    return whole.index_put((torch.tensor(ids),), values.to(head.dtype))


def gradients(loss: Tensor, *of: Tensor, incoming: float = 0.7) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss * incoming, of)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk_tokens", [1, 7, 512])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_loss_and_gradients_are_those_of_the_whole_matrix(
    ids: list[int], chunk_tokens: int, options: dict[str, Any]
) -> None:
    hidden, head, values, labels = problem(ids)
    wanted = plain_loss(hidden, assembled(head, values, ids), labels, **options)
    rows = rows_of(DenseRows(head), values, ids)
    found = linear_cross_entropy(hidden, rows, labels, chunk_tokens=chunk_tokens, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)
    for ours, theirs in zip(gradients(found, hidden, values), gradients(wanted, hidden, values), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, rows, labels, chunk_tokens=chunk_tokens, **options), found)


def test_the_gradient_of_the_rows_is_right_in_fp64() -> None:
    ids = IDS["in it and after"]
    hidden, head, values, labels = problem(ids)

    def loss(hidden: Tensor, values: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, rows_of(DenseRows(head), values, ids), labels, chunk_tokens=7, softcap=3.0)

    found = torch.autograd.grad(loss(hidden, values), (hidden, values))
    for index, gradient in enumerate(found):  # backward can be called once, so gradcheck cannot be asked
        step = 1e-5 * normal64(*gradient.shape, seed=5)
        with torch.no_grad():
            above, below = (
                loss(*(each + sign * step if place == index else each for place, each in enumerate((hidden, values))))
                for sign in (1, -1)
            )
        torch.testing.assert_close((gradient * step).sum() * 2, above - below, rtol=1e-7, atol=0)


@pytest.mark.parametrize("on_card", [False, True], ids=["cpu", "card"])
@pytest.mark.parametrize("held", ["dense", "nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids", [IDS["in it"], IDS["in it and after"]], ids=["in it", "in it and after"])
def test_heads_in_any_form_err_little_more_than_plain_torch(
    ids: list[int], dtype: torch.dtype, held: str, on_card: bool
) -> None:
    hidden, head, values, labels = problem(ids, dtype)
    values = values.detach().float().requires_grad_()
    frozen: HeadRows = DenseRows(head)
    if held != "dense":
        frozen = Quantized(quantize_nf4(head.float()) if held == "nf4" else quantize_int8(head.float()))
    whole = frozen.rows(0, VOCABULARY, dtype)

    def plain(hidden: Tensor, values: Tensor) -> Tensor:
        logits = hidden @ assembled(whole, values, ids).T
        return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")

    with planned_for(Card((8, 0), 128) if on_card else None):
        found = linear_cross_entropy(hidden, rows_of(frozen, values, ids), labels, chunk_tokens=7)
        ours = gradients(found, hidden, values, incoming=1.0)  # any other is rounded once more
    theirs = gradients(plain(hidden, values), hidden, values, incoming=1.0)
    exact_inputs = [each.detach().double().requires_grad_() for each in (hidden, values.to(dtype))]
    exact_loss = plain_loss(exact_inputs[0], assembled(whole.double(), exact_inputs[1], ids), labels)
    exact = gradients(exact_loss, *exact_inputs, incoming=1.0)
    assert torch.isclose(found.double(), exact_loss, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6)
    # The gradient of hidden states is a sum of two products, of frozen rows and of those that train: each is rounded,
    # and may be larger than the sum.
    for our, their, right, most in zip(ours, theirs, exact, (2.0, 1.1), strict=True):
        error, usual = (our.double() - right).norm(), (their.double() - right).norm()
        assert error <= most * usual + 1e-6 * right.norm()


def test_rows_are_those_of_the_whole_matrix_wherever_they_are_cut() -> None:
    ids = IDS["in it and after"]
    _, head, values, _ = problem(ids)
    rows, whole = rows_of(DenseRows(head), values.detach(), ids), assembled(head, values.detach(), ids)
    assert rows.shape == whole.shape == (103, WIDTH)
    for start, stop in ((0, 103), (0, 1), (1, 64), (64, 65), (90, 102), (101, 103), (5, 5)):
        assert torch.equal(rows.rows(start, stop, torch.float64), whole[start:stop])
