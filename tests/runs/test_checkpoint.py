"""Checkpoints: whole at every moment, whatever dies; damage is noticed; random states come back."""

import errno
import json
import os
import resource
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from safetensors.torch import save_file

from qlora_trainer.common.errors import CheckpointError, DiskError
from qlora_trainer.runs import checkpoint
from qlora_trainer.runs.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint

FILES = {
    "adapter_model.safetensors",
    "adapter_config.json",
    "trainer_state.safetensors",
    "trainer_state.json",
    "manifest.json",
}


def save(run_dir: Path, step: int, *, mark: int | None = None, keep: int = 3) -> Path:
    """A checkpoint whose every part tells its mark (the step, if not given)."""
    value = step if mark is None else mark

    def write_adapter(directory: Path) -> None:
        (directory / "adapter_config.json").write_text(json.dumps({"mark": value}))
        save_file({"lora_A": torch.full((64,), float(value))}, directory / "adapter_model.safetensors")

    tensors = {"state1": torch.full((100,), float(value))}
    return save_checkpoint(
        run_dir, step, write_adapter=write_adapter, tensors=tensors, state={"mark": value}, keep=keep
    )


def mark_of(path: Path) -> int:
    """The mark, after asserting that every part of the checkpoint has the same."""
    tensors, state = load_checkpoint(path)
    mark = state["mark"]
    assert torch.equal(tensors["state1"], torch.full((100,), float(mark)))
    assert json.loads((path / "adapter_config.json").read_text()) == {"mark": mark}
    assert isinstance(mark, int)
    return mark


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_checkpoint_gives_back_what_was_saved(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    assert path == tmp_path / "checkpoints" / "step-000100"
    assert {file.name for file in path.iterdir()} == FILES
    assert newest_checkpoint(tmp_path) == (path, 100, [])
    assert mark_of(path) == 100


def test_files_have_the_mode_of_plain_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}


def test_the_newest_are_kept_and_the_order_is_by_number(tmp_path: Path) -> None:
    for step in (8, 9, 10, 999_999, 1_000_000):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-1000000", "step-999999"]
    assert newest_checkpoint(tmp_path).step == 1_000_000


def test_keeping_one_never_deletes_the_new_one(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["step-000002"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5, mark=1)
    save(tmp_path, 5, mark=2)
    assert names(tmp_path) == ["step-000005"]
    assert mark_of(newest_checkpoint(tmp_path).path) == 2


def test_a_killed_runs_leftovers_go_with_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 1)
    leftover = tmp_path / "checkpoints" / ".step-000002.partial-99999999"
    leftover.mkdir()
    (leftover / "trainer_state.json").write_text("{")
    assert newest_checkpoint(tmp_path).step == 1
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_a_replaced_checkpoint_is_used_until_its_replacement_is_there(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    aside = path.with_name(".step-000001.replaced")
    path.rename(aside)
    assert newest_checkpoint(tmp_path) == (aside, 1, [])
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-000001", "step-000002"]
    (tmp_path / "checkpoints" / ".step-000002.replaced").mkdir()
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-000001", "step-000002", "step-000003"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_all_is_synced_before_the_checkpoint_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    rename = Path.rename

    def noted_rename(path: Path, target: Path) -> Path:
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", lambda fd: events.append(Path(f"/proc/self/fd/{fd}").readlink().name))
    monkeypatch.setattr(Path, "rename", noted_rename)
    save(tmp_path, 1)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert set(before[:-1]) == FILES
    assert before[-1].startswith(".step-000001.partial-")
    assert after == ["checkpoints"]


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_flipped_bit_anywhere_is_noticed_and_the_older_checkpoint_is_used(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    content = bytearray(file.read_bytes())
    for position in range(0, len(content), max(1, len(content) // 40)):
        damaged = content.copy()
        damaged[position] ^= 4
        file.write_bytes(damaged)
        try:
            assert load_checkpoint(file.parent)[1] == {"mark": 2}
        except CheckpointError:
            found = newest_checkpoint(tmp_path)
            assert found.step == 1
            assert "step-000002" in found.passed_over[0]
        else:
            assert name == "manifest.json"  # a flip in white space or in the step it repeats


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_or_shortened_file_is_noticed(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    file.write_bytes(file.read_bytes()[:-1])
    assert newest_checkpoint(tmp_path).step == 1
    file.unlink()
    found = newest_checkpoint(tmp_path)
    assert found.step == 1
    assert f"{name} is missing" in found.passed_over[0]


def test_no_checkpoint_and_only_damaged_ones_get_their_own_messages(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no checkpoint in"):
        newest_checkpoint(tmp_path)
    path = save(tmp_path, 1)
    (path / "trainer_state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"(?s)can be used.*trainer_state\.json has 2 bytes"):
        newest_checkpoint(tmp_path)


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    manifest = save(tmp_path, 1) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(CheckpointError, match="format 2"):
        load_checkpoint(manifest.parent)


def test_a_manifest_cannot_point_outside_its_directory(tmp_path: Path) -> None:
    manifest = save(tmp_path, 1) / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["../../config.yaml"] = {"bytes": 0, "sha256": ""}
    manifest.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="wrong entry"):
        load_checkpoint(manifest.parent)


def test_huge_json_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "MAX_CHECKPOINT_JSON_BYTES", 10)
    with pytest.raises(CheckpointError, match="more than the 10"):
        load_checkpoint(path)


# What kills a save. Each save runs in a forked child; `at_operation` acts at its n-th operation on the disk: whatever
# Python asks of the file system (by audit events) and every fsync, before which the file may be torn.

CREATING = {"open", "os.mkdir", "os.rename", "os.chmod"}
DELETING = {"os.remove", "os.rmdir"}  # by shutil.rmtree, which gives names without their directory


def in_child(work: Callable[[], None]) -> int:
    """Run in a fork; returns its exit code, negative for a signal. 0: done, 1: DiskError, 2: anything else."""
    child = os.fork()
    if child == 0:
        code = 2
        try:
            work()
            code = 0
        except DiskError:
            code = 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_operation(number: int, run_dir: Path, act: Callable[[int | None], None]) -> Callable[[], bool]:
    """Call `act` at the n-th disk operation from here on; it gets the open file at an fsync, else None.

    Returns a function that says whether it came to that.
    """
    count = 0

    def operation(descriptor: int | None = None) -> None:
        nonlocal count
        count += 1
        if count == number:
            act(descriptor)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in DELETING or (event in CREATING and str(run_dir) in str(arguments[0])):
            operation()

    def counted_fsync(descriptor: int) -> None:  # not the real one, which takes long; what it is for, `kill` plays
        operation(descriptor)
        operation()

    os.fsync = counted_fsync  # type: ignore[assignment]
    sys.addaudithook(audit)
    return lambda: count >= number


def kill(descriptor: int | None) -> None:
    """Die as by a power cut: what was not yet synced is torn."""
    if descriptor is not None and stat.S_ISREG(os.fstat(descriptor).st_mode):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        os.truncate(path, os.fstat(descriptor).st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk(descriptor: int | None) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks and reads /proc")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("step", slow_but([2, 1], 1), ids=["of the next step", "in place of the same step"])
@pytest.mark.parametrize("act", slow_but([kill, fill_disk], kill))
def test_a_save_that_dies_at_any_write_leaves_a_whole_checkpoint(
    tmp_path: Path, step: int, act: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    finished = 3
    outcomes = []
    first = 1 if act is kill else 2  # making `checkpoints`, which is there already, may fail without harm
    for number in range(first, 200):
        run_dir = tmp_path / str(number)
        save(run_dir, 1, mark=1)

        def dying_save(run_dir: Path = run_dir, number: int = number) -> None:
            was_reached = at_operation(number, run_dir, act)
            save(run_dir, step, mark=2, keep=1)
            if not was_reached():
                os._exit(finished)

        code = in_child(dying_save)
        found = newest_checkpoint(run_dir)
        outcomes.append((code, mark_of(found.path)))
        assert found.passed_over == [], f"operation {number} left a damaged checkpoint"
        if act is fill_disk:
            assert not any(".partial-" in name for name in names(run_dir))
        save(run_dir, 3, keep=1)
        assert names(run_dir) == ["step-000003"], f"operation {number} left something for ever"
        if code == finished:
            break
    codes, marks = zip(*outcomes, strict=True)
    assert codes[-1] == finished
    assert len(codes) > 25, "the operations are really counted"
    assert set(codes[:-1]) == {-signal.SIGKILL if act is kill else 1}
    assert list(marks) == sorted(marks), "once the new checkpoint is there, it stays"
    assert marks[0] == 1
    assert marks[-1] == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_disk_that_is_full_after_so_many_bytes_loses_nothing(tmp_path: Path) -> None:
    """The system's own refusal, in the middle of each file, safetensors' too."""
    save(tmp_path, 1)
    sizes = {path.name: path.stat().st_size for path in newest_checkpoint(tmp_path).path.iterdir()}
    for limit in [size - 1 for size in sizes.values()]:

        def limited_save(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            save(tmp_path, 2)

        assert in_child(limited_save) == 1
        assert names(tmp_path) == ["step-000001"]
        assert mark_of(newest_checkpoint(tmp_path).path) == 1


def test_a_full_disk_is_reported_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", fill_disk)
    with pytest.raises(DiskError, match=r"step 2 .*No space left.*Earlier checkpoints are untouched.*Free some space"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-000001"]


def test_an_interrupted_save_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted(directory: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 1, write_adapter=interrupted, tensors={}, state={}, keep=1)
    assert names(tmp_path) == []
