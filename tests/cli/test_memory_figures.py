"""No memory figure that a run prints is without a word on what it is."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_trainer.cli import console as printing
from qlora_trainer.cli.console import TrainingBar, console
from qlora_trainer.planning import fit


def test_each_memory_figure_of_a_run_says_what_it_is(
    qlora: Callable, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "SMALLEST_PLANNED", 0)
    code, out, reported = qlora("train", config_file, "training.max_steps=1", "evaluation.samples=0")
    assert code == 0, reported
    printed = reported.replace("│", " ")
    assert re.search(r"the run fits: [\d.]+ GiB of memory planned, activation checkpointing none", printed)
    assert re.search(r"planned memory +[\d.]+ GiB of host memory for model and training\s+step", printed)
    assert re.search(r"tokens/s  ?peak memory of the process [\d.]+ [MG]iB", printed)
    page = (tmp_path / "run" / "report.html").read_text()
    assert re.search(
        r"memory of the process.{0,30}[\d.]+ GiB at most, not shared with others; planned", page, re.DOTALL
    )
    assert "Peak memory of a GPU&#x27;s tensors, or of a CPU&#x27;s process" in page
    _, out, _ = qlora("plan", config_file, "--gpu-memory", "8GiB", "--no-search", "model.device=cuda")
    for name in (
        "total on the GPU",
        "of it reserved by torch",
        "in tensors",
        "the most is needed in",
        "Next to other ways",
    ):
        assert name in out
    before, table, after = re.split(r"(Memory next to full fine-tuning.*?total(?:[^G]*GiB){2})", printed)
    named = re.findall(r"(\w+) +[\d.]+ GiB +[\d.]+ GiB", table.replace("GiB", "GiB "))
    assert named == ["weights", "gradients", "states", "else", "total"]
    figures = re.findall(r"[\d.]+ [GMK]iB", before + after)
    assert len(figures) == 4, "the plan twice, the optimizer's state, the peak"


def test_a_step_is_one_line_of_a_log_however_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_width", 40)
    record = {"step": 3, "loss": 1.5, "learning_rate": 1e-3, "tokens_per_second": 71.0, "peak_memory_bytes": 2**31}
    with console.capture() as captured:
        TrainingBar(3, memory="memory of the process")(record)
    line = "step 3/3  loss 1.5000  lr 1.0e-03  71 tokens/s  peak memory of the process 2.0 GiB\n"
    assert captured.get() == line


def test_a_log_says_how_long_the_steps_to_come_take_by_those_that_were_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step, which also prepares what later ones have, is left out; so is what a resumed run took before."""
    now = 1000.0
    monkeypatch.setattr(printing.time, "monotonic", lambda: now)
    record = {"loss": 1.5, "learning_rate": 1e-3, "tokens_per_second": 71.0, "peak_memory_bytes": 2**31}
    bar, lines = TrainingBar(10, first_step=4), []
    for step, seconds in ((5, 90), (6, 10), (7, 20), (10, 60)):
        now += seconds
        with console.capture() as captured:
            bar({**record, "step": step})
        lines.append(captured.get().rstrip("\n").partition("GiB")[2])
    assert lines == ["", "  about 40 s left", "  about 45 s left", ""]
