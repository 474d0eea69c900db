"""Promises of a merge that is cut short: the target is whole or not there, and the base is as it was."""

import errno
import hashlib
import os
import re
import resource
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from marks import slow_but
from merge_runs import LLAMA, Run, make_base, merge_to, stored, train
from transformers import LlamaConfig

from qlora_trainer.common.atomic import new_directory
from qlora_trainer.common.errors import DiskError
from qlora_trainer.merging import fold as merging
from qlora_trainer.weights import shard_writer

SHARD_BYTES = 150_000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = LlamaConfig(**{**LLAMA, "num_hidden_layers": 1})
    directory = make_base(tmp_path_factory.mktemp("base"), config)
    (directory / "tokenizer.json").write_text("{}")
    return train(directory)


def content(directory: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of change of every file."""
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(directory.iterdir())
    }


AtOperation = Callable[[int, Callable[[], None]], Callable[[], int]]


@pytest.fixture
def at_operation(monkeypatch: pytest.MonkeyPatch) -> AtOperation:
    """Have something done at the n-th operation on the disk from then on: what a merge writes, flushes and renames.

    It returns a function that says how many operations there were. Flushing a directory is none: where that fails, a
    power cut loses a name, and nothing else.
    """
    operations = [
        (shard_writer, "tensor_bytes"),
        (os, "fsync"),
        (os, "rename"),
        (os, "replace"),
        (shutil, "copyfile"),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name in operations]

    def prepare(number: int, act: Callable[[], None]) -> Callable[[], int]:
        count = 0

        def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                nonlocal count
                is_directory = name == "fsync" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode)
                count += not is_directory
                if count == number and not is_directory:
                    act()
                return original(*arguments, **named)

            return call

        for owner, name, original in originals:
            monkeypatch.setattr(owner, name, counted(name, original))
        return lambda: count

    return prepare


def fill_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_at_any_operation_is_one_message_and_leaves_nothing(
    run: Run, tmp_path: Path, at_operation: AtOperation
) -> None:
    before = content(run.inputs.base.path)
    for number in range(1, 1000):
        count = at_operation(number, fill_disk)
        try:
            merge_to(run.inputs, tmp_path / "merged", max_shard_bytes=SHARD_BYTES)
            break
        except DiskError as error:
            reported = str(error)
        assert count() >= number
        assert re.search(r"No space left on device.*Free some space", reported)
        assert not any(tmp_path.iterdir()), f"operation {number} left something"
    assert count() < number
    assert number > 30, "the operations are really counted"
    assert content(run.inputs.base.path) == before
    assert len(stored(tmp_path / "merged")) == len(stored(run.inputs.base.path))


def test_a_file_that_may_grow_no_further_is_one_message_and_leaves_nothing(run: Run, tmp_path: Path) -> None:
    """By the system itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD_BYTES // 2, hard))
    try:
        with pytest.raises(DiskError, match=r"File too large.*smaller shards"):
            merge_to(run.inputs, tmp_path / "merged", max_shard_bytes=SHARD_BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("part", slow_but(range(4), 2))
def test_a_killed_merge_leaves_nothing_that_looks_whole_and_the_next_one_clears_up(
    run: Run,
    tmp_path: Path,
    part: int,
    at_operation: AtOperation,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed at every fourth operation, from the first, second, third or fourth on."""
    before = content(run.inputs.base.path)
    output = tmp_path / "merged"
    codes = []
    for number in range(part + 1, 1000, 4):
        child = os.fork()
        if child == 0:
            try:
                at_operation(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
                merge_to(run.inputs, output, max_shard_bytes=SHARD_BYTES)
            finally:
                os._exit(7)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        if output.exists():
            break
        assert all(path.name.startswith(".merged.partial-") for path in tmp_path.iterdir())
    assert set(codes[:-1]) == {-signal.SIGKILL}
    assert len(codes) > 8
    assert content(run.inputs.base.path) == before
    assert len(stored(output)) == len(stored(run.inputs.base.path))
    assert [path.name for path in tmp_path.iterdir()] == ["merged"], "each removed what the one before it left"


def test_what_a_living_merge_works_in_is_spared_and_a_killed_ones_space_counts_as_free(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / ".merged.partial-00000000"
    killed.mkdir()
    (killed / "model.safetensors").write_bytes(b"half")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0 if killed.exists() else 2**40))
    with new_directory(tmp_path / "merged") as alive:
        (alive / "mine").write_text("mine")
        merge_to(run.inputs, tmp_path / "merged")
        assert (alive / "mine").read_text() == "mine"
        (tmp_path / "merged").rename(tmp_path / "first")
    assert not killed.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "merged"]


def test_names_with_patterns_in_them_are_not_taken_for_others(run: Run, tmp_path: Path) -> None:
    (tmp_path / ".merged.partial-00000000").mkdir()
    merge_to(run.inputs, tmp_path / "m*")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".merged.partial-00000000", "m*"]


def test_a_bit_that_flips_after_it_was_written_is_found_whatever_it_is(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify_files = merging.verify_files
    for place in (0, 1, 777, -1):

        def flip(work: Path, *rest: Any, place: int = place) -> None:
            file = sorted(work.glob("*.safetensors"))[-1]
            raw = bytearray(file.read_bytes())
            raw[place if place < 0 else 8 + int.from_bytes(raw[:8], "little") + place] ^= 1
            file.write_bytes(raw)
            verify_files(work, *rest)

        monkeypatch.setattr(merging, "verify_files", flip)
        with pytest.raises(merging.MergeError, match="is not what was written"):
            merge_to(run.inputs, tmp_path / "merged", dtype=torch.float32, max_shard_bytes=SHARD_BYTES)
        assert not any(tmp_path.iterdir())
