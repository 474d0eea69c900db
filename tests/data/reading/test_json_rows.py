"""However rows are written as JSON, the same rows are read; what is no JSON is named by row, line and column."""

import json

import pytest
from data_files import write
from hypothesis import given, settings
from hypothesis import strategies as st
from spying import noting, unchanged

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.reading import streams
from qlora_trainer.data.reading.json_rows import read_json, read_jsonl

QUICK = settings(max_examples=80)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=4), max_size=5)


def raise_first(placed):
    for _, row in placed:
        if isinstance(row, DataError):
            raise row


@QUICK
@given(ROWS, st.sampled_from([None, 1]), st.booleans(), st.integers(1, 40), st.booleans())
def test_any_way_to_write_rows_reads_the_same_whatever_a_block_cuts(tmp_path, rows, indent, ascii_, block, mark):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "READ_BYTES", block)
        texts = [json.dumps(row, ensure_ascii=ascii_, indent=indent) for row in rows]
        start = "\ufeff" * mark
        array = write(tmp_path, "a.json", start + json.dumps(rows, ensure_ascii=ascii_, indent=indent) + "\n")
        assert [row for _, row in read_json(array)] == rows
        after = write(tmp_path, "b.json", start + "\n".join(texts))
        if len(rows) == 1:  # what is all that a file holds may be a table by columns
            return
        if indent is None or all(rows):  # {} is written on one line, whatever the others are
            assert [row for _, row in read_json(after)] == rows
        if indent is None:
            one_a_line = write(tmp_path, "c.jsonl", start + "\r\n\r\n".join(texts))
            assert [row for _, row in read_jsonl(one_a_line)] == rows


def test_a_broken_line_is_an_error_in_its_place_and_the_next_row_follows(tmp_path):
    path = write(tmp_path, "x.jsonl", b'{"a": 1}\n{"a": \n["a"]\n{"a": "\xe9"}\n{"a": 1, "a": 2}\n{"a": 5}\n')
    found = list(read_jsonl(path))
    assert [place for place, _ in found] == [f"line {number}" for number in range(1, 7)]
    assert found[0][1] == {"a": 1}
    assert found[5][1] == {"a": 5}
    errors = [str(row) for _, row in found[1:5] if isinstance(row, DataError)]
    assert "x.jsonl, line 2: not JSON: Expecting value at column 7 (byte 15)" in errors[0]
    assert (
        "x.jsonl, line 3: a row should be a JSON object with named columns, or a list of turns, and is a list"
        in errors[1]
    )
    assert "x.jsonl, line 4: byte 29 (0xe9) is not UTF-8" in errors[2]
    assert "x.jsonl, line 5: the key a is there twice in one object" in errors[3]


def test_jsonl_under_a_json_name_is_reported_by_its_lines_though_the_first_is_broken(tmp_path):
    found = list(read_json(write(tmp_path, "x.json", '{"a": 1\n{"a": 2}\n{"b" 3}\n')))
    assert [place for place, _ in found] == ["line 1", "line 2", "line 3"]
    assert found[1][1] == {"a": 2}
    assert "line 3: not JSON: Expecting ':' delimiter at column 6" in str(found[2][1])


def test_an_object_that_opens_a_list_of_rows_on_its_first_line_is_one_row(tmp_path):
    found = list(read_json(write(tmp_path, "x.json", '{"data": [\n{"a": 1},\n{"a": 2}\n]}\n')))
    assert found == [("row 1", {"data": [{"a": 1}, {"a": 2}]})]


def test_a_row_nested_deeper_than_programs_can_follow_is_an_error_in_its_place(tmp_path):
    deep = '{"a": ' + "[" * 150 + "]" * 150 + "}"
    found = list(read_jsonl(write(tmp_path, "x.jsonl", f'{deep}\n{{"a": [{"[]," * 150}[]]}}\n')))
    assert "x.jsonl, line 1: cannot be read as JSON: lists and objects are nested more than 100 deep" in str(
        found[0][1]
    )
    assert found[1][1] == {"a": [[]] * 151}
    with pytest.raises(DataError, match=r"x.json, row 2: .* nested more than 100 deep"):
        list(read_json(write(tmp_path, "x.json", f'[{{"a": 1}}, {deep}]')))


def test_rows_of_an_array_that_are_no_objects_are_errors_in_their_place(tmp_path):
    path = write(tmp_path, "x.json", '[{"a": 1}, 5, {"b": {"c": 1, "c": 2}}, {"d": [{}]}]')
    found = list(read_json(path))
    assert (found[0], found[3]) == (("row 1", {"a": 1}), ("row 4", {"d": [{}]}))
    assert "x.json, row 2: a row should be a JSON object" in str(found[1][1])
    assert "x.json, row 3: the key c is there twice" in str(found[2][1])


def test_a_number_that_a_block_cuts_is_one_row_that_is_no_object(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "READ_BYTES", 2)
    found = list(read_json(write(tmp_path, "x.json", '[123456789, {"a": 1}]')))
    assert "is the int 123456789" in str(found[0][1])
    assert found[1:] == [("row 2", {"a": 1})]


def test_an_empty_object_before_one_over_several_lines_is_a_row(tmp_path):
    assert [row for _, row in read_json(write(tmp_path, "x.json", '{}\n{\n"a": 1\n}\n'))] == [{}, {"a": 1}]


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"a": "a"},\n {"a" "b"}]', r"x.json, row 2: not JSON: Expecting ':' delimiter at line 2, column 7, near"),
        ('[{"a": 1}\n{"a": 2}]', r"row 1: not JSON: Expecting ',' or '\]' at line 2, column 1"),
        ('[{"a": 1},\n]', r"row 2: not JSON: Expecting value at line 2, column 1"),
        (
            '[{"a": 1},\n {"a": "b',
            r"row 2: not JSON: Unterminated string starting at \(the file ends too early\) at line 2, column 8",
        ),
        ('[{"a": 1}', r"row 1: not JSON: the file was cut off, the array has no end, at line 1, column 10"),
        ("[", r"row 1: not JSON: Expecting value \(the file ends too early\) at line 1, column 2"),
        ('[{"a": 1}]\n{"a": 2}', r"Extra data after the array at line 2, column 1"),
        ('{"a": \n1}\n{"a": \n2', r"x.json, row 2: not JSON: Expecting ',' delimiter .* at line 4, column 2"),
        ('{"a": "b"', r"x.json, row 1: not JSON: Expecting ',' delimiter .* at line 1, column 10"),
        ('"hello"', r"x.json should hold objects or an array of them, and begins"),
        ('{"data": [\n{"a": [}\n]}', r"x.json, row 1: not JSON: Expecting value at line 2, column 8"),
        ("[" * 100_000, r"row 1: cannot be read as JSON: maximum recursion depth"),
        ("[" + "9" * 5000 + "]", r"row 1: cannot be read as JSON: Exceeds the limit"),
    ],
)
def test_what_is_no_json_is_named_by_row_line_and_column(tmp_path, monkeypatch, block, content, words):
    monkeypatch.setattr(streams, "READ_BYTES", max(block, len(content) // 100))  # long ones are slow byte by byte
    with pytest.raises(DataError, match=words):
        list(read_json(write(tmp_path, "x.json", content)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('\n[\n{"a": 1}\n]', r"x.jsonl, line 2: begins a JSON array that goes over lines, .*: mv .*/x.jsonl .*/x.json"),
        ('{\n"a": 1\n}', r"where it goes over lines: mv .*/x.jsonl .*/x.json"),
        ("{'a': 1}", r"Python's way to write an object; write it with json.dumps"),
        ('{"a": 1} {"a": 2}', r"Extra data at column 10"),
        ("[" * 10 + "{", r"begins a JSON array"),
    ],
)
def test_a_file_that_is_another_kind_of_json_gets_its_own_message(tmp_path, content, words):
    with pytest.raises(DataError, match=words):
        raise_first(read_jsonl(write(tmp_path, "x.jsonl", content)))


def test_marks_within_a_file_that_was_joined_from_others_are_passed_over(tmp_path):
    path = write(tmp_path, "x.jsonl", '\ufeff{"a": "\u2028"}\n\ufeff{"a": 2}\n')
    assert list(read_jsonl(path)) == [("line 1", {"a": "\u2028"}), ("line 2", {"a": 2})]


def test_an_array_is_read_a_piece_at_a_time(tmp_path, monkeypatch):
    """Of a file that breaks off, the rows before come first; and only some blocks are read for them."""
    monkeypatch.setattr(streams, "READ_BYTES", 64)
    taken = []
    original = streams.blocks
    monkeypatch.setattr(
        streams,
        "blocks",
        lambda *args, **how: map(noting(unchanged, lambda block: taken.append(len(block))), original(*args, **how)),
    )
    path = write(tmp_path, "x.json", "[" + ", ".join(['{"a": "bcdefgh"}'] * 1000) + "]")
    reader = read_json(path)
    assert next(reader) == ("row 1", {"a": "bcdefgh"})
    assert sum(taken) < 1000
    assert sum(1 for _ in reader) == 999


def test_a_row_longer_than_the_limit_ends_the_search_for_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "READ_BYTES", 64)
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 1000)
    with pytest.raises(DataError, match="row 1: not JSON: Unterminated string"):
        list(read_json(write(tmp_path, "x.json", '[{"a": "' + "b" * 100_000)))
