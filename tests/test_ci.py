"""What runs before a change is merged: a workflow that calls .ci/run, and a hook that reads a commit's subject."""

import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def test_workflow_calls_what_runs_here() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]


def words(command: str) -> tuple[str, ...]:
    """A program and what follows it: `ruff format` is another command than `ruff check`."""
    return tuple(command.split()[:2])


def test_hooks_are_local_and_run_what_make_check_runs() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (repository,) = config["repos"]
    assert repository["repo"] == "local"
    called = {words(hook["entry"]) for hook in repository["hooks"]}
    makefile = (ROOT / "Makefile").read_text()
    (check,) = [part for part in makefile.split("\n\n") if part.startswith("check:")]
    assert called == {words(line) for line in check.splitlines()[1:]} | {(".ci/commit_subject",)}


@pytest.mark.parametrize(
    ("message", "accepted"),
    [
        ("merging: read a shard once\n\nIt was read twice.\n", True),
        ("tests/data: split the file's tests by subject\n", True),
        ("Merge branch 'next'\n", True),
        (f"merging: {'a ' * 31}b\n", True),
        (f"merging: {'a ' * 31}bc\n", False),
        ("Merging: read a shard once\n", False),
        ("read a shard once\n", False),
        ("merging: Read a shard once\n", False),
        ("merging: read\n", False),
        ("merging: read a shard once.\n", False),
    ],
)
def test_a_subject_names_its_area_and_what_it_does_in_72_characters(
    tmp_path: Path, message: str, accepted: bool
) -> None:
    (tmp_path / "message").write_text(message)
    done = subprocess.run([ROOT / ".ci/commit_subject", tmp_path / "message"], capture_output=True, text=True)
    assert done.returncode == (0 if accepted else 1), done.stderr
    assert accepted or message.splitlines()[0] in done.stderr
