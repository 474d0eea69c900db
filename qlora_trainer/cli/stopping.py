"""Answer Ctrl-C and SIGTERM: say at once what happens and how long it may take, and at the second, what is lost.

Python runs the handler of a signal between two instructions of its own, which a library that computes may keep minutes
apart. So a thread, which the signal itself wakes, says what happens; the handler, in the main thread, then stops the
work, or training's own handler notes the wish for the end of the step (training/loop.py). Left out: drawing.
"""

import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

from qlora_trainer.common.command_line import command_line
from qlora_trainer.common.progress import EVALUATING, TRAINING
from qlora_trainer.common.units import counted, duration

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN = "Press Ctrl-C again to"
_PATIENCE = 1.0  # seconds that the main thread waits until the message is printed


class Work:
    """Describe work that is stopped as soon as its current operation ends.

    Args:
        kept: a sentence on what there is after the work was stopped, such as "No run directory was made."
        left: a sentence on what may be left where the process is ended at once.
    """

    signals_to_end = 2  # at this signal the process is ended, wherever it is

    def __init__(self, kept: str = "", left: str = "") -> None:
        self.kept, self.left = kept, left
        self.signals = 0
        self.answered = 0  # signals whose message is printed
        self._label = ""
        self._at = time.monotonic()
        self._longest = 0.0

    def note(self, label: str) -> None:
        """Take note of progress, from which the time that an operation takes is estimated.

        Args:
            label: what is being done.
        """
        now = time.monotonic()
        self._longest = max(self._longest, now - self._at) if label == self._label else 0.0
        self._label, self._at = label, now

    def first_signal(self) -> str:
        """Write what happens at the first signal.

        Returns:
            Sentences.
        """
        doing = f" ({self._label})" if self._label else ""
        took = f"which took up to {duration(self._longest)} before" if self._longest else "usually within seconds"
        ends = f"Stopping when the current operation{doing} ends, {took}."
        return " ".join(filter(None, [ends, self.kept, f"{_AGAIN} end at once."]))

    def second_signal(self) -> str:
        """Write what is lost at the second signal.

        Returns:
            Sentences.
        """
        return " ".join(filter(None, ["Ended at once, without cleaning up.", self.kept, self.left]))


class Training(Work):
    """Describe training, which the first signal stops where all is saved, and the second without.

    Called with the metrics of each step.

    Args:
        directory: of the run.
        first_step: steps taken before.
        total_steps: of the run.
        evaluate_every: steps between evaluations; 0 where there are no eval rows.
    """

    signals_to_end = 3

    def __init__(self, directory: Path, first_step: int, total_steps: int, evaluate_every: int) -> None:
        super().__init__()
        self.directory, self.step = directory, first_step
        self.total_steps, self.evaluate_every = total_steps, evaluate_every
        self._label = TRAINING
        self._steps: list[float] = []  # seconds of each
        self._evaluation: float | None = None  # seconds of the last

    def progress(self, label: str, done: int, total: int | None) -> None:
        """Take note of what begins, as a run reports it.

        Args:
            label: TRAINING, EVALUATING or SAVING.
            done: steps that were taken.
            total: of the run.
        """
        self.step, self._label, self._at = done, label, time.monotonic()

    def __call__(self, record: dict[str, Any]) -> None:
        """Take note of a step.

        Args:
            record: the step's metrics.
        """
        self._steps.append(record["tokens"] / record["tokens_per_second"])
        if "eval_loss" in record:
            self._evaluation = time.monotonic() - self._at

    def first_signal(self) -> str:
        """Write what happens at the first signal.

        Returns:
            Sentences, with the time it may take by the steps so far.
        """
        is_last = self._label != TRAINING and self.step >= self.total_steps
        if self._label == TRAINING:
            step = self.step + 1
            evaluates = self.evaluate_every > 0 and (step % self.evaluate_every == 0 or step >= self.total_steps)
            ends = f"step {step} has ended and {'is evaluated and saved' if evaluates else 'is saved'}"
            time_left = self._step_time_left(evaluates)
        elif self._label == EVALUATING:
            what = "the final evaluation" if is_last else f"the evaluation of step {self.step}"
            ends, time_left = f"{what} has ended and all is saved", self._evaluation_time_left()
        else:
            what = "the last checkpoint and the adapter are" if is_last else f"the checkpoint of step {self.step} is"
            ends, time_left = f"{what} saved", "usually within seconds"
        samples = " No samples are answered." if is_last else ""
        return f"Stopping when {ends}: {time_left}.{samples} {_AGAIN} stop without saving."

    def _step_time_left(self, evaluates: bool) -> str:
        if not self._steps:
            return "no step has ended yet that would show how long this takes"
        usual = statistics.median(self._steps) + (self._evaluation or 0.0) * evaluates
        unknown = ", and the evaluation, of which there was none yet" if evaluates and self._evaluation is None else ""
        return f"about {self._left_of(usual)}, by the {counted(len(self._steps), 'step')} so far{unknown}"

    def _evaluation_time_left(self) -> str:
        if self._evaluation is None:
            return "it is the first, so that how long it takes is not known"
        return f"about {self._left_of(self._evaluation)}, by the evaluation before"

    def _left_of(self, usual: float) -> str:
        return duration(max(usual - (time.monotonic() - self._at), 0.0))

    def second_signal(self) -> str:
        """Write what is lost at the second signal.

        Returns:
            Sentences, with the command that continues the run.
        """
        from qlora_trainer.runs.checkpoint import list_checkpoints  # a run that has steps has imported it

        saved = max((step for step, _ in list_checkpoints(self.directory / "checkpoints")), default=0)
        lost = [f"{counted(self.step - saved, 'step')} since step {saved}"] * (self.step > saved)
        lost += [f"{'the one' if lost else 'step'} in progress"] * (self._label == TRAINING)
        are = "are" if self.step > saved else "is"
        what = f"the {' and '.join(lost)} {are} lost" if lost else "no step is lost"
        return (
            f"Stopped without saving: {what}. To continue from step {saved}: {command_line('resume', self.directory)}"
        )


_current = Work()


@contextmanager
def doing(work: Work) -> Iterator[None]:
    """Let signals in the block be answered for this work.

    Args:
        work: what is being done.
    """
    global _current
    before, _current = _current, work
    try:
        yield
    finally:
        _current = before


@contextmanager
def answered_signals(say: Callable[[str], None]) -> Iterator[None]:
    """Answer SIGINT and SIGTERM in the block, by what `doing` says is being done.

    The first raises SystemExit with the code that shells know, 128 and the signal's number. In another thread than the
    main one nothing is done, as only that may handle signals.

    Args:
        say: prints a message; it is called in a thread.
    """
    is_main = threading.current_thread() is threading.main_thread()
    with _handlers(say) if is_main else nullcontext():
        yield


@contextmanager
def _handlers(say: Callable[[str], None]) -> Iterator[None]:
    """Handle both signals in the block; `say` is called in a thread."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    is_stopped = False

    def listen() -> None:
        while received := os.read(reading, 1):
            if received[0] in _SIGNALS:
                _answer(received[0], say)

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal is_stopped
        is_stopped = True
        # Of training the first signal goes to another handler, and the second comes here. The work is left only once
        # its message is there: the thread, which may come late on a busy machine, would speak of what is around it.
        work, until = _current, time.monotonic() + _PATIENCE
        while work.answered < work.signals_to_end - 1 and time.monotonic() < until:
            time.sleep(0.005)
        raise SystemExit(128 + signum)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    handlers = {signum: signal.signal(signum, stop) for signum in _SIGNALS}
    try:
        yield
    finally:
        for signum, handler in handlers.items():  # another signal, while the process ends, ends it without a word
            signal.signal(signum, signal.SIG_DFL if is_stopped else handler)
        signal.set_wakeup_fd(before)
        os.close(writing)
        thread.join(_PATIENCE)
        if not thread.is_alive():
            os.close(reading)


def _answer(signum: int, say: Callable[[str], None]) -> None:
    work = _current
    work.signals += 1
    if work.signals == 1:
        say(work.first_signal())
    elif work.signals == 2:
        say(work.second_signal())
    work.answered = work.signals
    if work.signals >= work.signals_to_end:
        os._exit(128 + signum)
