"""Draw what `qlora inspect` shows: the data in numbers, lengths as a plot, rows with their trained tokens marked.

Marked by color where the terminal has colors, else by brackets. What a row holds is shown, never obeyed: its control
characters are written out. Left out: the numbers themselves (data/preparation/overview.py, and preparation's report).
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
    """Every source with what became of its rows, both sets in numbers, and the lengths of the rows as bars."""
    for source in report.sources:
        print_table(source.name, source_facts(source, report.max_length))
    print_table("training", train_facts(report, overview.epoch))
    print_table("kept for evaluation", eval_facts(report))
    console.print(Text("tokens a row, training rows", style="bold"))
    for line in bars(overview.lengths, is_unicode=_is_unicode()):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    print_warnings(report.warnings)


def bars(lengths: Lengths, is_unicode: bool = True) -> list[str]:
    """A line a bin: its tokens, a bar, its training rows. A bin that has a row has a bar."""
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
    """One row as the model sees it. DataError where there is no such row."""
    row = tokens_to_json(tokenizer, examples, index, name)
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
    """How trained tokens are marked here."""
    if console.color_system is not None and not console.no_color:
        return Text.assemble(("trained", TRAINED), ", ", ("read only", READ))
    return Text("⟦trained⟧ and read only" if _is_unicode() else "[[trained]] and read only")


def tokens_to_json(tokenizer: Any, examples: ExampleSet, index: int, name: str) -> dict[str, Any]:
    """A row with its tokens, and its text in spans that are trained or not. DataError where there is none."""
    if not 0 <= index < len(examples):
        has = f"they go from 0 to {len(examples) - 1}" if len(examples) else "there are none"
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
    """Text by spans of tokens, trained or not. Decoded a span at a time: a character may be several tokens."""
    spans = []
    context = start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[start]:
            # Some decoders drop the space that a text begins with, so it is taken as what the span adds to the one
            # before it; to all before it would take time by the square of a long row.
            before = tokenizer.decode(ids[context:start], skip_special_tokens=False)
            until = tokenizer.decode(ids[context:end], skip_special_tokens=False)
            alone = tokenizer.decode(ids[start:end], skip_special_tokens=False)
            text = until[len(before) :] if until.startswith(before) else alone
            spans.append({"text": text, "trained": bool(trained[start])})
            context, start = start, end
    return spans


def _visible(text: str) -> str:
    """Control characters, which a terminal would obey, written out; line ends and tabs stay."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _is_unicode() -> bool:
    return console.encoding.startswith("utf")
