"""The torch floor's script says in one line what it found; a floor that was not run is a failure only if required."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
JUNIT = '<testsuites><testsuite name="pytest">{}</testsuite></testsuites>'
RAN, SKIPPED = '<testcase classname="a" name="{}"/>', '<testcase classname="a" name="{}"><skipped/></testcase>'


def floor(cache: Path, python: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script with a stand-in for python3.12: bash, which passes on to the real one but for what it fails."""
    commands = cache.parent / "commands"
    commands.mkdir()
    (commands / "python3.12").write_text(f'#!/bin/bash\n{python}\nexec {sys.executable} "$@"\n')
    (commands / "python3.12").chmod(0o755)
    settings = {key: value for key, value in os.environ.items() if key != "CI_FLOOR"}
    settings |= {"XDG_CACHE_HOME": str(cache), "PATH": f"{commands}:{os.environ['PATH']}", **environment}
    return subprocess.run([ROOT / ".ci/floor"], env=settings, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("setting", "code"), [("", 0), ("required", 1)])
def test_floor_that_cannot_be_installed_is_reported_and_leaves_nothing(tmp_path: Path, setting: str, code: int) -> None:
    full = '[ "$1 $2" != "-m venv" ] || { echo "WARNING: nothing"; echo "no space left" >&2; touch "$3/half"; exit 1; }'
    done = floor(tmp_path / "cache", full, CI_FLOOR=setting)
    assert done.returncode == code
    assert done.stdout == "torch floor: NOT RUN, its environment cannot be made: no space left\n"
    assert list((tmp_path / "cache/qlora-trainer/floor").iterdir()) == []


def test_floor_without_a_cache_is_reported(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    done = floor(tmp_path / "cache", "")
    assert done.returncode == 0
    assert done.stdout == f"torch floor: NOT RUN, {tmp_path}/cache/qlora-trainer/floor cannot be made\n"


def result(tmp_path: Path, floor_cases: str, tested_cases: str) -> tuple[int, str]:
    paths = [tmp_path / "floor.xml", tmp_path / "tested.xml"]
    for path, cases in zip(paths, (floor_cases, tested_cases), strict=True):
        path.write_text(JUNIT.format(cases))
    command = [sys.executable, str(ROOT / ".ci/floor_result.py"), "2.11.0", *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_floor_counts_what_passed(tmp_path: Path) -> None:
    both = RAN.format("x") + RAN.format("y") + SKIPPED.format("z")
    assert result(tmp_path, both, both) == (0, "torch floor 2.11.0: 2 passed\n")


def test_floor_may_skip_nothing_that_runs_on_the_tested_torch(tmp_path: Path) -> None:
    code, reported = result(tmp_path, RAN.format("x") + SKIPPED.format("y"), RAN.format("x") + RAN.format("y"))
    assert code == 1
    assert "FAILED" in reported
    assert "a::y" in reported


def test_floor_must_collect_what_the_tested_torch_runs(tmp_path: Path) -> None:
    """As where a module that cannot be imported leaves nothing to test, skipped or not."""
    code, reported = result(tmp_path, RAN.format("x"), RAN.format("x") + RAN.format("y"))
    assert (code, reported.splitlines()[1:]) == (1, ["  a::y"])


def test_floor_is_reported_where_pip_ends_without_a_word(tmp_path: Path) -> None:
    done = floor(tmp_path / "cache", '[ "$1 $2" != "-m venv" ] || { echo "WARNING: nothing"; exit 137; }')
    assert done.returncode == 0
    assert done.stdout == "torch floor: NOT RUN, its environment cannot be made: pip ended without a word\n"


def test_floor_on_which_nothing_ran_has_failed(tmp_path: Path) -> None:
    code, reported = result(tmp_path, SKIPPED.format("x"), SKIPPED.format("x"))
    assert (code, reported) == (1, "torch floor 2.11.0: FAILED, no test ran\n")


def test_the_files_that_floor_runs_are_there() -> None:
    named = re.findall(r"tests/\S+\.py", (ROOT / ".ci/floor").read_text())
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).is_file()] == []
