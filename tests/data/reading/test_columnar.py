"""Rows of columnar files and workbooks are read as they were written, a batch at a time."""

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from advice import settings_in
from data_files import write

from qlora_trainer.common.errors import DataError, NotInstalledError
from qlora_trainer.data.reading.columnar import read_arrow, read_excel, read_parquet
from qlora_trainer.data.reading.data_file import DataFile
from qlora_trainer.data.reading.files import open_source


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
    assert list(read_parquet(DataFile(tmp_path / "x.parquet"))) == [
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
        list(read_parquet(DataFile(tmp_path / "z.parquet")))
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "y.parquet")
    with pytest.raises(DataError, match="more than one column of the name text"):
        list(read_parquet(DataFile(tmp_path / "y.parquet")))


ROWS = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "é"}]


def test_arrow_files_of_both_formats_and_feather_files_are_read(tmp_path):
    import pyarrow
    import pyarrow.feather

    table = pyarrow.Table.from_pylist(ROWS * 300)
    for name, new in {"f.arrow": pyarrow.ipc.new_file, "s.arrow": pyarrow.ipc.new_stream}.items():
        with pyarrow.OSFile(str(tmp_path / name), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table)
    pyarrow.feather.write_feather(table, str(tmp_path / "x.feather"))
    for name in ("f.arrow", "s.arrow", "x.feather"):
        found = list(read_arrow(DataFile(tmp_path / name)))
        assert [row for _, row in found] == ROWS * 300
        assert found[-1][0] == "row 600"
    whole = (tmp_path / "f.arrow").read_bytes()
    for content in (whole[:-30], whole[:100], b"hello", b""):
        with pytest.raises(DataError, match=r"y.arrow, after row 0: cannot be read as Arrow"):
            list(read_arrow(write(tmp_path, "y.arrow", content)))


def test_what_save_to_disk_wrote_is_read_by_its_splits(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    plain = datasets.Dataset.from_list(ROWS).with_format("numpy", columns=["question"])
    plain.save_to_disk(str(tmp_path / "plain"))
    both = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "both"))
    first = open_source(str(tmp_path / "plain"))
    assert list(first.records()) == [("plain, row 1", ROWS[0]), ("plain, row 2", ROWS[1])]
    assert [row for _, row in open_source(str(tmp_path / "both")).records()] == ROWS
    test = open_source(str(tmp_path / "both"), "test")
    assert [row for _, row in test.records()] == ROWS[:1]
    assert test.digest != open_source(str(tmp_path / "both")).digest
    with pytest.raises(DataError, match=r"has no split dev; it has train, test") as raised:
        open_source(str(tmp_path / "both"), "dev")
    (setting,) = settings_in(str(raised.value))
    (source,) = yaml.safe_load(setting.partition("=")[2])
    assert [row for _, row in open_source(**source).records()] == ROWS
    with pytest.raises(DataError, match=r"without splits, and split test would have no effect"):
        open_source(str(tmp_path / "plain"), "test")
    shutil.rmtree(tmp_path / "plain")
    datasets.Dataset.from_list(ROWS[:1]).save_to_disk(str(tmp_path / "plain"))
    assert open_source(str(tmp_path / "plain")).digest != first.digest


def workbook(path: Path, **sheets: Sequence[Sequence[Any]]) -> DataFile:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return DataFile(path)


def test_a_workbook_is_read_by_its_line_of_names(tmp_path):
    rows: list[list[Any]] = [["question", "answer", None], ["a", "b"], [None], ["c", 5], ["d", "e", "f"], ["g"]]
    found = list(read_excel(workbook(tmp_path / "x.xlsx", One=rows, Empty=[])))
    assert found[:2] == [("row 2", {"question": "a", "answer": "b"}), ("row 4", {"question": "c", "answer": 5})]
    assert "x.xlsx, row 5: 3 fields where the first row names 2 columns (question, answer)" in str(found[2][1])
    assert found[3] == ("row 6", {"question": "g", "answer": None})
    named = DataFile(tmp_path / "y.xlsx", header=["id", "text"])
    workbook(named.path, One=[[1, "a"]])
    assert list(read_excel(named)) == [("row 1", {"id": 1, "text": "a"})]


def test_the_names_of_a_sheet_s_columns_are_checked_as_those_of_a_csv_file(tmp_path):
    file = workbook(tmp_path / "x.xlsx", One=[["text", "label", "text"], ["a", "b", "c"]])
    assert list(read_excel(file)) == [("row 2", {"text_1": "a", "label": "b", "text_2": "c"})]
    assert file.notes == ["x.xlsx: a column name is there more than once: read as text_1, text_2"]
    named = dataclasses.replace(file, header=["text", "label", "other"], notes=[])
    assert len(list(read_excel(named))) == 2
    assert "the first row looks like a line of names (text, label, text)" in "".join(named.notes)
    with pytest.raises(DataError, match=r"data.header names a column twice: text, text"):
        list(read_excel(dataclasses.replace(file, header=["text", "text"])))
    with pytest.raises(DataError, match="holds no result of the formula in A1"):
        list(read_excel(workbook(tmp_path / "y.xlsx", One=[["=1+1", "b"], ["question", "answer"], ["c", "d"]])))


def test_a_sheet_of_several_is_named_as_the_message_says(tmp_path):
    workbook(tmp_path / "x.xlsx", One=[["text"], ["a"]], Two=[["text"], ["b"]])
    with pytest.raises(DataError, match=r"has the sheets One, Two") as raised:
        list(open_source(str(tmp_path / "x.xlsx")).records())
    (setting,) = settings_in(str(raised.value))
    (source,) = yaml.safe_load(setting.partition("=")[2])
    assert [row for _, row in open_source(**source).records()] == [{"text": "a"}]
    with pytest.raises(DataError, match=r"has no sheet Three with values; it has One, Two"):
        list(open_source(str(tmp_path / "x.xlsx"), subset="Three").records())


def test_a_formula_without_its_result_is_a_bad_row(tmp_path):
    found = list(read_excel(workbook(tmp_path / "x.xlsx", One=[["text"], ["=1+1"], ["b"]])))
    assert "x.xlsx, row 2: the workbook holds no result of the formula in A2" in str(found[0][1])
    assert found[1] == ("row 3", {"text": "b"})


def test_what_is_no_workbook_is_refused(tmp_path):
    pytest.importorskip("openpyxl")
    for content in (b"a,b\n1,2\n", b"PK\x03\x04 and nothing more", b""):
        with pytest.raises(DataError, match=r"x.xlsx cannot be read as an Excel workbook"):
            list(read_excel(write(tmp_path, "x.xlsx", content)))


def test_a_workbook_without_openpyxl_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(NotInstalledError, match=r"pip install 'qlora-trainer\[excel\]'"):
        list(read_excel(write(tmp_path, "x.xlsx", b"PK\x03\x04")))
