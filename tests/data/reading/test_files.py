"""A file or a hub name becomes records with their places; what cannot be had is reported with what there is."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from data_files import write_file

from qlora_trainer.common.errors import DataError, FileMissingError
from qlora_trainer.data.reading.files import open_source


def records(path: Path, **how: Any) -> list[Any]:
    return [record for _, record in open_source(str(path), **how).records()]


A, B = {"text": "a"}, {"text": "b"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", '{"text": "a"}\n{"text": "b"}\n'),
        ("x.jsonl", '\ufeff{"text": "a"}\r\n\r\n{"text": "b"}'),
        ("x.json", '[{"text": "a"}, {"text": "b"}]'),
        ("x.json", '\ufeff\n[\n{"text": "a"},\n{"text": "b"}\n]'),
        ("x.json", '{"text": "a"}\n{"text": "b"}\n'),
        ("x.csv", "text\na\nb\n"),
        ("x.csv", '\ufefftext\r\n"a"\r\nb'),
        ("x.tsv", "text\na\nb\n"),
    ],
)
def test_every_way_to_write_the_same_rows_reads_the_same(tmp_path, name, content):
    assert records(write_file(tmp_path, name, content)) == [A, B]


def test_a_single_object_is_one_row(tmp_path):
    assert records(write_file(tmp_path, "x.json", '{\n"text": "a"\n}')) == [A]


def test_every_kind_of_text_file_may_be_compressed(tmp_path):
    for name, content in {
        "x.jsonl": '{"text": "a"}\n{"text": "b"}\n',
        "x.ndjson": '{"text": "a"}\n{"text": "b"}\n',
        "x.json": '[{"text": "a"}, {"text": "b"}]',
        "x.csv": "text\na\nb\n",
        "x.tsv": "text\na\nb\n",
    }.items():
        assert records(write_file(tmp_path, name + ".gz", gzip.compress(content.encode()))) == [A, B]
        packed = pyarrow.compress(content.encode(), codec="zstd", asbytes=True)
        assert records(write_file(tmp_path, name + ".zst", packed)) == [A, B]
        assert records(write_file(tmp_path, name, content.encode("utf-16")), encoding="utf-16") == [A, B]
    source = open_source(str(write_file(tmp_path, "y.txt.gz", gzip.compress(b"one"))))
    assert (source.name, list(source.records())) == ("y.txt.gz", [("y.txt.gz, line 1", {"text": "one"})])


def test_a_text_file_is_one_document(tmp_path):
    assert records(write_file(tmp_path, "x.txt", "one\r\ntwo\n")) == [{"text": "one\ntwo\n"}]


def test_lines_end_at_newlines_only(tmp_path):
    text = "a\u2028b\u0085c\x0bd"
    path = write_file(tmp_path, "x.jsonl", json.dumps({"text": text}, ensure_ascii=False) + "\n")
    assert records(path) == [{"text": text}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", "a,b\n", r"holds no rows"),
        ("x.jsonl", "", r"holds no rows"),
        ("x.json", " \n", r"holds no rows"),
        ("x.json", "[]", r"holds no rows"),
        ("x.txt", "\n", r"holds no rows"),
        ("x.rows", "hi", r"no kind that can be read. Known endings: .jsonl, .*those of text also with .gz"),
        ("x.gz", b"\x1f\x8b\x08\x00", r"no kind that can be read"),
        ("x.parquet.gz", b"\x1f\x8b\x08\x00", r"unpack it: files of this kind are compressed inside already"),
    ],
)
def test_a_file_that_holds_nothing_or_is_of_no_kind_is_refused(tmp_path, name, content, words):
    with pytest.raises(DataError, match=words):
        records(write_file(tmp_path, name, content))


def test_a_row_that_cannot_be_read_comes_as_its_error_and_the_next_follows(tmp_path):
    reader = open_source(str(write_file(tmp_path, "x.jsonl", '{"text": "a"}\n{\n{"text": "b"}'))).records()
    assert next(reader) == ("x.jsonl, line 1", A)
    where, error = next(reader)
    assert where == "x.jsonl, line 2"
    assert isinstance(error, DataError)
    assert next(reader) == ("x.jsonl, line 3", B)


def test_a_missing_file_names_near_misses(tmp_path):
    write_file(tmp_path, "train.jsonl", "{}")
    with pytest.raises(FileMissingError, match=r"There is no file .*trian.jsonl. Did you mean train.jsonl\?"):
        open_source(str(tmp_path / "trian.jsonl"))
    with pytest.raises(FileMissingError, match=r"That directory has train.jsonl"):
        open_source(str(tmp_path / "zzz.parquet"))
    with pytest.raises(FileMissingError, match="no directory"):
        open_source(str(tmp_path / "nowhere" / "train.jsonl"))


def test_a_pipe_and_a_file_that_cannot_be_opened_are_reported(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match=r"x.jsonl is no regular file, but a pipe or a device, .* Write it into a file"):
        open_source(str(tmp_path / "x.jsonl"))
    with pytest.raises(DataError, match=r"cannot be opened: File name too long"):
        open_source(str(tmp_path / ("x" * 300 + ".jsonl")))
    path = write_file(tmp_path, "y.jsonl", "{}")

    def refuse(*_: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"y.jsonl cannot be opened: Permission denied"):
        open_source(str(path))


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"split": "test"}, "split test would"),
        ({"subset": "main"}, "subset main would"),
        ({"split": "test", "subset": "main"}, "split test and subset main would"),
    ],
)
def test_a_split_or_subset_of_a_file_is_refused_as_the_whole_file_would_be_read(tmp_path, part, words):
    path = str(write_file(tmp_path, "x.jsonl", '{"text": "a"}'))
    with pytest.raises(DataError, match=rf"x.jsonl is a file, and {words} have no effect: .*Leave that out"):
        open_source(path, **part)
    assert [record for _, record in open_source(path, "train").records()] == [A]


def test_a_name_that_is_no_file_is_asked_of_the_hub(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        if name == "some/missing":
            raise FileNotFoundError("not on the hub")
        return datasets.Dataset.from_list([A | {"parts": [{"x": 1}]}, B | {"parts": [{"y": 2}]}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source("some/rows", "test", subset="main")
    assert [record for _, record in source.records()] == [A | {"parts": [{"x": 1}]}, B | {"parts": [{"y": 2}]}]
    assert next(source.records())[0] == "some/rows (test), row 1"
    assert asked == [("some/rows", "main", "test")]
    with pytest.raises(
        DataError, match=r"no file some/missing here, and it cannot be loaded as a hub data set.*not on the hub"
    ):
        open_source("some/missing")


def test_a_hub_split_without_rows_is_said(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **how: datasets.Dataset.from_list([]))
    with pytest.raises(DataError, match=r"some/rows \(test\) holds no rows"):
        open_source("some/rows", "test")


def test_splits_and_subsets_of_a_hub_data_set_are_listed_where_none_fits(tmp_path, monkeypatch):
    """With datasets' own errors, raised for a data set in a directory."""
    import datasets

    for split in ("train", "test"):
        write_file(tmp_path, f"{split}.jsonl", '{"text": "a"}\n')
    original = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda _, *args, **how: original(str(tmp_path), *args, **how, cache_dir=tmp_path / "c"),
    )
    with pytest.raises(DataError, match=r"some/rows has no split dev; it has train, test. Name one: .*split: train"):
        open_source("some/rows", "dev")
    write_file(
        tmp_path,
        "README.md",
        "---\nconfigs:\n- config_name: main\n  data_files: train.jsonl\n"
        "- config_name: other\n  data_files: test.jsonl\n---\n",
    )
    for subset in (None, "man"):
        with pytest.raises(DataError, match=r"some/rows has the subsets main, other. Name one: .*subset: main"):
            open_source("some/rows", subset=subset)


def test_the_digest_follows_the_content(tmp_path):
    first = open_source(str(write_file(tmp_path, "x.jsonl", "{}"))).digest
    assert open_source(str(write_file(tmp_path, "x.jsonl", "{}"))).digest == first
    assert open_source(str(write_file(tmp_path, "x.jsonl", "{} "))).digest != first
    assert open_source(str(write_file(tmp_path, "x.jsonl", "{}")), encoding="cp1252").digest != first
    assert open_source(str(write_file(tmp_path, "x.jsonl", "{}")), header=["a"]).digest != first
