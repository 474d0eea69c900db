"""Rows of tables are read as they were written, and a row of the wrong shape is an error in its place."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from data_files import write
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.reading.data_file import DataFile
from qlora_trainer.data.reading.tables import read_table

QUICK = settings(max_examples=80)
CELLS = st.text(st.sampled_from('ab"\n\t,; é'), max_size=6)


def as_tuple(row):
    assert isinstance(row, dict)
    return tuple(row.values())


@QUICK
@given(st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=5), st.sampled_from(["\n", "\r\n"]))
def test_rows_that_a_csv_writer_wrote_are_read_as_they_were(tmp_path, rows, end):
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end).writerows([("id", "x", "y"), *rows])
    path = write(tmp_path, "x.csv", text.getvalue())
    assert [as_tuple(row) for _, row in read_table(path, ",")] == rows


@QUICK
@given(st.lists(st.tuples(*[st.text(st.sampled_from('ab" é'), max_size=5)] * 3), min_size=1, max_size=5))
def test_rows_of_a_tsv_without_quoting_keep_their_quotes_unless_all_follow_the_rule(tmp_path, rows):
    """One row that no rule of quotes explains, and quotes are text in the whole file."""
    rows = [('"no', "end", "here"), *rows]
    path = write(tmp_path, "x.tsv", "".join("\t".join(row) + "\n" for row in rows))
    assert [as_tuple(row) for _, row in read_table(DataFile(path.path, header=["a", "b", "c"]), "\t")] == rows


def test_a_tsv_that_keeps_to_quotes_is_read_by_them(tmp_path):
    path = write(tmp_path, "x.tsv", 'a\tb\n"1\n2 ""x"""\tc\n')
    assert list(read_table(path, "\t")) == [("line 2", {"a": '1\n2 "x"', "b": "c"})]


def test_quotes_that_would_join_whole_rows_of_a_tsv_are_text(tmp_path):
    path = write(tmp_path, "x.tsv", 'a\tb\n1\t"he said\n2\tand left"\n')
    assert [row for _, row in read_table(path, "\t")] == [{"a": "1", "b": '"he said'}, {"a": "2", "b": 'and left"'}]


def test_places_count_lines_and_line_ends_in_fields_are_newlines(tmp_path):
    path = write(tmp_path, "x.csv", '\ufeffprompt,completion\r\n"a, ""b""\r\nc",d\r\n\r\ne,f\r\n')
    assert list(read_table(path, ",")) == [
        ("line 2", {"prompt": 'a, "b"\nc', "completion": "d"}),
        ("line 5", {"prompt": "e", "completion": "f"}),
    ]


@pytest.mark.parametrize("content", ["a;b\n1,5;2\n", "a\tb\n1,5\t2\n", 'a , b\n"1,5",2\n'])
def test_the_line_of_names_shows_what_is_between_fields(tmp_path, content):
    assert [row for _, row in read_table(write(tmp_path, "x.csv", content), ",")] == [{"a": "1,5", "b": "2"}]


def test_a_file_without_a_line_of_names_takes_those_given(tmp_path):
    path = write(tmp_path, "x.tsv", "0\tx\t0\n1\ty\n")
    found = list(read_table(DataFile(path.path, header=["id", "text", "label"]), "\t"))
    assert found[0] == ("line 1", {"id": "0", "text": "x", "label": "0"})
    assert "x.tsv, line 2: 2 fields where data.header names 3 columns (id, text, label)" in str(found[1][1])


def test_names_given_twice_are_refused_as_one_column_would_be_lost(tmp_path):
    with pytest.raises(DataError, match=r"data.header names a column twice: text, label, text"):
        list(read_table(write(tmp_path, "x.csv", "a,b,c\n", header=["text", "label", "text"]), ","))


def test_a_bad_row_is_an_error_in_its_place_and_the_next_row_follows(tmp_path):
    path = write(tmp_path, "x.csv", b'a,b\n1,2\n1,2,3\n"x" y,2\n1,\xe9\n"5\n\xff",6\n7,8\n')
    found = list(read_table(path, ","))
    assert [place for place, _ in found] == ["line 2", "line 3", "line 4", "line 5", "line 6", "line 8"]
    assert (found[0][1], found[5][1]) == ({"a": "1", "b": "2"}, {"a": "7", "b": "8"})
    errors = [str(row) for _, row in found[1:5]]
    assert "x.csv, line 3: 3 fields where the first row names 2 columns (a, b)" in errors[0]
    assert "x.csv, line 4: ',' expected after '\"'. Is a quote missing?" in errors[1]
    assert "x.csv, line 5: byte 24 (0xe9) is not UTF-8" in errors[2]
    assert "x.csv, line 7: byte 29 (0xff) is not UTF-8" in errors[3]


def test_what_spoils_all_rows_after_it_ends_the_reading(tmp_path):
    with pytest.raises(DataError, match=r"x.csv, line 3: unexpected end of data. Is a quote missing\?"):
        list(read_table(write(tmp_path, "x.csv", 'a,b\n1,2\n"1,2\n3,4\n'), ","))
    with pytest.raises(DataError, match=r"line 1: .*A carriage return alone is here"):
        list(read_table(write(tmp_path, "x.csv", "a,b\r1,2\r"), ","))
    with pytest.raises(DataError, match=r"line 1: byte 0 \(0xff\)"):
        list(read_table(write(tmp_path, "x.csv", b"\xff,b\n1,2\n"), ","))


def read(tmp_path: Path, content: str, name: str = "x.csv", **how: Any) -> tuple[list[Any], list[str]]:
    file = write(tmp_path, name, content, **how)
    return [row for _, row in read_table(file, "," if name == "x.csv" else "\t")], file.notes


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("v1,v2,,,\r\nham,hello,,,\r\nspam,win,,,\r\n", [{"v1": "ham", "v2": "hello"}, {"v1": "spam", "v2": "win"}]),
        ("a,b,\n1,2,\n3,4\n", [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]),
        ("a,b\n1,2,\n3,4,,\n", [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]),
        (",a,b\n0,1,2\n", [{"column_1": "0", "a": "1", "b": "2"}]),
        ("a,,b\n1,x,2\n3,,4\n", [{"a": "1", "column_2": "x", "b": "2"}, {"a": "3", "b": "4"}]),
        ("column_2,\n1,2\n", [{"column_2": "1", "column_2_": "2"}]),
    ],
)
def test_a_column_without_a_name_is_left_out_where_it_is_empty(tmp_path, content, rows):
    assert read(tmp_path, content) == (rows, [])


def test_names_that_are_there_more_than_once_are_numbered_and_reported(tmp_path):
    rows, notes = read(tmp_path, "text,label,text,text_1\na,b,c,d\n")
    assert rows == [{"text_1_": "a", "label": "b", "text_2": "c", "text_1": "d"}]
    assert notes == ["x.csv: a column name is there more than once: read as text_1_, text_2"]


@pytest.mark.parametrize("content", ["a,b\n1,2,3\n", "a,b\n1\n", "a,,b\n1,2\n"])
def test_a_field_too_many_or_too_few_is_an_error(tmp_path, content):
    ((row,), _) = read(tmp_path, content)
    assert isinstance(row, DataError)


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('"prompt, short";completion\r\na, b;c\r\n', [{"prompt, short": "a, b", "completion": "c"}]),
        ('id;"text, long"\n1;"a\nb"\n', [{"id": "1", "text, long": "a\nb"}]),
        ("sep=;\r\nquestion;answer\r\na, b;c\r\n", [{"question": "a, b", "answer": "c"}]),
        ('"sep=\t"\nquestion\tanswer\na, b\tc\n', [{"question": "a, b", "answer": "c"}]),
        ("question|answer\na, b|c\n", [{"question": "a, b", "answer": "c"}]),
        ("text\nHello, you\n", None),
    ],
)
def test_the_delimiter_is_the_one_outside_quotes_or_the_one_that_excel_names(tmp_path, content, rows):
    found, _ = read(tmp_path, content)
    assert found == rows or (rows is None and isinstance(found[0], DataError))


def test_lines_are_counted_from_the_file_s_first_after_excel_s_line(tmp_path):
    assert [place for place, _ in read_table(write(tmp_path, "x.csv", "sep=;\na;b\n1;2\n3;4\n"), ",")] == [
        "line 3",
        "line 4",
    ]


def test_the_delimiter_of_a_file_without_names_is_the_one_that_gives_as_many_fields(tmp_path):
    assert read(tmp_path, "1;a, b\n2;c\n", header=["id", "text"])[0] == [
        {"id": "1", "text": "a, b"},
        {"id": "2", "text": "c"},
    ]


@pytest.mark.parametrize(
    ("first", "is_said"),
    [("v1,v2", True), ("Label,Message", True), ("ID,text", True), ("ham,hello there", False), ("1,text", False)],
)
def test_a_line_of_names_that_is_read_as_a_row_is_reported(tmp_path, first, is_said):
    rows, notes = read(tmp_path, f"{first}\nham,hello\n", header=["label", "text"])
    assert len(rows) == 2
    assert bool(notes) == is_said
