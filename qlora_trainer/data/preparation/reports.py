"""Count what became of the rows: by source, by set, and what is found twice.

Every row read is in one of these counts. Left out: showing them (cli), and counting while rows are read (prepare.py).
"""

import datetime
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from qlora_trainer.common.units import counted
from qlora_trainer.data.preparation.store import SKIPPED_NAME, ExampleSet
from qlora_trainer.data.reading.values import shortened

MAX_REASONS = 100  # different reasons counted apart; what comes after counts as OTHER_REASONS
OTHER_REASONS = "other reasons"
_MOST_NAMED = 5  # columns, or control tokens, in one line
_MOST_PLACES = 3  # of rows, for each reason
_MOST_NOTES = 5  # of one source
_NUMBER = r"\b(0x[0-9a-f]+|\d+)\b"


@dataclass
class SourceReport:
    """Report what became of one source's rows. Rows read are those used, dropped and skipped.

    `places` has the first places of each reason for which rows were dropped or skipped; `spelled` counts the rows whose
    own text spells a control token, by token. `examples` are in both sets; `train` and `eval` say how many are where,
    and `epoch` how many training examples an epoch takes, which is more than `train` where the source is repeated.
    """

    name: str
    rows: int = 0
    examples: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    split: int = 0
    unused_columns: dict[str, int] = field(default_factory=dict)
    warnings: dict[str, int] = field(default_factory=dict)
    spelled: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # on how its files were read
    train: int = 0
    eval: int = 0
    epoch: int = 0


@dataclass(frozen=True)
class SetReport:
    """Report one set in numbers; lengths in tokens."""

    examples: int
    tokens: int
    trained_tokens: int
    shortest: int
    median: int
    longest: int


@dataclass(frozen=True)
class PreparationReport:
    """Report what preparation did.

    `train_duplicates` counts examples that repeat an earlier one of training, `eval_duplicates` eval examples that
    training also has, token for token. `train_other_answers` and `eval_other_answers` count, of the rest, those whose
    prompt (all that is before the last answer) training has with another answer.
    """

    sources: list[SourceReport]
    train: SetReport
    eval: SetReport
    epoch_examples: int
    train_duplicates: int
    eval_duplicates: int
    train_other_answers: int
    eval_other_answers: int
    max_length: int
    warnings: list[str]
    skipped_rows: str | None  # the file in the cache that lists them
    cached: bool

    def to_json(self) -> dict[str, Any]:
        """Write the report as JSON types.

        Returns:
            Values by name.
        """
        return asdict(self)


def set_report(examples: ExampleSet) -> SetReport:
    """Count a set's examples and tokens.

    Args:
        examples: the set.

    Returns:
        Zeros for an empty one.
    """
    if len(examples) == 0:
        return SetReport(0, 0, 0, 0, 0, 0)
    lengths = examples.lengths
    return SetReport(
        examples=len(examples),
        tokens=int(lengths.sum()),
        trained_tokens=int(examples.trained_counts.sum()),
        shortest=int(lengths.min()),
        median=int(np.median(lengths)),
        longest=int(lengths.max()),
    )


def train_repeats(train: ExampleSet) -> tuple[int, int]:
    """Count the examples that repeat an earlier one, and the others that have an earlier one's prompt.

    Args:
        train: the training set.

    Returns:
        Both counts.
    """
    digests, prompts = train.digests, train.prompt_digests
    with_prompt = _count_different(digests[prompts != 0])  # equal examples have equal prompts
    return len(train) - _count_different(digests), with_prompt - _count_different(prompts[prompts != 0])


def eval_repeats(eval_set: ExampleSet, train: ExampleSet) -> tuple[int, int]:
    """Count the eval examples that training also has, and the others that have a prompt that training has.

    Args:
        eval_set: the eval set.
        train: the training set.

    Returns:
        Both counts.
    """
    also = _are_among(eval_set.digests, train.digests)
    prompts = eval_set.prompt_digests[~also]
    return int(also.sum()), int(_are_among(prompts[prompts != 0], train.prompt_digests).sum())


# Numpy's own unique and isin take 0.9 s for a million hashes, sorting them 0.06 s.
def _count_different(values: np.ndarray) -> int:
    return len(values) and 1 + int(np.count_nonzero(np.diff(np.sort(values))))


def _are_among(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Find which of (n,) values are among known ones, (n,) bool."""
    if not len(values) or not len(known):
        return np.zeros(len(values), dtype=np.bool_)
    known = np.sort(known)
    return known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values


def repeat_warnings(train_repeats: int, eval_repeats: int, eval_examples: int) -> list[str]:
    """Put exact repeats into words. Other answers to a known prompt are common and often meant: the report has them.

    Args:
        train_repeats: how many training rows repeat an earlier one.
        eval_repeats: how many eval rows training also has.
        eval_examples: how many there are.

    Returns:
        Sentences, none where nothing repeats.
    """
    lines = []
    if eval_repeats:
        lines.append(
            f"{eval_repeats:,} of {counted(eval_examples, 'eval row')} {'is' if eval_repeats == 1 else 'are'} "
            f"in training too, token for token: the "
            "eval loss is better than it would be on unseen rows"
        )
    if train_repeats:
        lines.append(
            f"{counted(train_repeats, 'training row repeats', 'training rows repeat')} an earlier one, token for token"
        )
    return lines


def source_warnings(sources: Sequence[SourceReport]) -> list[str]:
    """Put into words what is worth knowing of each source's rows.

    Args:
        sources: the reports.

    Returns:
        Sentences.
    """
    lines = []
    for source in sources:
        lines += source.notes[:_MOST_NOTES]
        if len(source.notes) > _MOST_NOTES:
            lines.append(
                f"{source.name}: "
                f"{counted(len(source.notes) - _MOST_NOTES, 'more of its files has', 'more of its files have')} "
                f"such notes"
            )
        lines += [
            f"{source.name}: {count:,} of {counted(source.rows, 'row')}: {text}"
            for text, count in source.warnings.items()
        ]
        lines += [
            f"{source.name}: {count:,} of {counted(source.rows, 'row')} {'is' if count == 1 else 'are'} left "
            f"out: {reason}{_at(source, reason)}"
            for reason, count in source.dropped.items()
        ]
        if source.spelled:
            (token, count), *others = source.spelled.items()
            more = shortened([f"{number} of {other}" for other, number in others], _MOST_NAMED - 1)
            lines.append(
                f"{source.name}: {count} of {counted(source.rows, 'row')} {'holds' if count == 1 else 'hold'} "
                f"the spelling of {token}{f', {more}' * bool(others)}; it is read as text, not as the control token"
            )
        if source.unused_columns:
            lines.append(f"{source.name}: not used: {shortened(source.unused_columns, _MOST_NAMED)}")
    return lines


def _at(source: SourceReport, reason: str) -> str:
    places = source.places.get(reason, [])
    more = "" if source.dropped[reason] <= len(places) else ", …"
    return f" ({places_in_words(places)}{more})" if places else ""


def add_place(places: dict[str, list[str]], reason: str, where: str) -> None:
    """Remember the first places of a reason.

    Args:
        places: by reason.
        reason: why a row is not used.
        where: the row's file and line.
    """
    known = places.setdefault(reason, [])
    if len(known) < _MOST_PLACES:
        known.append(where.rpartition(", ")[2])


def count_reasons(
    counts: Counter[str], skipped: Iterable[tuple[str, str]], places: dict[str, list[str]] | None = None
) -> None:
    """Count skipped rows by what is wrong, without what differs from row to row: place, numbers, what is quoted.

    Args:
        counts: added to, by reason.
        skipped: (where, reason) of each row.
        places: gets the first places of each reason.
    """
    for where, reason in skipped:
        text = reason.removeprefix(where)
        text = text.partition(": ")[2] if text[:1] in (",", ":") else text
        text = re.sub(r"'[^']*'|\"[^\"]*\"", "…", text.partition(". ")[0].removesuffix("."))
        text = re.sub(rf" \((byte )?{_NUMBER}\)", "", text)
        kind = re.sub(rf"(?<![A-Za-z]-){_NUMBER}", "…", text)[:200]  # but not that of UTF-8
        kind = kind if kind in counts or len(counts) < MAX_REASONS else OTHER_REASONS
        counts[kind] += 1
        if places is not None:
            add_place(places, kind, where)


def places_in_words(places: Sequence[str]) -> str:
    """List places, the word line or row once.

    Args:
        places: such as "line 3", or with a file before.

    Returns:
        Such as "lines 3, 7, 12".
    """
    cut = [place.rpartition(", ")[2].partition(" ") for place in places[:_MOST_PLACES]]
    words = {word for word, _, _ in cut}
    more = ", …" if len(places) > _MOST_PLACES else ""
    if len(cut) > 1 and len(words) == 1:
        return f"{words.pop()}s {', '.join(number for _, _, number in cut)}{more}"
    return ", ".join("".join(part) for part in cut) + more


def skipped_warning(sources: Sequence[SourceReport], listed_in: str = SKIPPED_NAME) -> list[str]:
    """Say in one sentence that rows were skipped.

    Args:
        sources: the reports.
        listed_in: the file that lists them.

    Returns:
        The sentence, or none.
    """
    reasons = sum((Counter(source.skipped) for source in sources), Counter[str]())
    if not reasons:
        return []
    most = "; ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(3))
    more = f"; and {counted(len(reasons) - 3, 'other reason')}" if len(reasons) > 3 else ""
    rows = "bad row was" if reasons.total() == 1 else "bad rows were"
    share = f"{reasons.total() / sum(source.rows for source in sources):.1%}"
    listed = f"{listed_in} lists each with its reason"
    return [f"{reasons.total():,} {rows} skipped, {share} of all ({most}{more}); {listed}"]


def date_warnings(asked: datetime.date | None, written: datetime.date | None) -> list[str]:
    """Say which date a chat template writes, or that none is.

    Args:
        asked: data.template_date.
        written: what the template writes as today's date; None if it writes none.

    Returns:
        A sentence, or none.
    """
    if written:
        return [
            f"the chat template writes a date into every conversation: it is fixed to {written} (data.template_date)"
        ]
    return ["data.template_date has no effect: the tokenizer's chat template writes no date"] if asked else []
