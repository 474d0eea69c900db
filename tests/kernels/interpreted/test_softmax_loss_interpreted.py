"""The loss from logits, their gradient in place, interpreted: it errs no more against fp64 than plain torch does."""

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_support import between_guards

from qlora_kernels import softmax_loss_triton as module
from qlora_kernels.softmax_loss import softmax_loss_torch
from qlora_kernels.softmax_loss_triton import softmax_loss_triton

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SLACK = {torch.float32: 3e-7, torch.float16: 1e-5, torch.bfloat16: 1e-4}
"""Relative: exponentials and the hyperbolic tangent by another formula, where plain torch is lucky."""

Settings = tuple[Tensor | None, float | None, float]  # bias, softcap, logit_scale


def logits_of(tokens: int, vocabulary: int, dtype: torch.dtype, size: float = 4.0) -> Tensor:
    values = torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(0))
    return between_guards((size * values).to(dtype))


def targets_of(tokens: int, vocabulary: int) -> Tensor:
    """Among them the first and the last of the vocabulary."""
    targets = torch.randint(vocabulary, (tokens, 1), generator=torch.Generator().manual_seed(1))
    targets[0], targets[-1] = 0, vocabulary - 1
    return targets


def run(function: Any, logits: Tensor, targets: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """The losses, and what has become of the logits."""
    changed = between_guards(logits)
    return function(changed, targets, *settings, True), changed


def assert_errs_no_more(logits: Tensor, targets: Tensor, settings: Settings) -> None:
    bias, softcap, logit_scale = settings
    wide_bias = None if bias is None else bias.double()
    exact = run(softmax_loss_torch, logits.double(), targets, (wide_bias, softcap, logit_scale))
    found, plain = (run(function, logits, targets, settings) for function in (softmax_loss_triton, softmax_loss_torch))
    for mine, other, truth in zip(found, plain, exact, strict=True):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        error, allowed = ((value.double() - truth).norm() for value in (mine, other))
        assert error <= 1.02 * allowed + SLACK[logits.dtype] * truth.norm()


# One number; one token; an odd vocabulary; one of a block exactly, and of several blocks, the last of one column.
SHAPES = [(1, 1), (1, 7), (3, 101), (2, module.LOGITS_PER_TURN), (2, 2 * module.LOGITS_PER_TURN + 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("softcap", "logit_scale"), [(None, 1.0), (5.0, 1.0), (None, 0.3), (30.0, 1.7)])
@pytest.mark.parametrize(("tokens", "vocabulary"), SHAPES)
def test_loss_and_gradient(
    tokens: int, vocabulary: int, softcap: float | None, logit_scale: float, dtype: torch.dtype
) -> None:
    logits, targets = logits_of(tokens, vocabulary, dtype), targets_of(tokens, vocabulary)
    bias = between_guards(torch.randn(vocabulary, generator=torch.Generator().manual_seed(2)).to(dtype))
    for one in (None, bias):
        assert_errs_no_more(logits, targets, (one, softcap, logit_scale))


@pytest.mark.parametrize("softcap", [None, 3.0, 1e3])
def test_small_and_huge_logits(softcap: float | None) -> None:
    """Far below the soft cap a logit keeps its digits; of huge ones one probability is 1, and the others 0."""
    for size in (1e-4, 4.0, 1e3, 1e30):
        logits, targets = logits_of(3, 130, torch.float32, size), targets_of(3, 130)
        assert_errs_no_more(logits, targets, (None, softcap, 1.0))


def test_a_bias_of_another_dtype_is_added_in_fp32() -> None:
    logits, targets, bias = logits_of(2, 65, torch.bfloat16), targets_of(2, 65), torch.linspace(-1.0, 1.0, 65)
    assert_errs_no_more(logits, targets, (bias, None, 1.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_lie_apart_leave_what_is_between_them(dtype: torch.dtype) -> None:
    together, targets = logits_of(4, 37, dtype), targets_of(4, 37)
    memory = torch.full((4, 48), 7.0, dtype=dtype)
    apart = memory[:, :37].copy_(together)
    expected = softmax_loss_triton(together, targets, None, None, 1.0, True)
    assert torch.equal(softmax_loss_triton(apart, targets, None, None, 1.0, True), expected)
    assert torch.equal(apart, together)
    assert (memory[:, 37:] == 7.0).all()


def test_the_loss_alone_is_the_loss_with_gradient() -> None:
    logits, targets = logits_of(3, 4099, torch.bfloat16), targets_of(3, 4099)
    kept = logits.clone()
    alone = softmax_loss_triton(kept, targets, None, None, 1.0, False)
    assert torch.equal(kept, logits), "what is not needed is not written"
    assert torch.equal(alone, softmax_loss_triton(logits, targets, None, None, 1.0, True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 5, 4098])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_gives_no_finite_loss(bad: float, place: int, dtype: torch.dtype) -> None:
    """Of its own token alone; and no finite gradient."""
    logits, targets = logits_of(3, 4099, dtype), torch.full((3, 1), 5)
    logits[1, place] = bad
    losses = softmax_loss_triton(logits, targets, None, None, 1.0, True)
    assert losses.isfinite().squeeze(1).tolist() == [True, False, True]
    assert not logits[1].isfinite().any()
    assert logits[::2].isfinite().all()


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_nan_passes_through_a_soft_cap(softcap: float | None) -> None:
    logits = logits_of(1, 9, torch.float32)
    logits[0, 3] = float("nan")
    assert softmax_loss_triton(logits, torch.zeros(1, 1, dtype=torch.int64), None, softcap, 1.0, True).isnan().all()
    assert logits.isnan().all()


def test_columns_that_are_masked_by_negative_infinity_have_no_probability() -> None:
    """As of a bias for rows of the vocabulary that no token has; of all of them there is no loss."""
    logits, targets = logits_of(2, 70, torch.float32), torch.full((2, 1), 3)
    bias = torch.zeros(70)
    bias[64:] = -torch.inf
    assert_errs_no_more(logits, targets, (bias, None, 1.0))
    _, gradient = run(softmax_loss_triton, logits, targets, (bias, None, 1.0))
    assert (gradient[:, 64:] == 0).all()
    nothing = torch.full((1, 70), -torch.inf)
    assert not softmax_loss_triton(nothing, targets[:1], None, None, 1.0, True).isfinite().any()


@pytest.mark.parametrize("label", [-1, 70, 2**40])
def test_a_label_outside_the_vocabulary_has_no_finite_loss(label: int) -> None:
    logits = logits_of(1, 70, torch.bfloat16)
    assert softmax_loss_triton(logits, torch.tensor([[label]]), None, None, 1.0, True).isnan().all()


def test_no_token_at_all_and_fp64() -> None:
    nothing = softmax_loss_triton(torch.empty(0, 70), torch.empty(0, 1, dtype=torch.int64), None, None, 1.0, True)
    assert nothing.shape == (0, 1)
    logits, targets = logits_of(2, 70, torch.float64), targets_of(2, 70)
    expected = run(softmax_loss_torch, logits, targets, (None, 2.0, 1.0))
    assert all(map(torch.equal, run(softmax_loss_triton, logits, targets, (None, 2.0, 1.0)), expected))
