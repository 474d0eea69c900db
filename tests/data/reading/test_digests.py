"""Promises of remembered digests: a still file is read once; a changed one is always read again."""

import hashlib
import os
import time

import pytest
from spying import noting

from qlora_trainer.common.file_identity import FileIdentity
from qlora_trainer.data.reading import digests
from qlora_trainer.data.reading.digests import FileDigests

LONG_AGO = 3600 * 10**9


@pytest.fixture
def reads(monkeypatch):
    """The files that were really read."""
    found = []
    read = digests._read
    monkeypatch.setattr(digests, "_read", noting(read, lambda path: found.append(path.name)))
    return found


@pytest.fixture
def later(monkeypatch):
    """An hour later: what was written before lies still since then, though its ctime cannot be set back."""
    now = time.time_ns
    monkeypatch.setattr(digests.time, "time_ns", lambda: now() + LONG_AGO)


def content(tmp_path, path):
    return FileDigests(tmp_path / "cache").content(path)


def test_a_file_that_lies_still_is_read_once(tmp_path, reads, later):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"one\ntwo\n")
    first, second = content(tmp_path, path), content(tmp_path, path)
    assert first == second
    assert first.sha256 == hashlib.sha256(b"one\ntwo\n").hexdigest()
    assert first.lines == 2
    assert reads == ["rows.jsonl"]


def test_a_file_written_just_now_is_not_believed_next_time(tmp_path, reads, monkeypatch):
    """Its clock may stop while it is written again, so that size and times stay what they were."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"one")
    identity = FileIdentity.of(path)
    monkeypatch.setattr(FileIdentity, "of", lambda path: identity)
    first = content(tmp_path, path)
    path.write_bytes(b"two")
    assert content(tmp_path, path) != first
    assert reads == ["rows.jsonl"] * 2


@pytest.mark.parametrize("restore_time", [False, True])
def test_a_changed_file_is_read_again_even_where_its_time_was_put_back(tmp_path, reads, later, restore_time):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"one")
    before, first = path.stat(), content(tmp_path, path)
    time.sleep(0.05)  # longer than a tick of this machine's clock
    path.write_bytes(b"two")
    if restore_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert content(tmp_path, path) != first


def test_another_file_under_the_same_name_is_read(tmp_path, reads, later):
    path, other = tmp_path / "rows.jsonl", tmp_path / "other"
    path.write_bytes(b"one")
    other.write_bytes(b"two")
    first = content(tmp_path, path)
    other.replace(path)
    assert content(tmp_path, path) != first


def test_a_damaged_memory_is_made_anew(tmp_path, reads, later):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"one")
    first = content(tmp_path, path)
    (entry,) = (tmp_path / "cache").iterdir()
    for damage in (b"", b"{}", b"[]", b"\xff", entry.read_bytes()[:-5]):
        entry.write_bytes(damage)
        assert content(tmp_path, path) == first
    assert len(reads) == 6


def test_a_memory_that_cannot_be_written_costs_only_time(tmp_path, reads, later):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"one")
    (tmp_path / "cache").write_text("a file, where a directory should be")
    assert content(tmp_path, path) == content(tmp_path, path)
    assert len(reads) == 2


def test_files_that_change_while_they_are_read_are_named(tmp_path):
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_bytes(b"one")
    taken = FileDigests(tmp_path / "cache")
    for path in paths:
        taken.content(path)
    assert taken.changed() == []
    paths[0].write_bytes(b"two")
    paths[1].unlink()
    assert taken.changed() == paths[:2]
