"""Put the prepared data in numbers that a person wants before training: lengths, what an epoch is, what padding costs.

The counts of rows by reason come from preparation's own report; this module adds what follows from the lengths, and
puts both into words for whoever shows them, the terminal and the report page alike. Left out: drawing.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from qlora_trainer.common.units import counted
from qlora_trainer.data.batching.loader import StepLoader
from qlora_trainer.data.batching.packing import group_rows, laid_out_tokens
from qlora_trainer.data.preparation.reports import PreparationReport, SetReport, SourceReport, places_in_words

MOST_BINS = 12
TAIL_PERCENT = 2.0  # of the rows, the longest, share the last bin if they would span all others
STEPS_LAID_OUT = 500

Fact = tuple[str, str]  # what, and its value in words


@dataclass(frozen=True)
class Lengths:
    """Count rows by length: bin i those from edges[i] to edges[i + 1] - 1."""

    edges: list[int]  # (bins + 1,)
    train: list[int]  # (bins,)
    eval: list[int]  # (bins,)


@dataclass(frozen=True)
class Layout:
    """Report how the rows of an epoch's steps become micro-batches of at most `micro_batch_tokens` tokens."""

    micro_batches: float  # a step, on average
    fill: float  # of the tokens computed, the share that belongs to rows


@dataclass(frozen=True)
class Epoch:
    """Describe one pass over the training rows. The layouts are of its first `steps_laid_out` steps.

    `packing` says whether rows are packed: the config asks for it, and the model is not known to need padding.
    `can_pack` says whether the model's attention keeps packed rows apart, None where that is not known.
    `fill_of_whole_steps` is what the fill would be if all rows of a step were padded to its longest, as is common.
    """

    rows: int
    global_batch_size: int
    steps: int
    tokens_per_step: float
    micro_batch_tokens: int
    packing: bool  # whether rows are packed: the config asks for it, and the model is not known to need padding
    can_pack: bool | None  # whether the model's attention keeps packed rows apart; None: not known
    packed: Layout
    padded: Layout
    fill_of_whole_steps: float
    steps_laid_out: int


@dataclass(frozen=True)
class Overview:
    """Report the lengths of all rows, and an epoch of them."""

    lengths: Lengths
    epoch: Epoch

    def to_json(self) -> dict[str, Any]:
        """Write the overview as JSON types.

        Returns:
            Values by name.
        """
        return asdict(self)


def make_overview(
    loader: StepLoader,
    train_lengths: np.ndarray,  # (training rows,) tokens of each
    eval_lengths: np.ndarray,  # (eval rows,)
    can_pack: bool | None = True,
) -> Overview:
    """Put a run's rows in numbers, its first epoch laid out as the run will; takes some 50 microseconds a step.

    Args:
        loader: of the training rows.
        train_lengths: of the rows that `loader` takes from.
        eval_lengths: of the rows kept for evaluation.
        can_pack: whether the model's attention can keep packed rows apart; None where that is not known.

    Returns:
        Lengths, and what an epoch is.
    """
    order, steps = loader.order(0), loader.steps_per_epoch
    looked_at = min(steps, STEPS_LAID_OUT)
    rows_of_steps = [train_lengths[loader.rows_of_step(order, step)].tolist() for step in range(looked_at)]
    epoch = Epoch(
        rows=len(order),
        global_batch_size=loader.global_batch_size,
        steps=steps,
        tokens_per_step=float(train_lengths[order].sum()) / steps,
        micro_batch_tokens=loader.micro_batch_tokens,
        packing=loader.packing and can_pack is not False,
        can_pack=can_pack,
        packed=_layout(rows_of_steps, loader.micro_batch_tokens, packing=True),
        padded=_layout(rows_of_steps, loader.micro_batch_tokens, packing=False),
        fill_of_whole_steps=sum(map(sum, rows_of_steps)) / sum(laid_out_tokens(r, False) for r in rows_of_steps),
        steps_laid_out=looked_at,
    )
    return Overview(count_lengths(train_lengths, eval_lengths), epoch)


def _layout(steps: Sequence[Sequence[int]], limit: int, packing: bool) -> Layout:
    micro_batches = tokens = computed = 0
    for lengths in steps:
        for group in group_rows(lengths, limit, packing):
            of_rows = [lengths[index] for index in group]
            micro_batches += 1
            tokens += sum(of_rows)
            computed += laid_out_tokens(of_rows, packing)
    return Layout(micro_batches / len(steps), tokens / computed)


def count_lengths(train: np.ndarray, eval_set: np.ndarray) -> Lengths:
    """Count rows in bins of one round size; the last takes the longest few, however long.

    Args:
        train: tokens of each training row, (rows,).
        eval_set: tokens of each eval row, (rows,).

    Returns:
        Bins in which all rows are counted.
    """
    both = np.concatenate([train, eval_set])
    shortest, longest = int(both.min()), int(both.max())
    usual = int(np.percentile(both, 100 - TAIL_PERCENT, method="higher"))
    size = _round_size((usual + 1 - shortest) / (MOST_BINS - 1))
    first = shortest // size * size
    edges = list(range(first, usual + size + 1, size))
    edges = [edge for edge in edges if edge <= longest] + [longest + 1]
    return Lengths(edges, np.histogram(train, edges)[0].tolist(), np.histogram(eval_set, edges)[0].tolist())


def _round_size(raw: float) -> int:
    """Return the next of 1, 2, 5, 10, 20, 50, ... from `raw` on."""
    magnitude = 10 ** max(0, math.floor(math.log10(max(raw, 1))))
    return next(int(multiple * magnitude) for multiple in (1, 2, 5, 10) if multiple * magnitude >= raw)


def bin_labels(lengths: Lengths) -> list[str]:
    """Name each bin: 50-99, or one number.

    Args:
        lengths: the bins.

    Returns:
        One name a bin.
    """
    return [f"{begin:,}" if end - begin == 1 else f"{begin:,}-{end - 1:,}" for begin, end in pairwise(lengths.edges)]


def source_facts(source: SourceReport, max_length: int) -> list[Fact]:
    """Put into words what became of a source's rows.

    Args:
        source: the report.
        max_length: longest example, in tokens.

    Returns:
        Facts in the order to show them.
    """
    facts = [("rows read", f"{source.rows:,}"), ("rows used, or parts of them", f"{source.examples:,}")]
    for what, reasons in (("dropped", source.dropped), ("skipped", source.skipped)):
        for reason, count in reasons.items():
            places = source.places.get(reason, [])
            at = f": {places_in_words(places)}{', …' * (count > len(places))}" if places else ""
            facts.append((f"{what}: {reason}", f"{count:,}{at}"))
    if source.truncated:
        facts.append((f"cut to at most {counted(max_length, 'token')}", f"{source.truncated:,}"))
    if source.split:
        facts.append((f"split into parts of at most {counted(max_length, 'token')}", f"{source.split:,}"))
    if source.epoch != source.train:
        facts.append(("training rows an epoch takes", f"{source.epoch:,} of {source.train:,}"))
    return facts


def train_facts(report: PreparationReport, epoch: Epoch) -> list[Fact]:
    """Put the training rows into words, how many of them repeat others, and what an epoch of them is.

    Args:
        report: of preparation.
        epoch: from `make_overview`.

    Returns:
        Facts in the order to show them.
    """
    repeated = [("repeat an earlier row", report.train_duplicates)]
    if report.train_other_answers:
        repeated.append(("have an earlier row's prompt, with another answer", report.train_other_answers))
    facts = _set_facts(report.train, repeated)
    computed = epoch.packed if epoch.packing else epoch.padded
    facts.append(
        (
            "an epoch",
            f"{counted(epoch.steps, 'step')} of up to {counted(epoch.global_batch_size, 'row')}, about "
            f"{epoch.tokens_per_step:,.0f} tokens in "
            f"{computed.micro_batches:.1f} micro-batches of at most {epoch.micro_batch_tokens:,}",
        )
    )
    wasted = f"{1 - epoch.padded.fill:.0%} of what is computed"
    whole = f"{1 - epoch.fill_of_whole_steps:.0%}"
    if epoch.packing:
        known = "" if epoch.can_pack else ", if the model's attention can keep them apart, which training finds out"
        fill = (
            f"100%, as rows are packed{known}; padding would waste {wasted}, or {whole} with rows not sorted by length"
        )
    else:
        because = (
            "this model's attention cannot keep packed rows apart"
            if epoch.can_pack is False
            else "with data.packing=true nothing would be"
        )
        fill = f"{epoch.padded.fill:.0%}: padding wastes {wasted}; {because}"
    facts.append(("fill", fill))
    return facts


def eval_facts(report: PreparationReport) -> list[Fact]:
    """Put the eval rows into words, and how many of them training has too.

    Args:
        report: of preparation.

    Returns:
        Facts in the order to show them.
    """
    if report.eval.examples == 0:
        return [("rows", "none")]
    repeated = [("also in training", report.eval_duplicates)]
    if report.eval_other_answers:
        repeated.append(("have a prompt of training, with another answer", report.eval_other_answers))
    return _set_facts(report.eval, repeated)


def _set_facts(found: SetReport, repeated: Sequence[tuple[str, int]]) -> list[Fact]:
    return [
        ("rows", f"{found.examples:,}"),
        *[(name, f"{count:,}") for name, count in repeated],
        ("tokens", f"{found.tokens:,}, of which {found.trained_tokens / found.tokens:.1%} are trained"),
        ("tokens a row", f"shortest {found.shortest:,}, median {found.median:,}, longest {found.longest:,}"),
    ]
