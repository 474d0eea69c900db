"""Print what `qlora inspect` shows: the data in numbers, lengths as a plot, rows with their trained tokens marked.

Trained tokens are marked by color if the terminal has colors, else by brackets. Control characters of a row are
escaped, so that the terminal does not act on them. Left out: computing the numbers (data/preparation/overview.py, and
preparation's report).
"""

import re
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from qlora_trainer.cli.console import console, print_table, print_warnings
from qlora_trainer.common.errors import DataError
from qlora_trainer.data.preparation.overview import (
    Lengths,
    Overview,
    bin_labels,
    eval_facts,
    source_facts,
    train_facts,
)
from qlora_trainer.data.preparation.reports import PreparationReport
from qlora_trainer.data.preparation.store import ExampleSet
from qlora_trainer.data.types import IGNORED_LABEL

TRAINED, READ = "bold green", "dim"
BAR_WIDTH = 40
EIGHTHS = " ▏▎▍▌▋▊▉█"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def show_report(report: PreparationReport, overview: Overview) -> None:
    """Print what became of each source's rows, both sets in numbers, and the lengths of the rows as bars.

    Args:
        report: of preparation.
        overview: of the prepared rows.
    """
    for source in report.sources:
        print_table(source.name, source_facts(source, report.max_length))
    print_table("training", train_facts(report, overview.epoch))
    print_table("kept for evaluation", eval_facts(report))
    console.print(Text("tokens a row, training rows", style="bold"))
    for line in bars(overview.lengths, is_unicode=_is_unicode()):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    print_warnings(report.warnings)


def bars(lengths: Lengths, is_unicode: bool = True) -> list[str]:
    """Draw the training rows' lengths as a bar chart in text; a bin that has a row always has a bar.

    Args:
        lengths: rows counted by bins of tokens.
        is_unicode: draw with Unicode blocks rather than ASCII characters.

    Returns:
        A line for each bin: its range of tokens, its bar, its count of rows.
    """
    labels, most = bin_labels(lengths), max(lengths.train)
    width = max(map(len, labels))
    lines = []
    for label, count in zip(labels, lengths.train, strict=True):
        eighths = max(round(8 * BAR_WIDTH * count / most), count > 0)
        whole, rest = divmod(eighths, 8)
        bar = "█" * whole + EIGHTHS[rest] * (rest > 0) if is_unicode else "#" * (whole + (rest > 0))
        lines.append(f"{label:>{width}} {'│' if is_unicode else '|'}{bar} {count:,}")
    return lines


def show_row(tokenizer: Any, examples: ExampleSet, index: int, name: str = "training") -> None:
    """Print one row as the model sees it; `describe_row` raises DataError if there is no such row.

    Args:
        tokenizer: decodes the row's tokens.
        examples: the set of rows.
        index: of the row, from 0.
        name: of the set, for the header.
    """
    row = describe_row(tokenizer, examples, index, name)
    header = f"{name} row {index}, {row['where']}: {row['tokens']:,} tokens, {row['trained_tokens']:,} trained"
    console.rule(Text(_visible(header)), align="left")
    has_color = console.color_system is not None and not console.no_color
    opening, closing = "⟦⟧" if _is_unicode() else ("[[", "]]")
    text = Text()
    for span in row["spans"]:
        shown = _visible(span["text"])
        if has_color:
            text.append(shown, style=TRAINED if span["trained"] else READ)
        else:
            text.append(f"{opening}{shown}{closing}" if span["trained"] else shown)
    console.print(text, soft_wrap=True)


def legend() -> Text:
    """Explain how trained tokens are marked in this terminal.

    Returns:
        The line to print above rows.
    """
    if console.color_system is not None and not console.no_color:
        return Text.assemble(("trained", TRAINED), ", ", ("read only", READ))
    return Text("⟦trained⟧ and read only" if _is_unicode() else "[[trained]] and read only")


def describe_row(tokenizer: Any, examples: ExampleSet, index: int, name: str) -> dict[str, Any]:
    """Describe a row by its tokens, and by its text in spans that are trained or not.

    Args:
        tokenizer: decodes the row's tokens.
        examples: the set of rows.
        index: of the row, from 0.
        name: of the set.

    Returns:
        A mapping that JSON can hold; docs/json.md lists its keys.

    Raises:
        DataError: there is no such row.
    """
    if not 0 <= index < len(examples):
        has = f"rows go from 0 to {len(examples) - 1}" if len(examples) else "there are none"
        raise DataError(f"There is no {name} row {index}; {has}.")
    example = examples[index]
    trained = [label != IGNORED_LABEL for label in example.labels]
    return {
        "set": name,
        "index": index,
        "where": examples.where(index),
        "tokens": len(trained),
        "trained_tokens": example.trained_tokens,
        "spans": _spans(tokenizer, example.input_ids, trained),
        "input_ids": example.input_ids,
        "trained": trained,
    }


def _spans(tokenizer: Any, ids: list[int], trained: Sequence[bool]) -> list[dict[str, Any]]:
    """Split a row's text into spans, trained or not, each decoded whole: a character may be several tokens."""
    spans = []
    context = start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[start]:
            # Some decoders drop the space that a text begins with, so a span's text is what it adds to the span before
            # it. Decoding all text before it each time would take time quadratic in the row's length.
            before = tokenizer.decode(ids[context:start], skip_special_tokens=False)
            until = tokenizer.decode(ids[context:end], skip_special_tokens=False)
            alone = tokenizer.decode(ids[start:end], skip_special_tokens=False)
            text = until[len(before) :] if until.startswith(before) else alone
            spans.append({"text": text, "trained": bool(trained[start])})
            context, start = start, end
    return spans


def _visible(text: str) -> str:
    """Escape control characters, which a terminal would act on; line ends and tabs stay."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _is_unicode() -> bool:
    return console.encoding.startswith("utf")
