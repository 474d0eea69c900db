"""What a person sees in the terminal: progress bars, the training line, tables. Nothing below the command line draws.

Everything goes to standard error, so that standard output holds only answers a program may read (--json, generated
text). Where standard error is no terminal, a line now and then replaces the moving bars.
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
    """The Progress callable of the modules below: one bar a label, gone when all is done."""

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
        if not console.is_terminal:
            if label not in self._said:
                self._said.add(label)
                console.print(f"… {escape(label)}", style="dim")
            return
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(escape(label), total=total)
        self._bars.update(self._tasks[label], completed=done, total=total, visible=total is None or done < total)


class TrainingBar:
    """Loss, learning rate, tokens a second, memory and time left, moving with each step."""

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
    """A table of names and values."""
    table = Table(title=escape(title), show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column()
    for name, value in rows:
        table.add_row(escape(name), escape(value))
    console.print(table)


def print_findings(findings: Sequence[tuple[str, str, str, str]]) -> None:
    """Lines of (status, name, detail, advice), each in a column of its own, the advice under the detail."""
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
    for warning in warnings:
        console.print(f"[yellow]note[/] {escape(warning)}")


def print_error(message: str) -> None:
    console.print(f"[bold red]error[/] {escape(message)}", soft_wrap=True)


def say(text: str, *, command: object = "") -> None:
    """A line of text and, in bold, a command to copy: nothing in either is markup, and neither is wrapped."""
    console.print(Text.assemble(text, (str(command), "bold")), soft_wrap=True)


def write_out(text: str) -> None:
    """Write to standard output at once, for answers that stream."""
    sys.stdout.write(text)
    sys.stdout.flush()
