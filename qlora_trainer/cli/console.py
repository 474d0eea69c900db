"""Print to the terminal: progress bars, the training line, tables. Only the command line prints.

Everything goes to standard error, so that standard output holds only what a program may read (--json, generated
text). If standard error is no terminal, a line now and then replaces the moving bars.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from qlora_trainer.common.units import gibibytes

console = Console(stderr=True, highlight=False)
SECONDS_BETWEEN_LINES = 5.0


class ProgressBars:
    """Show progress: a callable of type common.progress.Progress, with one bar per label, removed at the end."""

    def __init__(self) -> None:
        self._bars = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console,
            transient=True,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}
        self._said: set[str] = set()

    def __enter__(self) -> Self:
        if console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if console.is_terminal:
            self._bars.stop()

    def __call__(self, label: str, done: int, total: int | None) -> None:
        """Move a label's bar; where there is no terminal, print the label once.

        Args:
            label: what is being done.
            done: how much of it is done.
            total: how much there is; None: not known.
        """
        if not console.is_terminal:
            if label not in self._said:
                self._said.add(label)
                console.print(f"… {escape(label)}", style="dim")
            return
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(escape(label), total=total)
        self._bars.update(self._tasks[label], completed=done, total=total, visible=total is None or done < total)


class TrainingBar:
    """Show loss, learning rate, tokens per second, peak memory and time left, updated at each step.

    Called with the metrics of each step, as metrics.jsonl has them.

    Args:
        total_steps: of the whole run.
        first_step: steps taken before, by the run that is resumed.
    """

    def __init__(self, total_steps: int, first_step: int = 0) -> None:
        self.total_steps = total_steps
        self._bar = Progress(
            TextColumn("[bold]step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
            TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total_steps, completed=first_step)
        self._last_line = 0.0

    def __enter__(self) -> Self:
        if console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if console.is_terminal:
            self._bar.stop()

    def __call__(self, record: dict[str, Any]) -> None:
        """Show the metrics of a step.

        Args:
            record: the step's metrics.
        """
        line = (
            f"loss {record['loss']:.4f}  lr {record['learning_rate']:.1e}  {record['tokens_per_second']:.0f} tokens/s  "
            f"{gibibytes(record['peak_memory_bytes'])}"
        )
        if console.is_terminal:
            self._bar.update(self._task, completed=record["step"], description=line)
        is_due = time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES or record["step"] == self.total_steps
        if not console.is_terminal and is_due:
            self._last_line = time.monotonic()
            console.print(f"step {record['step']}/{self.total_steps}  {line}")
        if "recovered" in record:
            print_warnings([record["recovered"]])
        if "eval_loss" in record:
            console.print(f"step {record['step']}  eval loss {record['eval_loss']:.4f}")


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print a table of names and values.

    Args:
        title: printed above the table.
        rows: (name, value) pairs.
    """
    table = Table(title=escape(title), show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column()
    for name, value in rows:
        table.add_row(escape(name), escape(value))
    console.print(table)


def print_findings(findings: Sequence[tuple[str, str, str, str]]) -> None:
    """Print findings in columns, the advice under the detail.

    Args:
        findings: (status, name, detail, advice), where status is ok, note or problem, and advice may be empty.
    """
    colors = {"ok": "green", "note": "yellow", "problem": "bold red"}
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    table.add_column()
    table.add_column(overflow="fold")
    for status, name, detail, advice in findings:
        reported = Text(detail)
        if advice:
            reported.append(f"\n→ {advice}", style="dim")
        table.add_row(Text(status, style=colors[status]), Text(name), reported)
    console.print(table)


def print_warnings(warnings: Sequence[str]) -> None:
    """Print each warning on lines of its own.

    Args:
        warnings: sentences.
    """
    for warning in warnings:
        console.print(f"[yellow]note[/] {escape(warning)}")


def print_error(message: str) -> None:
    """Print an error message.

    Args:
        message: says what is wrong and what to do.
    """
    console.print(f"[bold red]error[/] {escape(message)}", soft_wrap=True)


def say(text: str, *, command: object = "") -> None:
    """Print a line of text and, in bold, a command to copy; neither is read as markup, and neither is wrapped.

    Args:
        text: comes first.
        command: comes after it, in bold.
    """
    console.print(Text.assemble(text, (str(command), "bold")), soft_wrap=True)


def write_out(text: str) -> None:
    """Write to standard output and flush, so that generated text appears as it comes.

    Args:
        text: is written as it is, without a line end.
    """
    sys.stdout.write(text)
    sys.stdout.flush()
