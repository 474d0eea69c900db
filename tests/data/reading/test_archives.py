"""Files of archives are read as if they were unpacked; what is cut off, encrypted or leads out is refused."""

import gzip
import io
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow
import pytest
from advice import run_command_in, settings_in

from qlora_trainer.common.errors import DataError, DiskError
from qlora_trainer.data.reading import archives
from qlora_trainer.data.reading.files import Content, check_path, open_source

A, B = {"text": "a"}, {"text": "b"}
LINES = b'{"text": "a"}\n{"text": "b"}\n'


def rows(path: Path, **how: Any) -> list[tuple[str, Any]]:
    return list(open_source(str(path), **how).records())


def tar(path: Path, mode: str, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tgz", "x.tar.bz2", "x.tar.xz", "x.tar.zst"])
def test_the_files_of_an_archive_are_read_in_its_order(tmp_path, name):
    files = {
        "part/2.jsonl": LINES,
        "part/1.jsonl.gz": gzip.compress(b'{"text": "c"}\n'),
        "README.md": b"x",
        ".DS_Store": b"x",
        "__MACOSX/part/._2.jsonl": b"junk",
    }
    path = tmp_path / name
    if name == "x.zip":
        zipped(path, files)
    elif name.endswith(".zst"):
        plain = tar(tmp_path / "x.tar", "w", files)
        path.write_bytes(pyarrow.compress(plain.read_bytes(), codec="zstd", asbytes=True))
    else:
        tar(path, {"x.tar": "w", "x.tar.bz2": "w:bz2", "x.tar.xz": "w:xz"}.get(name, "w:gz"), files)
    assert rows(path) == [
        (f"{name}/part/2.jsonl, line 1", A),
        (f"{name}/part/2.jsonl, line 2", B),
        (f"{name}/part/1.jsonl.gz, line 1", {"text": "c"}),
    ]
    said = open_source(str(path)).summary
    assert said.startswith(f"{name}: 2 files are read: {name}/part/2.jsonl, {name}/part/1.jsonl.gz")
    assert said.endswith(f"passed over: {name}/README.md")


def test_binary_files_in_an_archive_are_read_too(tmp_path):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([A, B]), tmp_path / "x.parquet")
    path = zipped(tmp_path / "x.zip", {"x.parquet": (tmp_path / "x.parquet").read_bytes()})
    assert [row for _, row in rows(path)] == [A, B]


def test_a_file_is_unpacked_one_at_a_time_and_nothing_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(archives.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    path = zipped(tmp_path / "x.zip", {f"{n}.jsonl": LINES for n in range(5)})
    reader = open_source(str(path)).records()
    for _ in range(10):
        next(reader)
        assert len(list((tmp_path / "tmp").iterdir())) == 1
    reader.close()  # type: ignore[attr-defined]
    assert not list((tmp_path / "tmp").iterdir())


def test_a_disk_without_space_for_a_file_of_an_archive_is_said(tmp_path, monkeypatch):
    path = zipped(tmp_path / "x.zip", {"a.jsonl": LINES})
    monkeypatch.setattr(
        archives.shutil, "disk_usage", lambda _: os.terminal_size((0, 0)) and type("U", (), {"free": 1})
    )
    with pytest.raises(DiskError, match=r"a.jsonl needs .* more than is free there.*Set TMPDIR"):
        rows(path)


@pytest.mark.parametrize("length", [512, 1024, 1100, 1536, 2048, 2100])
def test_a_tar_that_is_cut_anywhere_is_refused(tmp_path, length):
    whole = tar(tmp_path / "x.tar", "w", {"a.jsonl": LINES, "b.jsonl": LINES}).read_bytes()
    (tmp_path / "y.tar").write_bytes(whole[:length])
    with pytest.raises(DataError, match="the archive is broken or cut off"):
        rows(tmp_path / "y.tar")


def test_a_broken_zip_is_refused(tmp_path):
    whole = bytearray(zipped(tmp_path / "x.zip", {"a.jsonl": os.urandom(5000).hex().encode()}).read_bytes())
    (tmp_path / "cut.zip").write_bytes(whole[:-30])
    with pytest.raises(DataError, match=r"cut.zip: the archive is broken or cut off"):
        rows(tmp_path / "cut.zip")
    whole[1000] ^= 0xFF
    (tmp_path / "flipped.zip").write_bytes(whole)
    with pytest.raises(DataError, match=r"flipped.zip, a.jsonl: the archive is broken or cut off"):
        rows(tmp_path / "flipped.zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_with_any_wrong_byte_is_read_or_refused_with_what_to_do(tmp_path, method):
    """In whatever part of it: a member's header, its name, its data, the directory at the end."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        archive.writestr("\xe4.jsonl", LINES * 4)
    whole = (tmp_path / "x.zip").read_bytes()
    messages = []
    for position in range(len(whole)):
        (tmp_path / "y.zip").write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            assert [row for _, row in rows(tmp_path / "y.zip")] == [A, B] * 4
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > len(whole) // 3
    assert [said for said in messages if "y.zip" not in said or "Look at the disk" in said] == []


def test_a_zip_of_an_unknown_compression_says_how_it_is_read(tmp_path):
    path = zipped(tmp_path / "x.zip", {"a.jsonl": LINES})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 10] = 9  # Deflate64, as Windows packs large files
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x.zip, a.jsonl: .*not supported.* Unpack it: unzip"):
        rows(path)


@pytest.mark.parametrize(
    "name", ["/etc/rows.jsonl", "../rows.jsonl", "a/../../rows.jsonl", "C:\\rows.jsonl", "..\\x.md"]
)
def test_a_name_that_leads_out_of_the_archive_is_refused(tmp_path, name):
    for path in (tar(tmp_path / "x.tar", "w", {name: LINES}), zipped(tmp_path / "x.zip", {name: LINES})):
        with pytest.raises(DataError, match="leads out of it"):
            open_source(str(path))


def test_links_and_files_that_are_in_twice_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        info = tarfile.TarInfo("rows.jsonl")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(DataError, match=r"rows.jsonl is a link or no plain file"):
        open_source(str(tmp_path / "x.tar"))
    with tarfile.open(tmp_path / "y.tar", "w") as archive:
        for content in (LINES, b""):
            info = tarfile.TarInfo("rows.jsonl")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with pytest.raises(DataError, match=r"rows.jsonl is in it twice"):
        open_source(str(tmp_path / "y.tar"))


def test_an_archive_in_an_archive_is_read_once_unpacked_as_the_message_says(tmp_path):
    inner = zipped(tmp_path / "inner.zip", {"a.jsonl": LINES}).read_bytes()
    for path in (tar(tmp_path / "x.tar", "w", {"in.zip": inner}), zipped(tmp_path / "y.zip", {"in.zip": inner})):
        with pytest.raises(DataError, match=r"in.zip is an archive in it. Unpack it") as raised:
            open_source(str(path))
        run_command_in(str(raised.value))
        (setting,) = settings_in(str(raised.value))
        assert [row for _, row in rows(Path(setting.removeprefix("data.train=")))] == [A, B]


def test_an_encrypted_zip_is_refused(tmp_path):
    path = zipped(tmp_path / "x.zip", {"a.jsonl": LINES})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag in the central directory
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.jsonl is encrypted. Unpack it: unzip"):
        open_source(str(path))


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_what_unpacks_to_far_more_than_its_size_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(archives, "_SMALL_BYTES", 100_000)
    zeros = {f"{n}.jsonl": bytes(200_000) for n in range(2)}
    path = zipped(tmp_path / name, zeros) if name == "x.zip" else tar(tmp_path / name, "w:gz", zeros)
    with pytest.raises(DataError, match="over 200 times its size"):
        open_source(str(path))


def test_the_digest_follows_what_is_in_an_archive(tmp_path):
    first = open_source(str(zipped(tmp_path / "x.zip", {"a.jsonl": LINES}))).digest
    assert open_source(str(zipped(tmp_path / "x.zip", {"a.jsonl": LINES + LINES}))).digest != first


def test_an_archive_is_listed_once_and_hashed_once_however_many_files_it_has(tmp_path, monkeypatch):
    path = zipped(tmp_path / "x.zip", {f"{n}.jsonl": LINES for n in range(3)})
    monkeypatch.setattr(archives, "_members", listing := Mock(wraps=archives._members))
    check_path(str(path))
    open_source(str(path), content=(hashing := Mock(return_value=Content("0"))))
    assert (listing.call_count, hashing.call_count) == (1, 1)
    zipped(path, {"other.jsonl": LINES})
    assert [place for place, _ in rows(path)] == ["x.zip/other.jsonl, line 1", "x.zip/other.jsonl, line 2"]
