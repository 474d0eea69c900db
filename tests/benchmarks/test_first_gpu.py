"""The first-GPU script, dry: every stage on a CPU with a tiny model, in an environment with the lowest torch allowed.

QLORA_FLOOR_PYTHON names that environment's interpreter. No test asserts a time, and limits are ten times those of a
card, so a busy machine fails none; the whole takes ten minutes and more.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.first_gpu.cases import CASES
from benchmarks.first_gpu.profiling import covered

ROOT = Path(__file__).parents[2]
NUMBER = r"[\d,]*\d(\.\d+)?"
# By verdict, in the order they are said: what its line must hold.
FIGURES = {
    "env": r"env: no card, python 3\.\d+\.\d+, torch \d+\.\d+",
    "doctor": r"doctor: \d+ ok \d+ note \d+ problem",
    "tests-kernels": r"tests-kernels: [1-9]\d*/\d+ tests collected",
    "make": rf"make: {NUMBER} GB of random weights in {NUMBER} s",
    "load": rf"load: {NUMBER} s to NF4",
    **{
        case.name: rf"train {case.name} \(.*\): {NUMBER} tokens/s, loss {NUMBER} to {NUMBER}, {NUMBER} GiB reserved"
        for case in CASES
    },
    "profile of 2,048": rf"profile 64 tokens: a step {NUMBER} s, the processor busy {NUMBER} s .*\d+%",
    "profile of 16,384": rf"profile 128 tokens: a step {NUMBER} s, the processor busy {NUMBER} s .*\d+%",
    "resume": r"resume, by default: 4 steps repeated equal, resumed equal; [1-9]",
    "deterministic resume": r"resume, deterministic: 4 steps repeated equal, resumed equal; [1-9]",
    "generate": rf"generate, .*: auto x1 {NUMBER}, auto x8 {NUMBER}, reference x1 {NUMBER}, reference x8 {NUMBER}",
    "paging": r"paging: 0 bytes are paged here",
    "keep_adapter": rf"keep_adapter: an adapter of {NUMBER} MiB",
    "tests-runs": r"tests-runs: [1-9]\d*/\d+ tests collected",
    "peer, load": rf"peer: loaded in {NUMBER} s",
    "peer, 2,048": rf"peer 64 tokens: {NUMBER} tokens/s, {NUMBER} GiB reserved",
    "peer, 16,384": rf"peer 128 tokens: {NUMBER} tokens/s, {NUMBER} GiB reserved",
    "peer, generation": rf"peer generates {NUMBER} tokens/s",
    "kernels": rf"kernels \(RTX 4090, computed, {NUMBER} GB/s, \d+ TFLOP/s\): .*: ours {NUMBER} us \d+%",
    "hostcopy": rf"offload and tiled against full, .*: losses within {NUMBER}e[+-]\d+; tokens/s full {NUMBER}, offload",
    "merge": rf"merge: {NUMBER} GB in {NUMBER} s, KL {NUMBER}e[+-]\d+, relative error {NUMBER}e[+-]\d+, .* {NUMBER}%",
    "load memory-efficient": rf"load memory-efficient: {NUMBER} s to NF4",
    "contenders": rf"hand-written loop +{NUMBER}",
}
BAD = re.compile(r"exit|OUT OF TIME|KILLED|FAILED|left out|REFUSED|broken")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Runs the script dry with stages and variables; returns what it said. Calls with one `folder` share the work."""
    floor = os.environ.get("QLORA_FLOOR_PYTHON")
    if not floor:
        pytest.skip("QLORA_FLOOR_PYTHON names no interpreter with the lowest torch that pyproject.toml allows")
    base = tmp_path_factory.mktemp("first_gpu")

    def run(*stages: str, folder: str = "whole", **variables: str) -> list[str]:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "KIT_DRY": "1",
            "KIT_PATIENCE": "10",
            "KIT_PYTHON": floor,
            "KIT_WORK": str(base / folder),
            "OUT": str(base / folder / "out"),
            **variables,
        }
        environment.pop("PYTEST_ADDOPTS", None)
        command = ["bash", str(ROOT / "benchmarks/first_gpu/first_gpu.sh"), *stages]
        done = subprocess.run(command, cwd=base, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    return run


@pytest.fixture(scope="module")
def said(script: Callable[..., list[str]]) -> list[str]:
    """All that a whole dry run said, without the seconds before each line."""
    return [line[6:] for line in script()]


@pytest.mark.campaign
def test_every_stage_says_its_figure(said: list[str]) -> None:
    missing = [name for name, figure in FIGURES.items() if not any(re.match(figure, line.strip()) for line in said)]
    assert missing == [], "\n".join(said)


@pytest.mark.campaign
def test_no_stage_of_a_whole_run_fails_or_is_left_out(said: list[str]) -> None:
    assert [line for line in said if BAD.search(line)] == []
    assert said[-1].startswith("ended, ")


@pytest.mark.campaign
def test_figures_are_kept_as_numbers_too(script: Callable[..., list[str]], said: list[str], tmp_path: Path) -> None:
    script("env", folder="kept", OUT=str(tmp_path))
    (kept,) = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert kept["name"] == "env"
    assert kept["versions"]["torch"] in (tmp_path / "verdicts.txt").read_text()


@pytest.mark.campaign
def test_a_second_call_goes_on_where_the_first_ended(script: Callable[..., list[str]], said: list[str]) -> None:
    again = [line[6:] for line in script()]
    assert len(again) == 1, "everything was tried"
    assert again[0].startswith("ended, ")


@pytest.mark.campaign
def test_a_process_that_a_step_ends_is_said_and_the_other_steps_follow(
    script: Callable[..., list[str]], said: list[str]
) -> None:
    again = [line[6:] for line in script("2k-full", "generate", "paging", KIT_BREAK="generate:3")]
    steps = [line for line in again if not line.startswith("load: ")]
    assert [re.match(r"[\w-]+( 2k-full)?[:,]? ?", line)[0].strip() for line in steps] == [  # type: ignore[index]
        "train 2k-full",
        "big:",
        "paging:",
        "ended,",
    ]
    assert "big: exit 3" in again


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("stage", "command", "wanted"),
    [
        ("peer", "gpu_run.py peer", "peer: exit 7"),
        ("doctor", "qlora_trainer doctor", "doctor: exit 7"),
        ("make", "gpu_run.py make", "make: exit 7"),
        ("tests-runs", "pytest", "tests-runs: exit 7"),
        ("contenders", "benchmarks.gpu", "contenders: exit 7"),
    ],
)
def test_a_stage_whose_command_is_broken_says_so(
    script: Callable[..., list[str]], tmp_path: Path, stage: str, command: str, wanted: str
) -> None:
    python = interpreter_that(tmp_path, f'case "$*" in *"{command}"*) exit 7 ;; esac')
    assert any(line[6:].startswith(wanted) for line in script(stage, folder=f"broken-{stage}", KIT_PYTHON=python))


@pytest.mark.campaign
def test_a_part_that_raises_says_what_failed(script: Callable[..., list[str]]) -> None:
    lines = [line[6:] for line in script("peer", folder="no-adapter")]
    assert lines[0].startswith("peer: FAILED after ")
    assert "keep_adapter" in lines[0]
    assert lines[1] == "peer: exit 1"


@pytest.mark.campaign
def test_a_stage_that_outlasts_its_limit_says_so_and_what_has_no_time_left_is_left_out(
    script: Callable[..., list[str]], tmp_path: Path
) -> None:
    python = interpreter_that(tmp_path, 'case "$*" in *doctor*) sleep 600 ;; esac')
    lines = [line[6:] for line in script("doctor", "peer", folder="late", KIT_PYTHON=python, KIT_BUDGET="3")]
    assert lines[0].startswith("doctor: OUT OF TIME after ")
    assert any(line.startswith("peer: left out, ") for line in lines)


@pytest.mark.parametrize(
    ("line", "budget", "wanted"),
    [
        ("kill -9 $$", "60", r"doctor: KILLED after \d+ of \d+ s"),
        pytest.param("trap '' TERM; sleep 60", "22", r"doctor: OUT OF TIME after 2[012] s", marks=pytest.mark.campaign),
    ],
)
def test_a_stage_that_is_killed_for_memory_is_not_reported_as_out_of_time(
    tmp_path: Path, line: str, budget: str, wanted: str
) -> None:
    """Both end with exit code 137, the second as the kill that follows a TERM without effect."""
    python = interpreter_that(tmp_path, f'case "$*" in *doctor*) {line} ;; esac')
    variables = {"KIT_DRY": "1", "KIT_PYTHON": python, "KIT_BUDGET": budget, "KIT_WORK": str(tmp_path / "work")}
    command = ["bash", str(ROOT / "benchmarks/first_gpu/first_gpu.sh"), "doctor"]
    environment = {**os.environ, **variables, "OUT": str(tmp_path / "out")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert re.match(wanted, done.stdout[6:]), done.stdout + done.stderr


def interpreter_that(directory: Path, line: str) -> str:
    """An interpreter that does `line` first."""
    path = directory / "python"
    python = os.environ.get("QLORA_FLOOR_PYTHON", sys.executable)
    path.write_text(f'#!/usr/bin/env bash\n{line}\nexec "{python}" "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_a_card_is_busy_once_where_two_streams_overlap() -> None:
    assert covered([]) == 0
    assert covered([(5, 7), (0, 4), (1, 2), (3, 5.5)]) == 7
    assert covered([(0, 1), (2, 3)]) == 2


def test_every_case_is_a_step_and_the_script_names_every_step() -> None:
    pytest.importorskip("bitsandbytes")
    from benchmarks.first_gpu.steps import STEPS

    text = (ROOT / "benchmarks/first_gpu/first_gpu.sh").read_text()
    named = [name for line in re.findall(r"^big \d+ (.*)$", text, re.MULTILINE) for name in line.split()]
    assert named == list(STEPS)
    assert {case.name for case in CASES} <= STEPS.keys()


def test_the_script_needs_four_files_next_to_itself_only() -> None:
    """Where it travels with its wheels, these are copied; all else is imported from the checkout."""
    copied = {"first_gpu.sh", "gpu_run.py", "cases.py", "plans.py"}
    own = {path.name for path in (ROOT / "benchmarks/first_gpu").iterdir() if path.is_file()}
    assert copied <= own
    for name in copied - {"first_gpu.sh"}:
        text = (ROOT / "benchmarks/first_gpu" / name).read_text()
        assert {f"import {other[:-3]}" for other in own} & set(text.splitlines()) == set()
    used = set(re.findall(r"\$KIT/(\w+\.\w+)", (ROOT / "benchmarks/first_gpu/first_gpu.sh").read_text()))
    assert used <= copied | {"plans.json"}
