"""Print what `qlora inspect` shows: the data in numbers, lengths as a plot, rows with their trained tokens marked.

Trained tokens are marked by color if the terminal has colors, else by brackets, and text that spells a control token
otherwise than the token. Control characters of a row are escaped, so that the terminal does not act on them. Left out:
computing the numbers (data/preparation/overview.py, and preparation's report).
"""

import re
from collections.abc import Collection, Sequence
from itertools import groupby
from typing import Any

from rich.text import Text

from qlora_trainer.cli.console import answers, print_table, print_warnings
from qlora_trainer.common.errors import DataError
from qlora_trainer.common.units import counted
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
from qlora_trainer.data.rendering.encoding import Encoder
from qlora_trainer.data.types import IGNORED_LABEL

TRAINED, READ, SPELLED = "bold green", "dim", "underline yellow"
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
    answers.print(Text("tokens a row, training rows", style="bold"))
    for line in bars(overview.lengths, is_unicode=_is_unicode()):
        answers.print(line, soft_wrap=True, highlight=False, markup=False)
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
    virtual = f" ({row['virtual_tokens']} of them virtual)" if row["virtual_tokens"] else ""
    tokens = f"{counted(row['tokens'], 'token')}{virtual}, {row['trained_tokens']:,} trained"
    header = f"{name} row {index}, {row['where']}: {tokens}"
    answers.rule(Text(_visible(header)), align="left")
    has_color = answers.color_system is not None and not answers.no_color
    opening, closing = "⟦⟧" if _is_unicode() else ("[[", "]]")
    text = Text()
    for trained, spans in groupby(row["spans"], key=lambda span: span["trained"]):
        if has_color:
            for span in spans:
                style = SPELLED if span["spelled"] else TRAINED if trained else READ
                text.append(_visible(span["text"]), style=style)
        else:
            shown = "".join(_spelled_out(span["text"]) if span["spelled"] else _visible(span["text"]) for span in spans)
            text.append(f"{opening}{shown}{closing}" if trained else shown)
    answers.print(text, soft_wrap=True)


def legend() -> Text:
    """Explain how tokens are marked in this terminal.

    Returns:
        The line to print above rows.
    """
    if answers.color_system is not None and not answers.no_color:
        return Text.assemble(
            ("trained", TRAINED), ", ", ("read only", READ), ", ", ("text that spells a control token", SPELLED)
        )
    trained = "⟦trained⟧" if _is_unicode() else "[[trained]]"
    return Text(f"{trained} and read only; {_spelled_out('text that spells a control token')}")


def _spelled_out(text: str) -> str:
    return f"⟨{text}⟩" if _is_unicode() else f"{{{{{text}}}}}"


def describe_row(tokenizer: Any, examples: ExampleSet, index: int, name: str) -> dict[str, Any]:
    """Describe a row by its tokens, and by its text in spans.

    Args:
        tokenizer: decodes the row's tokens.
        examples: the set of rows.
        index: of the row, from 0.
        name: of the set.

    Returns:
        A mapping that JSON can hold; docs/reference/json.md lists its keys.

    Raises:
        DataError: there is no such row.
    """
    if not 0 <= index < len(examples):
        has = f"rows go from 0 to {len(examples) - 1}" if len(examples) else "there are none"
        raise DataError(f"There is no {name} row {index}; {has}.")
    example = examples[index]
    trained = [label != IGNORED_LABEL for label in example.labels]
    encoder, virtual = Encoder(tokenizer), len(examples.leading_ids)
    text_ids, text_trained = example.input_ids[virtual:], trained[virtual:]
    return {
        "set": name,
        "index": index,
        "where": examples.where(index),
        "tokens": len(trained),
        "virtual_tokens": virtual,
        "trained_tokens": example.trained_tokens,
        "spans": _with_spelled(_spans(tokenizer, text_ids, text_trained, encoder.control_ids), encoder.control_pattern),
        "input_ids": example.input_ids,
        "trained": trained,
    }


def _spans(
    tokenizer: Any, ids: list[int], trained: Sequence[bool], control_ids: Collection[int] = frozenset()
) -> list[dict[str, Any]]:
    """Split a row's text into spans, trained or not and control tokens or not: a character may be several tokens."""
    spans = []
    context = start = 0
    kinds = [(bool(is_trained), token in control_ids) for is_trained, token in zip(trained, ids, strict=True)]
    for end in range(1, len(ids) + 1):
        if end == len(ids) or kinds[end] != kinds[start]:
            # Some decoders drop the space that a text begins with, so a span's text is what it adds to the span before
            # it. Decoding all text before it each time would take time quadratic in the row's length.
            before = tokenizer.decode(ids[context:start], skip_special_tokens=False)
            until = tokenizer.decode(ids[context:end], skip_special_tokens=False)
            alone = tokenizer.decode(ids[start:end], skip_special_tokens=False)
            text = until[len(before) :] if until.startswith(before) else alone
            spans.append({"text": text, "trained": kinds[start][0], "control": kinds[start][1]})
            context, start = start, end
    return spans


def _with_spelled(spans: Sequence[dict[str, Any]], control: re.Pattern[str]) -> list[dict[str, Any]]:
    """Cut out of the spans what spells a control token in ordinary tokens; join the rest."""
    pieces: list[tuple[bool, bool, str]] = []
    for span in spans:
        position, text = 0, span["text"]
        for match in () if span["control"] else control.finditer(text):
            pieces += [(span["trained"], False, text[position : match.start()]), (span["trained"], True, match[0])]
            position = match.end()
        pieces.append((span["trained"], False, text[position:]))
    return [
        {"text": "".join(text for _, _, text in group), "trained": trained, "spelled": spelled}
        for (trained, spelled), group in groupby((piece for piece in pieces if piece[2]), key=lambda piece: piece[:2])
    ]


def _visible(text: str) -> str:
    """Escape control characters, which a terminal would act on; line ends and tabs stay."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _is_unicode() -> bool:
    return answers.encoding.startswith("utf")
