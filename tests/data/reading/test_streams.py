"""Bytes become text as they were meant, or an error says at which byte they do not."""

import gzip
import re
from pathlib import Path

import pyarrow
import pytest
from data_files import write
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.reading import streams
from qlora_trainer.data.reading.data_file import DataFile, content_suffix
from qlora_trainer.data.reading.streams import blocks, lines, whole

PACKED = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}
QUICK = settings(max_examples=60)


@QUICK
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=8), min_size=1, max_size=6),
    st.sampled_from([(None, ""), (None, ".gz"), (None, ".zst"), ("utf-16", ".gz"), ("utf-16-le", ""), ("utf-32", "")]),
    st.booleans(),
)
def test_lines_are_what_is_between_newlines_in_every_encoding_and_packing(tmp_path, texts, way, ends):
    """Not at U+2028, form feeds or carriage returns."""
    encoding, ending = way
    texts = ["#" + texts[0], *texts[1:]]  # a zero byte or a mark at the file's beginning means something else
    content = "\n".join(texts) + "\n" * ends
    path = write(tmp_path, "x.jsonl" + ending, PACKED[ending](content.encode(encoding or "utf-8")), encoding=encoding)
    expected = texts if ends or texts[-1] else texts[:-1]
    found = list(lines(path))
    assert [line.text for line in found] == expected
    assert [line.number for line in found] == list(range(1, len(expected) + 1))
    assert whole(path) == content
    if encoding is None:
        starts = [len("\n".join(["", *texts[:index], ""]).encode()) - 1 for index in range(len(expected))]
        assert [line.start for line in found] == [start if index else 0 for index, start in enumerate(starts)]


@pytest.mark.parametrize("ending", PACKED)
def test_characters_that_blocks_cut_in_two_stay_whole(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(streams, "READ_BYTES", 3)
    text = "aé\U0001f600" * 5
    path = write(tmp_path, "x.txt" + ending, PACKED[ending](("\ufeff" + text).encode()))
    assert "".join(blocks(path)) == whole(path) == text


def test_a_line_of_wrong_bytes_is_an_error_by_byte_and_the_next_line_follows(tmp_path):
    path = write(tmp_path, "x.jsonl", b"\xef\xbb\xbfone\ntw\xe9o\nthree\n")
    first, second, third = lines(path)
    assert (first.text, first.error, third.text, third.error) == ("one", None, "three", None)
    assert str(second.error).startswith(
        "x.jsonl, line 2: byte 9 (0xe9) is not UTF-8 text. No line beyond ASCII is UTF-8 (1 line). "
    )
    assert [line.text for line in lines(DataFile(path.path, encoding="cp1252"))] == ["ï»¿one", "twéo", "three"]


@pytest.mark.parametrize("size", [3, 1 << 20])
def test_wrong_bytes_of_a_whole_text_are_named_by_line_and_byte(tmp_path, monkeypatch, size):
    monkeypatch.setattr(streams, "READ_BYTES", size)
    with pytest.raises(DataError, match=r"x.json, line 2: byte 5 \(0xe9\) is not UTF-8"):
        whole(write(tmp_path, "x.json", b"a\n\xc3\xa9b\xe9c\n"))
    with pytest.raises(DataError, match=r"x.json, line 1: byte 4 \(0xff\) is not utf-16-be text"):
        whole(write(tmp_path, "x.json", "ab".encode("utf-16-be") + b"\xff", encoding="utf-16-be"))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_broken_or_cut_compressed_data_is_an_error_with_its_place(tmp_path, ending):
    data = b"".join(b"%d is a row\n" % (n * n) for n in range(5000))
    packed = PACKED[ending](data)
    assert b"\n".join(line.text.encode() for line in lines(write(tmp_path, "a" + ending, packed + packed))) == (
        data + data
    ).removesuffix(b"\n")
    for wrong in (packed[:-20], packed[: len(packed) // 2], packed + b"and more"):
        path = write(tmp_path, "x.jsonl" + ending, wrong)
        with pytest.raises(DataError, match=r"broken or cut off near byte \d+ of the file, after \d+ unpacked bytes"):
            list(lines(path))
    flipped = bytearray(gzip.compress(data))
    flipped[len(flipped) // 2] ^= 0xFF
    with pytest.raises(DataError, match="the gzip data is broken"):
        whole(write(tmp_path, "y.txt.gz", bytes(flipped)))


def test_compression_is_known_by_content_and_a_wrong_name_is_reported(tmp_path):
    assert whole(write(tmp_path, "x.txt", gzip.compress(b"hi"))) == "hi"
    with pytest.raises(DataError, match=r"x.txt.gz is called .gz, but holds no gzip data: it begins b'hi'"):
        whole(write(tmp_path, "x.txt.gz", b"hi"))
    with pytest.raises(DataError, match=r"is called .zst, but holds gzip data"):
        whole(write(tmp_path, "x.txt.zst", gzip.compress(b"hi")))
    suffixes = [content_suffix(Path(name)) for name in ("a.JSONL.GZ", "a.csv.zst", "a.b.json", "a.gz", "a.txt.zstd")]
    assert suffixes == [".jsonl", ".csv", ".json", "", ".txt"]


@pytest.mark.parametrize(
    ("content", "encoding", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", None, "git-lfs pointer.*git lfs pull"),
        ("hi".encode("utf-16"), None, "is UTF-16 text; name that: data.encoding=utf-16"),
        ("hi".encode("utf-16"), "cp1252", "is UTF-16 text"),
        ("hi".encode("utf-16-le"), None, "data.encoding=utf-16-le"),
        ("hi".encode("utf-16-be"), None, "data.encoding=utf-16-be"),
        ("hi".encode("utf-32"), None, "is UTF-32 text; name that"),
        (b"PK\x03\x04...", None, "zip archive or an Excel workbook"),
        (b"PAR1", None, "give it the ending .parquet"),
        (gzip.compress(gzip.compress(b"PK\x03\x04", mtime=0), mtime=0), None, "is compressed twice"),
    ],
)
def test_what_is_no_text_is_refused_with_the_way_out(tmp_path, content, encoding, words):
    with pytest.raises(DataError, match=words):
        whole(write(tmp_path, "x.txt", content, encoding=encoding))


@pytest.mark.parametrize("encoding", ["utf-16", "U32"])
def test_text_that_does_not_say_which_byte_is_first_is_refused_with_the_names_that_do(tmp_path, encoding):
    path = write(tmp_path, "x.jsonl", ("hi" * 9).encode(encoding)[4:], encoding=encoding)
    name = {"U32": "utf-32"}.get(encoding, encoding)
    for read in (whole, lambda path: list(lines(path))):
        with pytest.raises(DataError, match=f"x.jsonl has no byte-order mark.*Name {name}-le or {name}-be; or, if it"):
            read(path)


def test_an_endless_line_and_an_endless_text_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 2**20)
    monkeypatch.setattr(streams, "MAX_WHOLE_FILE_BYTES", 2**21)
    path = write(tmp_path, "x.jsonl", b"short\n" + b"x" * (2**20 + 1))
    with pytest.raises(DataError, match="line 2: longer than 1 MiB"):
        list(lines(path))
    path = write(tmp_path, "y.jsonl", ("short\n" + "x" * (2**20 + 1)).encode("utf-16"), encoding="utf-16")
    with pytest.raises(DataError, match="line 2: longer than 1 MiB"):
        list(lines(path))
    with pytest.raises(DataError, match=re.escape('one document a line: {"text": ...}')):
        whole(write(tmp_path, "z.txt", b"x" * (2**21 + 1)))
