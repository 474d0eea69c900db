"""Promises of the comparison of logits: the definition's numbers, however the vocabulary is cut."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_kernels.head_rows import DenseRows
from qlora_trainer.merging import logits as logit_comparison
from qlora_trainer.merging.logits import HeadLogits, WholeLogits, compare_logits
from qlora_trainer.merging.verify import row_logits
from qlora_trainer.model.forward import LossPath, find_loss_path
from qlora_trainer.model.load import load_dense_model
from qlora_trainer.weights.model_directory import ModelDirectory


def whole(values: Tensor) -> WholeLogits:
    return WholeLogits(values)


def test_logit_difference_is_what_it_says() -> None:
    reference, merged = torch.tensor([[0.0, 0.0], [3.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0], [3.0, 4.0]])
    found = compare_logits(whole(reference), whole(merged))
    p = 1.0 / (1.0 + math.exp(-3.0))  # softmax of (3, 0); the merged (3, 4) gives 1 / (1 + e)
    q = 1.0 / (1.0 + math.e)
    first = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    second = p * math.log(p / q) + (1.0 - p) * math.log((1.0 - p) / (1.0 - q))
    assert found.kl == pytest.approx((first + second) / 2.0, rel=1e-6)
    assert found.relative_error == pytest.approx(math.sqrt(math.log(3.0) ** 2 + 16.0) / 3.0, rel=1e-6)
    assert (found.top1_agreement, found.tokens) == (0.5, 2)


@pytest.mark.parametrize("columns", [1, 7, 100])
@pytest.mark.parametrize("size", [1.0, 300.0])
def test_blocks_of_the_vocabulary_give_the_numbers_of_the_whole(
    columns: int, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large logits too, whose exponentials overflow, and whose largest lies in any block."""
    generator = torch.Generator().manual_seed(0)
    reference = size * torch.randn(40, 100, generator=generator, dtype=torch.float64)
    merged = reference + 0.5 * torch.randn(40, 100, generator=generator, dtype=torch.float64)
    log_p, log_q = reference.log_softmax(-1), merged.log_softmax(-1)
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    agreement = float((reference.argmax(-1) == merged.argmax(-1)).double().mean())
    assert agreement > 0.0
    monkeypatch.setattr(logit_comparison, "BLOCK_LOGITS", 40 * columns)
    found = compare_logits(whole(reference), whole(merged))
    assert found.kl == pytest.approx(kl, rel=1e-9, abs=1e-12)
    assert found.top1_agreement == agreement
    assert found.relative_error == pytest.approx(float((merged - reference).norm() / reference.norm()), rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 63, 127])
def test_a_logit_that_is_not_finite_gives_no_finite_difference(
    value: float, column: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logit_comparison, "BLOCK_LOGITS", 4 * 16)
    reference = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    spoiled = reference.clone()
    spoiled[2, column] = value
    for pair in ((reference, spoiled), (spoiled, reference), (spoiled, spoiled)):
        assert not math.isfinite(compare_logits(*map(whole, pair)).kl)


def test_logits_of_hidden_are_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head, bias = (torch.randn(*shape, generator=generator) for shape in ((5, 8), (30, 8), (30,)))
    made = HeadLogits(hidden, DenseRows(head), bias, logit_scale=0.25, softcap=2.0)
    expected = 2.0 * torch.tanh(0.25 * (hidden @ head.T + bias) / 2.0)
    assert made.shape == (5, 30)
    found = torch.cat([made.columns(slice(start, start + 10)) for start in (0, 10, 20)], dim=1)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_of_a_large_head_few_rows_are_made_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded by rows x hidden size, whatever is asked for, with the same logits."""
    monkeypatch.setattr(logit_comparison, "BLOCK_ELEMENTS", 8 * 100)
    made: list[int] = []

    class Counted(DenseRows):
        def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
            made.append(stop - start)
            return super().rows(start, stop, dtype)

    generator = torch.Generator().manual_seed(0)
    for hidden_size in (8, 80):
        hidden, head = torch.randn(3, hidden_size, generator=generator), torch.randn(777, hidden_size)
        found = HeadLogits(hidden, Counted(head))
        assert torch.allclose(found.columns(slice(5, 777)), hidden @ head[5:].T, rtol=1e-5, atol=1e-5)
        assert compare_logits(whole(hidden @ head.T), found).relative_error < 1e-6
        assert max(made) == 800 // hidden_size
        assert sum(made) == 772 + 777
        made.clear()


ROWS = [list(range(5, 60)), [3, 1, 4, 1, 5, 9, 2, 6], list(range(100, 20, -1))]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("known", [True, False])
def test_row_logits_are_the_models_own_logits(family: str, known: bool, tiny_models: Callable[[str], Path]) -> None:
    """By the formula where it is the model's, and by the model itself where it says so, or the formula is wrong."""
    model = load_dense_model(ModelDirectory.open(tiny_models(family)), torch.device("cpu"))
    with torch.no_grad():
        expected = torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in ROWS])
    path = find_loss_path(model)
    assert not path.own_logits
    wrong = LossPath(logit_scale=2.0)
    for used in [path] if known else [wrong, LossPath(own_logits=True)]:
        made = row_logits(model, ROWS, used)
        assert isinstance(made, HeadLogits) == known
        found = made.columns(slice(0, made.shape[1]))
        assert float((found - expected).norm() / expected.norm()) < 1e-6
