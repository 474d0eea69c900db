import json
from pathlib import Path

import pytest

from qlora_trainer.data import files
from qlora_trainer.data.files import open_source, read_records
from qlora_trainer.errors import DataError, FileMissingError


def write(tmp_path: Path, name: str, content: bytes | str) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def records(path: Path) -> list[dict]:
    return [record for _, record in read_records(path)]


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
    assert records(write(tmp_path, name, content)) == [A, B]


def test_a_single_object_is_one_row(tmp_path):
    assert records(write(tmp_path, "x.json", '{\n"text": "a"\n}')) == [A]


def test_parquet_rows_keep_nested_columns(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": [{"role": "user", "content": "é"}]}, {"messages": [{"role": "user", "content": "b"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert records(tmp_path / "x.parquet") == rows
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        records(write(tmp_path, "broken.parquet", b"PAR1 and nothing more"))


def test_quoted_fields_hold_commas_and_newlines_and_places_count_lines(tmp_path):
    path = write(tmp_path, "x.csv", 'prompt,completion\n"a, ""b""\nc",d\ne,f\n')
    assert list(read_records(path)) == [
        ("x.csv, line 2", {"prompt": 'a, "b"\nc', "completion": "d"}),
        ("x.csv, line 4", {"prompt": "e", "completion": "f"}),
    ]


def test_a_text_file_is_one_document(tmp_path):
    assert records(write(tmp_path, "x.txt", "one\r\ntwo\n")) == [{"text": "one\ntwo\n"}]


def test_lines_end_at_newlines_only(tmp_path):
    text = "a\u2028b\u0085c\x0bd"
    path = write(tmp_path, "x.jsonl", json.dumps({"text": text}, ensure_ascii=False).replace("\\u000b", " ") + "\n")
    assert records(path) == [{"text": text.replace("\x0b", " ")}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", '{"text": "a"}\n{"text": \n', r"x.jsonl, line 2: not JSON: Expecting value"),
        ("x.jsonl", '{"text": "a"}\n["a"]\n', r"x.jsonl, line 2: a row should be a JSON object.*list"),
        ("x.jsonl", '[{"text": "a"}]', r"begins a JSON array.*Call it .json"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"x.jsonl, line 2: byte 24 \(0xe9\) is not UTF-8"),
        ("x.jsonl", b'\xef\xbb\xbf{"t": "\xe9"}', r"line 1: byte 10 \(0xe9\)"),
        ("x.json", b'[{"text":\n"\xe9"}]', r"x.json, line 2: byte 11 \(0xe9\)"),
        ("x.json", '[{"text": "a"},\n{"text" "b"}]', r"x.json: not JSON: Expecting ':' delimiter at line 2, column 9"),
        ("x.json", '{"text": "a"', r"x.json: not JSON"),
        ("x.json", '{"text": "a"}\n{"text" "b"}', r"x.json, line 2: not JSON"),
        ("x.json", '"hello"', r"should hold an array of objects, and holds str"),
        ("x.json", '[{"text": "a"}, 5]', r"x.json, row 2: a row should be a JSON object"),
        ("x.json", "[" * 100_000, r"cannot be read as JSON"),
        ("x.csv", "a,b\n1,2\n1,2,3\n", r"x.csv, line 3: 3 fields where the first line names 2 columns \(a, b\)"),
        ("x.csv", "a,a\n1,2\n", r"column name appears twice"),
        ("x.csv", 'a,b\n"1,2\n3,4\n', r"x.csv, line 2: .*Is a quote missing"),
        ("x.csv", "a,b\n", r"holds no rows"),
        ("x.jsonl", "", r"holds no rows"),
        ("x.json", " \n", r"holds no rows"),
        ("x.json", "[]", r"holds no rows"),
        ("x.txt", "\n", r"holds no rows"),
        ("x.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", r"git-lfs pointer.*git lfs pull"),
        ("x.jsonl", "hi".encode("utf-16"), r"is UTF-16 text; convert it"),
        ("x.jsonl", b"\x1f\x8b\x08\x00", r"compressed with gzip"),
        ("x.xlsx", "hi", r"no kind that can be read. Known endings: .jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_says_where_and_why(tmp_path, name, content, words):
    with pytest.raises(DataError, match=words):
        records(write(tmp_path, name, content))


def test_rows_before_a_broken_line_are_given_first(tmp_path):
    reader = read_records(write(tmp_path, "x.jsonl", '{"text": "a"}\n{'))
    assert next(reader) == ("x.jsonl, line 1", A)
    with pytest.raises(DataError):
        next(reader)


def test_an_endless_line_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 2**20)
    with pytest.raises(DataError, match="line 2: longer than 1 MiB"):
        records(write(tmp_path, "x.jsonl", '{"text": "a"}\n' + "x" * (2**20 + 1)))


def test_a_missing_file_names_near_misses(tmp_path):
    write(tmp_path, "train.jsonl", "{}")
    with pytest.raises(FileMissingError, match=r"There is no file .*trian.jsonl. Did you mean train.jsonl\?"):
        open_source(str(tmp_path / "trian.jsonl"))
    with pytest.raises(FileMissingError, match=r"That directory has train.jsonl"):
        open_source(str(tmp_path / "zzz.parquet"))
    with pytest.raises(FileMissingError, match="no directory"):
        open_source(str(tmp_path / "nowhere" / "train.jsonl"))


def test_a_directory_is_refused_with_what_is_in_it(tmp_path):
    write(tmp_path, "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"is a directory; name a file in it: train.jsonl"):
        open_source(str(tmp_path))


def test_a_name_that_is_no_file_is_asked_of_the_hub(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "some/missing":
            raise FileNotFoundError("not on the hub")
        return datasets.Dataset.from_list([A, B])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source("some/rows", "test")
    assert [record for _, record in source.records()] == [A, B]
    assert next(source.records())[0] == "some/rows (test), row 1"
    assert asked == [("some/rows", "test")]
    with pytest.raises(DataError, match=r"no file some/missing here, and as a hub data set.*not on the hub"):
        open_source("some/missing")


def test_the_digest_follows_the_content(tmp_path):
    first = open_source(str(write(tmp_path, "x.jsonl", "{}"))).digest
    assert open_source(str(write(tmp_path, "x.jsonl", "{}"))).digest == first
    assert open_source(str(write(tmp_path, "x.jsonl", "{} "))).digest != first
