"""Print to the terminal: progress bars, the training line, tables. Only the command line prints.

Answers go to standard output: tables, rows, generated text, --json, what a run has made. Progress, warnings and errors
go to standard error; if that is no terminal, a line now and then replaces the moving bars.
"""

import atexit
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from qlora_trainer.cli.stopping import Work, doing
from qlora_trainer.common.errors import DiskError
from qlora_trainer.common.units import duration, gibibytes

SECONDS_BETWEEN_LINES = 5.0


class ProgressConsole(Console):
    """Print to standard error; if that cannot be written to, go on without, as progress is worth no run."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does.

        Args:
            *objects: to print.
            **options: rich's.
        """
        try:
            super().print(*objects, **options)
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Continue without printing, as the reader has left."""
        self.quiet = True
        _leave_to_nobody(sys.stderr)


class AnswerConsole(Console):
    """Print to standard output; if its reader has left, end the command."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does.

        Args:
            *objects: to print.
            **options: rich's.
        """
        with _written_answers():
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """End the command without an error: the reader, such as `head`, has what it wants.

        Raises:
            SystemExit: always.
        """
        _leave_to_nobody(sys.stdout)
        raise SystemExit(0)


console = ProgressConsole(stderr=True, highlight=False)
answers = AnswerConsole(highlight=False)


def open_closed_streams() -> None:
    """Open each standard stream that was closed (`qlora … 2>&-`), so that nothing else gets its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            mode = "w" if number else "r"
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    atexit.register(_flush_progress)


def _flush_progress() -> None:
    """Write what standard error still holds, or let it go: else Python itself would end the command with an error."""
    try:
        sys.stderr.flush()
    except OSError:
        _leave_to_nobody(sys.stderr)


def _leave_to_nobody(stream: Any) -> None:
    """Let what is still written to a stream go nowhere, at the end of the program too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextmanager
def _written_answers() -> Iterator[None]:
    """Turn what standard output raises into the end of the command, or a message.

    Raises:
        DiskError: it cannot be written to, such as a file on a full disk.
    """
    try:
        yield
    except BrokenPipeError:
        answers.on_broken_pipe()
    except OSError as error:
        _leave_to_nobody(sys.stdout)
        raise DiskError(f"Standard output could not be written: {error.strerror}. Send it somewhere else.") from error


class ProgressBars:
    """Show progress: a callable of type common.progress.Progress, with one bar per label, removed at the end.

    Args:
        kept: says to whoever stops the work what there is then, such as "No run directory was made."
        left: says what may be left if the process is ended at once.
    """

    def __init__(self, kept: str = "", left: str = "") -> None:
        self._work = Work(kept, left)
        self._stack = ExitStack()
        self._bars = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console,
            transient=True,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}
        self._said: set[str] = set()

    def __enter__(self) -> Self:
        self._stack.enter_context(doing(self._work))
        if console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if console.is_terminal:
            self._bars.stop()
        self._stack.close()

    def __call__(self, label: str, done: int, total: int | None) -> None:
        """Move a label's bar; where there is no terminal, print the label once.

        Args:
            label: what is being done.
            done: how much of it is done.
            total: how much there is; None: not known.
        """
        self._work.note(label)
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

    The time left is that of the steps that were taken, but for the first, which also prepares what later ones have.
    Called with the metrics of each step, as metrics.jsonl has them.

    Args:
        total_steps: of the whole run.
        first_step: steps taken before, by the run that is resumed.
        memory: names the memory whose peak the metrics have.
    """

    def __init__(self, total_steps: int, first_step: int = 0, memory: str = "memory") -> None:
        self.total_steps = total_steps
        self._memory = memory
        self._bar = Progress(
            TextColumn("[bold]step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
            TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total_steps, completed=first_step)
        self._last_line = 0.0
        self._first: tuple[int, float] | None = None  # step that ended first, and when

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
            f"peak {self._memory} {gibibytes(record['peak_memory_bytes'])}"
        )
        if console.is_terminal:
            self._bar.update(self._task, completed=record["step"], description=line)
        step, now = record["step"], time.monotonic()
        is_due = now - self._last_line > SECONDS_BETWEEN_LINES or step == self.total_steps
        if not console.is_terminal and is_due:
            self._last_line = now
            left = self._left(step, now)
            console.print(f"step {step}/{self.total_steps}  {line}{left}", soft_wrap=True)  # one line of a log
        self._first = self._first or (step, now)
        if "recovered" in record:
            print_warnings([record["recovered"]])
        if "eval_loss" in record:
            console.print(f"step {record['step']}  eval loss {record['eval_loss']:.4f}")

    def _left(self, step: int, now: float) -> str:
        """Write how long the steps to come take by those since the first; empty where none are left or known."""
        if self._first is None or not self._first[0] < step < self.total_steps:
            return ""
        seconds = (now - self._first[1]) / (step - self._first[0])
        return f"  about {duration(seconds * (self.total_steps - step))} left"


def print_table(title: str, rows: Sequence[tuple[str, ...]], to: Console = answers, header: Sequence[str] = ()) -> None:
    """Print a table of names and values.

    Args:
        title: printed above the table.
        rows: each a name and its values, as many in all.
        to: where it goes; an answer, to standard output.
        header: above the columns.
    """
    to.print(Text(title, style="bold"), soft_wrap=True)
    table = Table(show_header=bool(header))
    for index, name in enumerate(header or ("",) * max(map(len, rows), default=0)):
        table.add_column(escape(name), style="" if index else "dim")
    for row in rows:
        table.add_row(*map(escape, row))
    to.print(table)


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
    answers.print(table)


def print_warnings(warnings: Sequence[str]) -> None:
    """Print each warning on lines of its own.

    Args:
        warnings: sentences.
    """
    for warning in warnings:
        console.print(f"[yellow]note[/] {escape(warning)}", soft_wrap=True)


def print_error(message: str) -> None:
    """Print an error message.

    Args:
        message: says what is wrong and what to do.
    """
    console.print(f"[bold red]error[/] {escape(message)}", soft_wrap=True)


def say(text: str, *, command: object = "", to: Console = console) -> None:
    """Print a line of text and, in bold, a command to copy; neither is read as markup, and neither is wrapped.

    Args:
        text: comes first.
        command: comes after it, in bold.
        to: where it goes.
    """
    to.print(Text.assemble(text, (str(command), "bold")), soft_wrap=True)


def write_out(text: str) -> None:
    """Write to standard output and flush, so that generated text appears as it comes.

    Args:
        text: is written as it is, without a line end.
    """
    with _written_answers():
        sys.stdout.write(text)
        sys.stdout.flush()
