"""Promises of what is remembered of files: found while each of them is the same, and never for another."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from qlora_trainer.common import file_identity
from qlora_trainer.common.file_identity import FileIdentity, FileRecords, file_sha256

LATER = time.time_ns() + 10**15


def two_files(directory: Path) -> list[FileIdentity]:
    for name in ("one", "two"):
        (directory / name).write_text(name)
    return [FileIdentity.of(directory / name) for name in ("one", "two")]


def test_a_files_sha256_is_that_of_its_content_and_each_block_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_identity, "_BLOCK_BYTES", 7)
    (tmp_path / "file").write_bytes(content := os.urandom(20))
    blocks: list[bytes] = []
    assert file_sha256(tmp_path / "file", blocks.append) == hashlib.sha256(content).hexdigest()
    assert [len(block) for block in blocks] == [7, 7, 6]
    assert b"".join(blocks) == content


def test_what_was_kept_is_found_while_all_files_are_the_same(tmp_path: Path) -> None:
    files, records = two_files(tmp_path), FileRecords(tmp_path / "records")
    records.keep("both: \ud800", files, {"found": [1, 2.5]}, LATER)
    assert records.find("both: \ud800", files) == {"found": [1, 2.5]}
    assert records.find("another subject", files) is None
    assert records.find("both: \ud800", files[:1]) is None
    (tmp_path / "two").write_text("too")
    assert records.find("both: \ud800", [FileIdentity.of(tmp_path / name) for name in ("one", "two")]) is None
    assert files[0].is_current()
    assert not files[1].is_current()
    records.forget("both: \ud800")
    assert records.find("both: \ud800", files) is None
    records.forget("both: \ud800")  # which is gone already


@pytest.mark.parametrize("change", ["in place", "in place, its time put back", "by another file", "gone"])
def test_what_changed_while_it_was_read_is_not_kept(tmp_path: Path, change: str) -> None:
    files, records = two_files(tmp_path), FileRecords(tmp_path / "records")
    path = tmp_path / "one"
    before = path.stat()
    time.sleep(0.05)  # longer than a tick of this machine's clock
    if change == "by another file":
        (tmp_path / "other").write_text("one")
        os.utime(tmp_path / "other", ns=(before.st_atime_ns, before.st_mtime_ns))
        (tmp_path / "other").replace(path)
    elif change == "gone":
        path.unlink()
    else:
        path.write_text("eno")
        if change.endswith("put back"):
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    records.keep("both", files, "content", LATER)
    assert records.find("both", files) is None


def test_what_was_written_within_a_tick_of_a_file_systems_clock_is_not_kept(tmp_path: Path) -> None:
    """The file may change once more and keep its time."""
    files, records = two_files(tmp_path), FileRecords(tmp_path / "records")
    newest = max(file.ctime_ns for file in files)
    records.keep("both", files, "content", newest + file_identity.CLOCK_TICK_NS)
    assert records.find("both", files) is None
    records.keep("both", files, "content", newest + file_identity.CLOCK_TICK_NS + 1)
    assert records.find("both", files) == "content"


def test_a_damaged_record_is_as_none_and_is_replaced(tmp_path: Path) -> None:
    files, records = two_files(tmp_path), FileRecords(tmp_path / "records")
    records.keep("both", files, "content", LATER)
    (entry,) = (tmp_path / "records").iterdir()
    for damage in (b"", b"[]", b"{}", b"\xff", b"[" * 100_000, entry.read_bytes()[:-5]):
        entry.write_bytes(damage)
        assert records.find("both", files) is None
        records.keep("both", files, "content", LATER)
        assert records.find("both", files) == "content"


def test_records_that_cannot_be_written_cost_only_time(tmp_path: Path) -> None:
    files = two_files(tmp_path)
    records = FileRecords(tmp_path / "one" / "records")  # in a file, where a folder should be
    records.keep("both", files, "content", LATER)
    assert records.find("both", files) is None
