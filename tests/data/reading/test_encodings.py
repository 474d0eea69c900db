"""Bytes that are no text: a damaged row is not taken for another encoding, and what is suggested reads the file."""

import re
from pathlib import Path
from typing import Any

import pytest
from advice import run_command_in, settings_in

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.reading.files import RecordSource, open_source

ROW = '{"question": "Ça va?", "answer": "Très bien, Zoë 😀"}\n'.encode()
WRONG = b'{"question": "x", "answer": "caf\xe9"}\n'
EMOJI = b"\xed\xa0\xbd\xed\xb8\x80"  # U+1F600 as two surrogates


def read(tmp_path: Path, name: str, content: bytes, **how: Any) -> tuple[list[Any], RecordSource]:
    path = tmp_path / name
    path.write_bytes(content)
    source = open_source(str(path), **how)
    return [row for _, row in source.records()], source


@pytest.mark.parametrize(
    ("name", "content", "good"),
    [
        ("x.jsonl", ROW * 3 + WRONG, 3),
        ("x.jsonl", ROW * 2 + WRONG + ROW, 3),
        ("x.csv", "question,answer\né,ü\n".encode() + b"a,\xff\n" + "ö,b\n".encode(), 2),
        ("x.json", b"[" + ROW + b"," + WRONG + b"," + ROW + b"]", 2),
    ],
)
def test_a_damaged_row_is_one_row_and_no_other_encoding_is_suggested(tmp_path, name, content, good):
    rows, _ = read(tmp_path, name, content)
    errors = [str(row) for row in rows if isinstance(row, DataError)]
    assert len(rows) - len(errors) == good
    assert len(errors) == 1
    assert "this row is damaged" in errors[0]
    assert settings_in(errors[0]) == []


def test_it_is_said_how_much_was_utf8_before(tmp_path):
    rows, _ = read(tmp_path, "x.jsonl", ROW * 3 + WRONG)
    # 4 characters a row, by hand: Ç, è, ë and the emoji.
    expected = (
        f"The {3 * len(ROW)} bytes before the first such line are UTF-8, characters beyond ASCII among them: 12 in 3"
    )
    assert expected in str(rows[3])


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_a_file_of_another_encoding_is_read_by_the_one_that_is_suggested(tmp_path, encoding):
    content = '{"text": "café, naïve"}\n{"text": "Zoë"}\n'.encode(encoding)
    rows, _ = read(tmp_path, "x.jsonl", content)
    (setting,) = settings_in(str(rows[0]))
    again, source = read(tmp_path, "x.jsonl", content, encoding=setting.partition("=")[2])
    assert again == [{"text": "café, naïve"}, {"text": "Zoë"}]
    assert source.notes == []


@pytest.mark.parametrize(
    ("content", "encoding"),
    [(b"question,answer\nwhat,na\xefve \x8d\n", "cp1252"), (b"question,answer\nwhat,\xff\xff\n", "gb18030")],
)
def test_the_encoding_that_failed_is_not_suggested(tmp_path, content, encoding):
    rows, _ = read(tmp_path, "x.csv", content, encoding=encoding)
    assert f"is not {encoding} text" in str(rows[0])
    assert settings_in(str(rows[0])) == []


def test_a_file_that_is_utf8_is_said_to_be_where_another_encoding_fails(tmp_path):
    content = 'question,answer\na,"à\u0081Á"\n'.encode()  # 0x81 is no character of cp1252
    rows, _ = read(tmp_path, "x.csv", content, encoding="cp1252")
    assert settings_in(str(rows[0])) == ["data.encoding=null"]
    assert "All of the file is UTF-8" in str(rows[0])


def test_cesu8_is_named_and_the_command_repairs_it(tmp_path):
    content = '{"text": "é"}\n'.encode() + b'{"text": "' + EMOJI + b'"}\n'
    rows, _ = read(tmp_path, "x.jsonl", content)
    assert "The file is CESU-8" in str(rows[1])
    assert settings_in(str(rows[1])) == []
    run_command_in(str(rows[1]))
    repaired = open_source(str(tmp_path / "x.utf8.jsonl")).records()
    assert [row for _, row in repaired] == [{"text": "é"}, {"text": "\U0001f600"}]


def test_a_half_of_a_surrogate_pair_among_utf8_is_a_damaged_row(tmp_path):
    rows, _ = read(tmp_path, "x.jsonl", ROW + b'{"text": "' + EMOJI[:3] + b'"}\n')
    assert "this row is damaged" in str(rows[1])


def test_parts_of_two_encodings_are_said_to_be_joined(tmp_path):
    rows, _ = read(tmp_path, "x.jsonl", ROW + WRONG * 3)
    assert "parts of different encodings" in str(rows[1])
    assert settings_in(str(rows[1])) == []


def test_a_damaged_plain_text_is_repaired_by_the_command(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("Zoë and caf".encode() + b"\xe9\n" + "Ça va.\n".encode())
    with pytest.raises(DataError, match="this place is damaged") as raised:
        list(open_source(str(path)).records())
    run_command_in(str(raised.value) + " || true")  # iconv -c reports what it left out
    assert (tmp_path / "x.repaired.txt").read_text() == "Zoë and caf\nÇa va.\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", ROW + WRONG),
        ("x.csv", "question,answer\nÇa,é\n".encode()),
        ("x.json", b"[" + ROW + b"]"),
    ],
)
@pytest.mark.parametrize("encoding", ["latin-1", "cp1250"])
def test_utf8_that_is_read_by_a_single_byte_encoding_is_warned_of(tmp_path, name, content, encoding):
    _, source = read(tmp_path, name, content, encoding=encoding)
    (note,) = source.notes
    assert f"{name}: the encoding is {encoding}" in note
    assert settings_in(note) == ["data.encoding=null"]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("café und naïve", "cp1252"),
        ("中文测试文本", "gb18030"),
        ("Привет", "koi8-r"),
        ("plain", "cp1252"),
        ("é", "utf-16"),
    ],
)
def test_text_of_the_encoding_that_is_named_is_not_warned_of(tmp_path, text, encoding):
    rows, source = read(tmp_path, "x.csv", f"text\n{text}\n".encode(encoding), encoding=encoding)
    assert rows == [{"text": text}]
    assert source.notes == []


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.json", "x.txt"])
def test_a_web_page_is_called_one(tmp_path, name):
    for page in (b"<!DOCTYPE html>\n<html>", b"\xef\xbb\xbf\n<HTML>", b'<?xml version="1.0"?><Error>'):
        with pytest.raises(DataError, match=re.escape(f"{name} is a web page or XML, not rows")) as raised:
            read(tmp_path, name, page)
        assert ("data.format=text" in str(raised.value)) == (name == "x.txt")
    if name == "x.txt":
        assert read(tmp_path, name, b"<html>", is_document=True)[0] == [{"text": "<html>"}]
