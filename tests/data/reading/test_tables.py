"""Rows of tables are read as they were written, and a row of the wrong shape is an error in its place."""

import csv
import io

import pytest
from data_files import write
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.reading.tables import read_parquet, read_table

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
    assert [as_tuple(row) for _, row in read_table(path, "\t", header=["a", "b", "c"])] == rows


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
    found = list(read_table(path, "\t", header=["id", "text", "label"]))
    assert found[0] == ("line 1", {"id": "0", "text": "x", "label": "0"})
    assert "x.tsv, line 2: 2 fields where data.header names 3 columns (id, text, label)" in str(found[1][1])
    with pytest.raises(DataError, match=r"appears twice: 0, x, 0.*where the file has no such line, name them"):
        list(read_table(path, "\t"))


def test_names_given_twice_are_refused_as_one_column_would_be_lost(tmp_path):
    with pytest.raises(DataError, match=r"data.header names a column twice: text, label, text"):
        list(read_table(write(tmp_path, "x.csv", "a,b,c\n"), ",", header=["text", "label", "text"]))


def test_a_bad_row_is_an_error_in_its_place_and_the_next_row_follows(tmp_path):
    path = write(tmp_path, "x.csv", b'a,b\n1,2\n1,2,3\n"x" y,2\n1,\xe9\n"5\n\xff",6\n7,8\n')
    found = list(read_table(path, ","))
    assert [place for place, _ in found] == ["line 2", "line 3", "line 4", "line 5", "line 6", "line 8"]
    assert (found[0][1], found[5][1]) == ({"a": "1", "b": "2"}, {"a": "7", "b": "8"})
    errors = [str(row) for _, row in found[1:5]]
    assert "x.csv, line 3: 3 fields where the first line names 2 columns (a, b)" in errors[0]
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


def test_nulls_that_a_parquet_struct_needs_are_left_out(tmp_path):
    import pyarrow
    import pyarrow.parquet

    turns = [
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"a": 1}}]},
        {"role": "assistant", "content": "é", "tool_calls": [{"name": "g", "arguments": {"b": [None, 2]}}]},
    ]
    rows = [{"messages": turns, "note": None}, {"messages": None, "note": "x"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    first = [
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]},
        {"role": "assistant", "content": "é", "tool_calls": [{"name": "g", "arguments": {"b": [None, 2]}}]},
    ]
    assert list(read_parquet(tmp_path / "x.parquet")) == [
        ("row 1", {"messages": first, "note": None}),
        ("row 2", {"messages": None, "note": "x"}),
    ]


def test_a_broken_parquet_file_and_names_that_are_twice_are_reported(tmp_path):
    import pyarrow
    import pyarrow.parquet

    with pytest.raises(DataError, match="after row 0: cannot be read as Parquet"):
        list(read_parquet(write(tmp_path, "x.parquet", b"PAR1 and nothing more")))
    with pytest.raises(DataError, match=r"is a git-lfs pointer.*git lfs pull"):
        list(read_parquet(write(tmp_path, "x.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")))
    far = pyarrow.table({"text": ["a"], "day": pyarrow.array([10**7], pyarrow.int32()).cast(pyarrow.date32())})
    pyarrow.parquet.write_table(far, tmp_path / "z.parquet")
    with pytest.raises(DataError, match=r"z.parquet, after row 0: cannot be read as Parquet: date value out of range"):
        list(read_parquet(tmp_path / "z.parquet"))
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "y.parquet")
    with pytest.raises(DataError, match="more than one column of the name text"):
        list(read_parquet(tmp_path / "y.parquet"))
