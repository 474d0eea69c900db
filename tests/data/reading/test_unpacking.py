"""Compressed files are known by their bytes; what is broken, cut off or called wrongly is an error."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from qlora_trainer.common.errors import LFS_HEADER, DataError
from qlora_trainer.data.reading.data_file import DataFile
from qlora_trainer.data.reading.unpacking import check_is_fetched, open_unpacked

CONTENT = b"".join(b"line %d of the file\n" % number for number in range(5000))


def zstandard(data: bytes) -> bytes:
    return bytes(pyarrow.compress(data, "zstd", asbytes=True))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard,
}


def unpacked(path: Path, content: bytes) -> bytes:
    path.write_bytes(content)
    with open_unpacked(DataFile(path)) as stream:
        return stream.read()


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows"])
def test_packed_data_is_unpacked_whatever_the_name(tmp_path: Path, packer: str, name: str) -> None:
    assert unpacked(tmp_path / name, PACKERS[packer](CONTENT)) == CONTENT
    assert unpacked(tmp_path / f"{name}.{packer}", PACKERS[packer](CONTENT)) == CONTENT


def test_plain_data_is_read_as_it_is(tmp_path: Path) -> None:
    for content in (CONTENT, b"", b"BZh is no bzip2", b"\x1f"):
        assert unpacked(tmp_path / "rows.txt", content) == content


@pytest.mark.parametrize("packer", ["gz", "bz2", "xz"])
def test_streams_one_after_another_are_one_file(tmp_path: Path, packer: str) -> None:
    pack = PACKERS[packer]
    assert unpacked(tmp_path / "rows", pack(CONTENT) + pack(b"more\n")) == CONTENT + b"more\n"
    padding = b"\0" * 8 if packer == "xz" else b""
    assert unpacked(tmp_path / "rows", pack(CONTENT) + padding + pack(b"") + padding) == CONTENT


@pytest.mark.parametrize("packer", PACKERS)
def test_data_that_is_cut_off_is_an_error_that_says_how_far_it_went(tmp_path: Path, packer: str) -> None:
    packed = PACKERS[packer](CONTENT)
    for end in (len(packed) // 2, len(packed) - 1):
        with pytest.raises(
            DataError, match=r"data is broken or cut off near byte [\d,]+ of the file, after [\d,]+ unp"
        ):
            unpacked(tmp_path / "rows", packed[:end])


@pytest.mark.parametrize("packer", PACKERS)
def test_other_bytes_behind_the_data_are_an_error(tmp_path: Path, packer: str) -> None:
    with pytest.raises(DataError, match="is broken or cut off"):
        unpacked(tmp_path / "rows", PACKERS[packer](CONTENT) + b"something else")


def test_a_flipped_bit_is_an_error(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(CONTENT))
    packed[-6] ^= 1  # of the checksum
    with pytest.raises(DataError, match="the gzip data is broken"):
        unpacked(tmp_path / "rows", bytes(packed))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.gz", CONTENT, "is called .gz, but holds no gzip data: it begins b'line 0 o'"),
        ("rows.GZ", b"", "is called .gz, but holds no gzip data"),
        ("rows.xz", gzip.compress(CONTENT), "is called .xz, but holds gzip data"),
        ("rows", gzip.compress(bz2.compress(CONTENT)), "is compressed twice; unpack it once"),
        ("rows", LFS_HEADER + b"/v1\noid sha256:1\n", "is a git-lfs pointer, not the data itself"),
    ],
)
def test_other_data_than_the_name_says_is_refused_with_what_it_is(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    with pytest.raises(DataError) as caught:
        unpacked(tmp_path / name, content)
    assert words in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_a_pointer_is_known_before_another_reader_opens_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(LFS_HEADER + b"/v1\n")
    with pytest.raises(DataError, match="git lfs pull"):
        check_is_fetched(DataFile(path))
    path.write_bytes(b"PAR1")
    check_is_fetched(DataFile(path))
    assert path.read_bytes() == b"PAR1"


def test_the_file_is_closed_with_its_stream_and_where_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.gz"
    path.write_bytes(gzip.compress(CONTENT))
    stream = open_unpacked(DataFile(path))
    raw = stream.raw._raw
    assert not raw.closed
    stream.close()
    assert raw.closed
