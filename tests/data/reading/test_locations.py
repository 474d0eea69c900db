"""Lists, folders and patterns mean their files in order; what is none gets the line to type."""

import os
import re
from pathlib import Path

import pytest
import yaml
from advice import run_command_in, settings_in

from qlora_trainer.common.errors import DataError, FileMissingError
from qlora_trainer.config.load import load_config
from qlora_trainer.data.reading.files import open_source


def write(folder: Path, **files: str) -> None:
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".jsonl").write_text(f'{{"text": "{content}"}}\n')


def texts(path: object) -> list[str]:
    found = []
    for _, row in open_source(str(path)).records():
        assert isinstance(row, dict)
        found.append(row["text"])
    return found


def test_a_folder_is_its_files_in_order_and_it_is_said_how_many(tmp_path):
    write(tmp_path / "rows", b="2", a="1", sub__c="3", **{".hidden": "no"})
    for name in ("README.md", "dataset_info.json", ".gitattributes"):
        (tmp_path / "rows" / name).write_text("{}")
    source = open_source(str(tmp_path / "rows"))
    assert [place for place, _ in source.records()] == [f"rows/{name}.jsonl, line 1" for name in ("a", "b", "sub/c")]
    assert texts(tmp_path / "rows") == ["1", "2", "3"]
    assert source.summary.startswith("rows: 3 files are read: rows/a.jsonl, rows/b.jsonl, rows/sub/c.jsonl")
    assert source.summary.endswith("passed over: rows/README.md")


def test_a_pattern_is_its_files_in_order(tmp_path, monkeypatch):
    write(tmp_path, **{"part-2": "2", "part-1": "1", "other": "no", "x__part-3": "3"})
    assert texts(tmp_path / "part-*.jsonl") == ["1", "2"]
    assert texts(tmp_path / "**" / "part-[123].jsonl") == ["1", "2", "3"]
    monkeypatch.chdir(tmp_path)
    assert texts("part-?.jsonl") == ["1", "2"]
    with pytest.raises(FileMissingError, match=r"No file matches nothing\*.jsonl"):
        open_source("nothing*.jsonl")


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    write(tmp_path, **{"rows[1]": "brackets", "rows1": "no"})
    assert texts(tmp_path / "rows[1].jsonl") == ["brackets"]


def test_the_digest_of_a_folder_follows_names_and_contents(tmp_path):
    write(tmp_path / "rows", a="1", b="2")
    digests = {open_source(str(tmp_path / "rows")).digest}
    write(tmp_path / "rows", b="3")
    digests.add(open_source(str(tmp_path / "rows")).digest)
    (tmp_path / "rows" / "b.jsonl").rename(tmp_path / "rows" / "c.jsonl")
    digests.add(open_source(str(tmp_path / "rows")).digest)
    write(tmp_path / "rows", d="4")
    digests.add(open_source(str(tmp_path / "rows")).digest)
    assert len(digests) == 4


def test_an_empty_file_among_others_is_reported_and_a_folder_of_empty_files_refused(tmp_path):
    write(tmp_path / "rows", a="1")
    (tmp_path / "rows" / "b.jsonl").write_text("")
    source = open_source(str(tmp_path / "rows"))
    assert len(list(source.records())) == 1
    assert source.notes == ["rows/b.jsonl: holds no rows"]
    (tmp_path / "rows" / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="rows holds no rows"):
        list(open_source(str(tmp_path / "rows")).records())


def test_files_of_several_kinds_are_refused_and_the_line_names_those_of_one(tmp_path):
    write(tmp_path / "my rows", a="1", b="2")
    (tmp_path / "my rows" / "notes.txt").write_text("notes")
    with pytest.raises(DataError, match=r"files of several kinds: 2 .jsonl, 1 .txt") as raised:
        open_source(str(tmp_path / "my rows"))
    (setting,) = settings_in(str(raised.value))
    assert texts(yaml.safe_load(setting.partition("=")[2])) == ["1", "2"]
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none has no file that holds rows; it has none at all. Known endings"):
        open_source(str(tmp_path / "none"))


@pytest.mark.parametrize("names", [("train", "test"), ("training_1", "x-valid"), ("train__a", "eval__a")])
def test_a_folder_with_rows_for_evaluation_is_not_trained_on_as_a_whole(tmp_path, names):
    write(tmp_path / "rows", **{names[0]: "1", names[1]: "2"})
    with pytest.raises(DataError, match="files for training and others for evaluation") as raised:
        open_source(str(tmp_path / "rows"))
    train, evaluation = (setting.partition("=")[2] for setting in settings_in(str(raised.value)))
    assert (texts(train), texts(evaluation)) == (["1"], ["2"])


def test_a_link_to_a_folder_is_passed_over_and_said(tmp_path):
    write(tmp_path / "rows", a="1")
    (tmp_path / "rows" / "again").symlink_to(tmp_path / "rows")
    assert texts(tmp_path / "rows") == ["1"]
    assert "passed over: again" in open_source(str(tmp_path / "rows")).summary


@pytest.mark.parametrize("between", [",", " ", ", "])
def test_names_that_are_meant_as_a_list_get_the_list(tmp_path, between):
    write(tmp_path, a="1", b="2")
    with pytest.raises(FileMissingError, match="Several files are a list") as raised:
        open_source(f"{tmp_path}/a.jsonl{between}{tmp_path}/b.jsonl")
    (setting,) = settings_in(str(raised.value))
    assert [texts(name) for name in yaml.safe_load(setting.partition("=")[2])] == [["1"], ["2"]]


def test_plain_names_in_a_list_are_sources_and_patterns_become_absolute(tmp_path, monkeypatch):
    write(tmp_path, a="1", b="2")
    config = tmp_path / "c.yaml"
    config.write_text("model: {name: m}\ndata: {train: x}\n")
    monkeypatch.chdir(tmp_path)
    data = load_config(config, ["data.train=[a.jsonl, {path: b.jsonl}]", "data.eval=[b.jsonl, a.jsonl]"]).data
    assert isinstance(data.train, list)
    assert isinstance(data.eval, list)
    assert [source.path for source in data.train] == [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    assert [source.path for source in data.eval] == [str(tmp_path / name) for name in ("b.jsonl", "a.jsonl")]
    assert load_config(config, ["data.train=*.jsonl"]).data.train == str(tmp_path / "*.jsonl")
    assert load_config(config, ["data.rows=*.examples"]).data.rows == "*.examples"


@pytest.mark.parametrize(
    ("url", "command", "setting"),
    [
        ("http://h/rows.jsonl", "curl -fL http://h/rows.jsonl -o rows.jsonl", "data.train=rows.jsonl"),
        ("https://h/a%20b.csv?x=1&y=2", "curl -fL 'https://h/a%20b.csv?x=1&y=2' -o 'a b.csv'", "data.train=a b.csv"),
        (
            "https://huggingface.co/datasets/o/n/blob/main/x.jsonl",
            "curl -fL https://huggingface.co/datasets/o/n/resolve/main/x.jsonl -o x.jsonl",
            "data.train=x.jsonl",
        ),
        (
            "https://github.com/o/n/blob/main/x.jsonl",
            "curl -fL https://raw.githubusercontent.com/o/n/main/x.jsonl -o x.jsonl",
            "data.train=x.jsonl",
        ),
        ("s3://b/k/x.parquet", "aws s3 cp s3://b/k/x.parquet .", "data.train=x.parquet"),
        ("gs://b/x.jsonl", "gcloud storage cp gs://b/x.jsonl .", "data.train=x.jsonl"),
        (
            "hf://datasets/o/n@v1/data/x.jsonl",
            "hf download --repo-type dataset o/n data/x.jsonl --revision v1 --local-dir .",
            "data.train=data/x.jsonl",
        ),
        ("hf://datasets/o/n", None, "data.train=o/n"),
        ("https://huggingface.co/datasets/o/n", None, "data.train=o/n"),
        ("file:///data/x.jsonl", None, "data.train=/data/x.jsonl"),
        ("ftp://h/x.jsonl", None, "data.train=x.jsonl"),
    ],
)
def test_a_url_is_refused_as_one_with_what_to_type(url, command, setting):
    with pytest.raises(DataError, match=re.escape(url)) as raised:
        open_source(url)
    message = str(raised.value)
    assert settings_in(message) == [setting]
    if command:
        assert f"Fetch it: {command}\n" in message


JSON_LINES = '{"text": "a"}\n{"text": "b"}\n'


@pytest.mark.parametrize(
    ("content", "ending"),
    [
        (JSON_LINES, ".jsonl"),
        ('[\n {"text": "a"},\n {"text": "b"}\n]', ".json"),
        ('{\n "text": "a"\n}\n{"text": "b"}', ".json"),
        ("text\tid\na\t1\nb\t2\n", ".tsv"),
        ('text;id\n"a";1\nb;2\n', ".csv"),
        ("text,id\na,1\nb,2\n", ".csv"),
    ],
)
def test_rows_under_the_name_of_a_text_are_asked_about_and_both_answers_work(tmp_path, content, ending):
    path = tmp_path / "rows of mine.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=r"a .txt file is read as one plain text") as raised:
        list(open_source(str(path)).records())
    assert settings_in(str(raised.value)) == ["data.format=text"]
    assert list(open_source(str(path), is_document=True).records()) == [(f"{path.name}, line 1", {"text": content})]
    run_command_in(str(raised.value))
    assert texts(path.with_suffix(ending)) == ["a", "b"]


@pytest.mark.parametrize(("name", "made"), [("rows.jsonl.txt", "rows.jsonl"), ("rows.v2.txt", "rows.v2.jsonl")])
def test_the_ending_that_a_browser_adds_is_taken_off(tmp_path, name, made):
    (tmp_path / name).write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(DataError, match=r"a .txt file is read as one plain text") as raised:
        list(open_source(str(tmp_path / name)).records())
    run_command_in(str(raised.value))
    assert texts(tmp_path / made) == ["a", "b"]


@pytest.mark.parametrize(
    "content",
    [
        "Tyger Tyger, burning bright,\nIn the forests, of the night,\nWhat immortal, hand or eye,\n",
        "One paragraph; with a semicolon.\n\nAnother one, without.\n",
        "{ is a brace\n",
        "[1] A footnote.\n",
        "One line, of text\n",
    ],
)
def test_plain_text_is_not_taken_for_rows(tmp_path, content):
    (tmp_path / "x.txt").write_text(content)
    assert texts(tmp_path / "x.txt") == [content]


@pytest.mark.parametrize("ending", [".yaml", ".yml", ".md"])
def test_a_file_of_another_kind_is_made_one_that_is_read_by_the_command(tmp_path, ending):
    path = tmp_path / f"my rows{ending}"
    path.write_text("- {text: a}\n- {text: b}\n" if ending != ".md" else "a")
    with pytest.raises(DataError) as raised:
        open_source(str(path))
    run_command_in(str(raised.value))
    assert texts(path.with_suffix(".txt" if ending == ".md" else ".json")) == (["a"] if ending == ".md" else ["a", "b"])


@pytest.mark.parametrize("ending", [".xls", ".pdf", ".db", ".pkl", ".7z"])
def test_a_file_that_is_no_text_says_what_it_is(tmp_path, ending):
    (tmp_path / f"x{ending}").write_bytes(b"x")
    with pytest.raises(DataError, match=rf"x{re.escape(ending)} is an? "):
        open_source(str(tmp_path / f"x{ending}"))


def test_json_lines_are_read_under_all_their_names(tmp_path):
    for ending in (".jsonl", ".ndjson", ".jsonlines", ".jl"):
        (tmp_path / f"x{ending}").write_text(JSON_LINES)
        assert texts(tmp_path / f"x{ending}") == ["a", "b"]


def test_a_folder_that_may_not_be_read_is_an_error_of_ours(tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()

    def refuse(*_: object, **__: object) -> object:
        raise PermissionError(13, "Permission denied", "rows")

    monkeypatch.setattr(os, "walk", refuse)
    with pytest.raises(DataError, match="rows cannot be opened: Permission denied"):
        open_source(str(tmp_path / "rows"))
