"""Directories that are written aside are whole or not there, whatever fails, and nothing of others is touched."""

import errno
from pathlib import Path

import psutil
import pytest

from qlora_trainer.common import atomic as directories
from qlora_trainer.common.atomic import new_directory, remove_leftovers, remove_leftovers_in, replaced_path
from qlora_trainer.common.errors import DiskError, OutputExistsError


def fail_in_new_directory(path: Path, failure: BaseException) -> None:
    with new_directory(path) as work:
        (work / "a.txt").write_text("a")
        raise failure


def fill_while_working(path: Path) -> None:
    with new_directory(path):
        path.mkdir()
        (path / "theirs").write_text("kept")


def test_new_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()  # an empty one is taken
    with new_directory(tmp_path / "out") as work:
        (work / "a.txt").write_text("a")
        assert not any((tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "a.txt").read_text() == "a"

    for failure in (ValueError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(failure)):
            fail_in_new_directory(tmp_path / "failed", failure)
    with pytest.raises(DiskError, match="Free some space"):
        fail_in_new_directory(tmp_path / "failed", OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(FileNotFoundError):  # not a failure of this disk
        fail_in_new_directory(tmp_path / "failed", FileNotFoundError(errno.ENOENT, "elsewhere"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_new_directory_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("full", "file"):
        with pytest.raises(OutputExistsError, match=name), new_directory(tmp_path / name):
            pytest.fail("work began")
    with pytest.raises(OutputExistsError):
        fill_while_working(tmp_path / "late")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "late"]
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "late" / "theirs").read_text() == "kept"


def test_a_directory_that_goes_while_it_is_locked_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, locked = directories._lock, []

    def lose_the_first(directory: Path) -> int | None:
        locked.append(directory)
        descriptor = lock(directory)
        if len(locked) == 1:
            directory.rmdir()
        return descriptor

    monkeypatch.setattr(directories, "_lock", lose_the_first)
    before = psutil.Process().num_fds()
    with new_directory(tmp_path / "out"):
        pass
    assert len(locked) == 2
    assert psutil.Process().num_fds() == before


def content(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def make(directory: Path, **files: str) -> Path:
    directory.mkdir()
    for name, text in files.items():
        (directory / name).write_text(text)
    return directory


def replace_and_fail(path: Path, failure: BaseException) -> None:
    with new_directory(path, replaces=True) as work:
        (work / "new").write_text("half")
        raise failure


def test_a_directory_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    path = make(tmp_path / "out", old="kept")
    for failure in (ValueError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(failure)):
            replace_and_fail(path, failure)
        assert content(path) == {"old": "kept"}
    with new_directory(path, replaces=True) as work:
        (work / "new").write_text("whole")
        assert content(path) == {"old": "kept"}
    assert content(path) == {"new": "whole"}
    with new_directory(tmp_path / "first", replaces=True):
        pass
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["first", "out"]


def test_a_file_is_never_replaced_by_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputExistsError), new_directory(tmp_path / "file", replaces=True):
        pytest.fail("work began")
    assert content(tmp_path) == {"file": "kept"}


@pytest.mark.parametrize("is_there", [False, True], ids=["killed before the new one had its name", "killed after"])
def test_what_was_being_replaced_comes_back_or_goes(tmp_path: Path, is_there: bool) -> None:
    path = tmp_path / "o*t"  # a name with a pattern in it
    make(replaced_path(path), old="kept")
    make(replaced_path(tmp_path / "other"), theirs="kept")
    if is_there:
        make(path, new="whole")
    remove_leftovers(path)
    assert content(path) == ({"new": "whole"} if is_there else {"old": "kept"})
    assert not replaced_path(path).exists()
    assert content(replaced_path(tmp_path / "other")) == {"theirs": "kept"}


def test_all_that_killed_processes_left_in_a_folder_is_removed_but_what_a_living_one_works_in(tmp_path: Path) -> None:
    make(tmp_path / ".first.partial-00000000", half="")
    make(tmp_path / ".second.replaced", old="kept")
    make(tmp_path / "third", whole="kept")
    make(tmp_path / ".third.replaced", old="")
    make(tmp_path / ".hidden", theirs="kept")
    with new_directory(tmp_path / "fourth") as work:
        remove_leftovers_in(tmp_path)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([work.name, ".hidden", "second", "third"])
    assert content(tmp_path / "second") == {"old": "kept"}
    assert content(tmp_path / "third") == {"whole": "kept"}


def test_a_directory_that_cannot_be_locked_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(directory: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(directories, "_lock", full)
    with pytest.raises(DiskError, match="Free some space"), new_directory(tmp_path / "out"):
        pytest.fail("work began")
    assert not any(tmp_path.iterdir())
