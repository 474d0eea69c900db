"""Ctrl-C and SIGTERM: the first says at once what happens and how long it may take, the second what is lost."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from marks import PATIENCE

from qlora_trainer.cli import stopping
from qlora_trainer.cli.stopping import Training, Work
from qlora_trainer.common.progress import EVALUATING, SAVING, TRAINING
from qlora_trainer.merging import merge_run as merging
from qlora_trainer.runs import run as running
from qlora_trainer.runs import start, trained
from qlora_trainer.training import loop

# A C function that returns to Python only after minutes, as one operation of a large step does.
BUSY = """\
import hashlib, sys, threading
from qlora_trainer.cli.console import ProgressBars, say
from qlora_trainer.cli.stopping import answered_signals
with answered_signals(say), ProgressBars("Nothing was changed.", "A part is left.") as progress:
    progress("reading weights", 0, None)
    begun = threading.Event()
    threading.Thread(target=lambda: (begun.wait(), print("busy", file=sys.stderr)), daemon=True).start()
    sys.setswitchinterval(1000)  # the thread goes on when the function lets it, not before
    begun.set()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
"""
RECORD = {"tokens": 100, "tokens_per_second": 5.0}


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """SIGINT as Python has it in a terminal: a shell's background job begins with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_at_once_inside_an_operation_and_the_second_ends_it(signum: signal.Signals) -> None:
    environment = {**os.environ, "COLUMNS": "500"}
    with subprocess.Popen([sys.executable, "-c", BUSY], stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr
        try:
            assert "reading weights" in process.stderr.readline()
            assert process.stderr.readline() == "busy\n"
            process.send_signal(signum)
            first = process.stderr.readline()
            assert process.poll() is None
            process.send_signal(signum)
            _, second = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert first.startswith("Stopping when the current operation (reading weights) ends, usually within seconds.")
    assert "Press Ctrl-C again to end at once" in first
    assert second.strip() == "Ended at once, without cleaning up. Nothing was changed. A part is left."
    assert process.returncode == 128 + signum


@pytest.mark.parametrize(
    ("command", "module", "name", "kept"),
    [
        ("train", start, "prepare_data", "No run directory is made."),
        ("train", start, "load_base", "No run directory is made."),
        ("train", running, "answer_prompts", "The run is saved at step 0. To continue: qlora resume "),
    ],
)
def test_a_signal_outside_training_says_what_is_kept_and_stops(
    qlora: Callable, config_file: Path, monkeypatch: pytest.MonkeyPatch, command: str, module: Any, name: str, kept: str
) -> None:
    monkeypatch.setattr(module, name, press)
    code, out, reported = qlora(command, config_file)
    assert (code, out) == (130, "")
    assert "Stopping when the current operation" in reported
    assert kept in reported
    assert "Traceback" not in reported
    assert list(config_file.parent.glob("**/.*partial*")) == []
    if name != "answer_prompts":
        assert not (config_file.parent / "run").exists()


@pytest.mark.parametrize(
    ("words", "operation", "kept"),
    [
        ("inspect config", "runs.directory.prepare_data", "Nothing was changed."),
        ("plan config", "planning.memory_plan.plan_memory", "Nothing was changed."),
        ("quantize model --output made", "model.quantized_copy.quantize_checkpoint", "No 4-bit model is written."),
        ("doctor run", "cli.doctor_base.verified_base", "Nothing was changed."),
        ("generate run", "runs.trained.open_trained", "Nothing was written."),
        ("demo --output made", "cli.demo_run.start_run", "demo stays in "),
    ],
)
def test_every_command_answers_a_signal_and_says_what_is_kept(
    qlora: Callable,
    config_file: Path,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    operation: str,
    kept: str,
) -> None:
    monkeypatch.setattr(f"qlora_trainer.{operation}", press)
    places = {"config": config_file, "model": tiny_llama, "made": tmp_path / "made", "run": tmp_path / "run"}
    code, out, reported = qlora(*(places.get(word, word) for word in words.split()))
    assert (code, out) == (130, ""), reported
    assert "Stopping when the current operation" in reported
    assert kept in reported
    assert "Traceback" not in reported
    assert (tmp_path / "made").exists() == ("stays" in kept)


def test_a_signal_in_training_says_how_long_it_takes_saves_and_prints_a_command_to_paste(
    qlora: Callable, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "my runs" / "a[1] $HOME"
    real = running.take_step

    def take_step(state: Any) -> Any:
        if state.step == 2:
            press()
        return real(state)

    monkeypatch.setattr(running, "take_step", take_step)
    code, out, reported = qlora("train", config_file, f"training.output_dir={run}", "evaluation.samples=0")
    assert code == 0, reported
    assert "Stopping when step 3 has ended and is saved: about 1 s, by the 2 steps so far." in reported
    assert "Press Ctrl-C again to stop without saving." in reported
    pasted = shlex.split(out.partition("Stopped at step 3 and saved. To continue: ")[2])
    assert pasted == ["qlora", "resume", str(run)]

    code, out, reported = qlora(*pasted[1:])
    assert code == 0, reported
    pasted = shlex.split(out.partition("Next:")[2])
    assert pasted == ["qlora", "merge", str(run), "--output", f"{run}-merged"]

    for module, name, argument in (
        (trained, "eval_loss", ["evaluate", run]),
        (merging, "plan_merge", ["merge", run, "--output", tmp_path / "merged"]),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, press)
            code, out, reported = qlora(*argument)
        assert (code, out) == (130, ""), reported
        assert "Stopping when the current operation" in reported
    assert not (tmp_path / "merged").exists()


def test_a_second_signal_in_training_says_which_steps_are_lost(
    qlora: Callable, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = running.take_step

    def take_step(state: Any) -> Any:
        if state.step == 5:
            press()
            time.sleep(0.05)  # for two signals are one, while the first is not delivered
            press()
        return real(state)

    monkeypatch.setattr(running, "take_step", take_step)
    code, out, reported = qlora("train", config_file, "evaluation.samples=0")
    assert (code, out) == (130, "")
    lost = "Stopped without saving: the 1 step since step 4 and the one in progress are lost. To continue from step 4: "
    assert f"{lost}qlora resume {tmp_path / 'run'}" in reported


def test_the_estimate_is_what_is_left_of_a_usual_step_and_of_an_evaluation_that_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    work = Training(tmp_path, 0, 10, evaluate_every=3)
    assert "no step has ended yet" in work.first_signal()
    for step, ended in ((1, 20.0), (2, 40.0)):
        now = ended
        work(RECORD)
        work.progress(TRAINING, step, 10)
    assert "step 3 has ended and is evaluated and saved: about 20 s, by the 2 steps so far, and" in work.first_signal()
    now = 60.0
    work.progress(EVALUATING, 3, 10)
    assert "the evaluation of step 3 has ended and all is saved: it is the first, so that" in work.first_signal()
    now = 160.0
    work({**RECORD, "eval_loss": 1.0})
    work.progress(SAVING, 3, 10)
    assert "the checkpoint of step 3 is saved: usually within seconds." in work.first_signal()
    work.progress(TRAINING, 3, 10)
    now = 165.0
    assert "step 4 has ended and is saved: about 15 s, by the 3 steps so far." in work.first_signal()
    for step, ended in ((4, 180.0), (5, 200.0)):
        now = ended
        work(RECORD)
        work.progress(TRAINING, step, 10)
    assert "step 6 has ended and is evaluated and saved: about 120 s" in work.first_signal().replace("2 min", "120 s")
    work.progress(EVALUATING, 6, 10)
    now = 240.0
    assert "the evaluation of step 6 has ended and all is saved: about 60 s, by the eval" in work.first_signal()


# What is done after the last step, where it is done, what the first signal says of it, and what the second.
AFTER_THE_LAST_STEP = [
    (
        loop,
        "measure_eval",
        "the final evaluation has ended and all is saved: it is the first, so that how long it takes is not known. No "
        "samples are answered.",
        "Stopped without saving: the 2 steps since step 8 are lost. To continue from step 8: ",
    ),
    (
        running,
        "save_checkpoint",
        "the last checkpoint and the adapter are saved: usually within seconds. No samples are answered.",
        "Stopped without saving: the 2 steps since step 8 are lost. To continue from step 8: ",
    ),
    (
        running,
        "write_base_record",
        "the last checkpoint and the adapter are saved: usually within seconds. No samples are answered.",
        "Stopped without saving: no step is lost. To continue from step 10: ",
    ),
]


@pytest.mark.parametrize(("module", "name", "first", "second"), AFTER_THE_LAST_STEP)
def test_a_signal_after_the_last_step_says_what_is_done_and_then_ends_the_run(
    qlora: Callable,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    first: str,
    second: str,
) -> None:
    real = getattr(module, name)
    presses = 1

    def pressed(*arguments: Any, **named: Any) -> Any:
        if steps_taken[-1:] == [10]:
            for _ in range(presses):
                press()
                time.sleep(0.05)
        return real(*arguments, **named)

    steps_taken: list[int] = []
    step = running.take_step

    def take_step(state: Any) -> Any:
        metrics = step(state)
        steps_taken.append(state.step)
        return metrics

    monkeypatch.setattr(running, "take_step", take_step)
    monkeypatch.setattr(module, name, pressed)
    settings = ("training.max_steps=10", "training.save_every=4", "training.evaluate_every=100", "data.eval=0.2")
    words = ("train", config_file, *settings, "evaluation.samples=0")
    code, out, reported = qlora(*words)
    assert code == 0, reported
    assert f"Stopping when {first} Press Ctrl-C again to stop without saving." in reported
    assert "Adapter: " in out

    steps_taken.clear()
    presses = 2
    code, out, reported = qlora(*words, f"training.output_dir={tmp_path / 'again'}")
    assert (code, out) == (130, "")
    assert f"{second}qlora resume {tmp_path / 'again'}" in reported


def test_a_signal_while_samples_are_answered_says_what_of_the_run_is_there(
    qlora: Callable, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = running.answer_prompts

    def answer_prompts(*arguments: Any, **named: Any) -> Any:
        return press() if (tmp_path / "run/adapter").exists() else real(*arguments, **named)

    monkeypatch.setattr(running, "answer_prompts", answer_prompts)
    code, out, reported = qlora("train", config_file, "training.max_steps=2")
    assert (code, out) == (130, "")
    assert f"The adapter is saved. For samples and report: qlora resume {tmp_path / 'run'}" in reported
    monkeypatch.setattr(running, "answer_prompts", real)
    code, out, reported = qlora("resume", tmp_path / "run")
    assert code == 0, reported
    assert "Report:" in out


def test_the_second_signal_is_answered_for_the_work_that_it_ends_however_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that speaks comes only after some time, as on a busy machine."""
    said: list[str] = []
    answer = stopping._answer

    def late(signum: int, say: Callable[[str], None]) -> None:
        time.sleep(0.2)
        answer(signum, say)

    monkeypatch.setattr(stopping, "_answer", late)
    training = Training(Path("run"), first_step=3, total_steps=10, evaluate_every=0)

    def work() -> None:
        with stopping.answered_signals(said.append), stopping.doing(training), loop.stop_requests():
            press()
            press()
            time.sleep(PATIENCE)

    with pytest.raises(SystemExit):
        work()
    first, second = said
    assert first.startswith("Stopping when step 4 has ended")
    assert second.startswith("Stopped without saving: the 3 steps since step 0 and the one in progress are lost.")


def test_the_time_that_an_operation_takes_is_estimated_by_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    work = Work()
    for ended in (1.0, 5.0, 35.0, 36.0):
        now = ended
        work.note("folding")
    assert "(folding) ends, which took up to 30 s before." in work.first_signal()
