"""`qlora inspect`: the data in numbers, and rows as the model sees them, learned tokens in colour."""

from typing import Any

from rich.text import Text

from qlora_trainer.console import console, print_notices, print_table
from qlora_trainer.data.packing import IGNORED_LABEL
from qlora_trainer.data.reports import PreparationReport, SetReport
from qlora_trainer.data.store import ExampleSet
from qlora_trainer.errors import DataError

LEARNED = "bold green"
READ = "dim"


def show_report(report: PreparationReport) -> None:
    """Every source with what became of its rows, and both sets in numbers."""
    for source in report.sources:
        lines = [("rows read", f"{source.rows:,}"), ("rows used, or parts of them", f"{source.examples:,}")]
        lines += [(f"dropped: {reason}", f"{count:,}") for reason, count in source.dropped.items()]
        if source.truncated:
            lines.append((f"cut to {report.max_length} tokens", f"{source.truncated:,}"))
        if source.split:
            lines.append((f"split into parts of at most {report.max_length} tokens", f"{source.split:,}"))
        print_table(source.name, lines)
    print_table("training", _set_lines(report.train, ("repeat an earlier row", report.train_duplicates)))
    print_table("held out", _set_lines(report.heldout, ("also in training", report.heldout_duplicates)))
    print_notices(report.notices)


def show_row(tokenizer: Any, examples: ExampleSet, index: int) -> None:
    """One row token by token: what is learned in colour, the rest dim. DataError where there is no such row."""
    if not 0 <= index < len(examples):
        raise DataError(f"There is no training row {index}; rows go from 0 to {len(examples) - 1}.")
    example = examples[index]
    learned = [label != IGNORED_LABEL for label in example.labels]
    console.rule(f"row {index}, {examples.where(index)}: {len(learned)} tokens, {sum(learned)} learned", align="left")
    text = Text()
    start = 0
    for end in range(1, len(learned) + 1):
        if end == len(learned) or learned[end] != learned[start]:
            # Decoded a stretch at a time: a character may be spread over several tokens.
            stretch = tokenizer.decode(example.input_ids[start:end], skip_special_tokens=False)
            text.append(stretch, style=LEARNED if learned[start] else READ)
            start = end
    console.print(text)


def _set_lines(found: SetReport, duplicates: tuple[str, int]) -> list[tuple[str, str]]:
    if found.examples == 0:
        return [("rows", "none")]
    name, count = duplicates
    return [
        ("rows", f"{found.examples:,}"),
        (name, f"{count:,}"),
        ("tokens", f"{found.tokens:,}, of which {found.learned_tokens / found.tokens:.1%} are learned"),
        ("tokens a row", f"shortest {found.shortest}, median {found.median}, longest {found.longest}"),
    ]
