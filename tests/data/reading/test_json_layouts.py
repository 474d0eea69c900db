"""What a JSON value holds is read as its rows, or the message names where they are; every hint is followed."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from advice import settings_in

from qlora_trainer.common.errors import ConfigError, DataError
from qlora_trainer.data.formats.detect import resolve_format
from qlora_trainer.data.formats.parse import RecordReader
from qlora_trainer.data.reading import streams
from qlora_trainer.data.reading.files import open_source
from qlora_trainer.data.reading.json_layouts import check_paths, rows_inside
from qlora_trainer.data.reading.json_text import RowDecoder

ROWS = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}, {"question": "e", "answer": "f"}]
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def write(tmp_path: Path, value: Any, name: str = "x.json", indent: int | None = None) -> Path:
    path = tmp_path / name
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=indent))
    return path


def rows(path: Path, **how: Any) -> list[Any]:
    return [row for _, row in open_source(str(path), **how).records()]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_table_by_columns_is_read_by_rows_as_pandas_and_datasets_write_it(tmp_path, indent):
    import pandas

    frame = pandas.DataFrame(ROWS)
    written = {
        "dict of lists": frame.to_dict("list"),
        "columns": json.loads(frame.to_json()),
        "split": json.loads(frame.to_json(orient="split")),
        "records": json.loads(frame.to_json(orient="records")),
    }
    for name, value in written.items():
        path = write(tmp_path, value, f"{name}.json", indent)
        source = open_source(str(path))
        assert [row for _, row in source.records()] == ROWS, name
        assert bool(source.notes) == (name != "records")


@pytest.mark.parametrize("orient", ["index", "table"])
@pytest.mark.parametrize("indent", [None, 1])
def test_the_other_layouts_of_pandas_are_read_as_the_message_says(tmp_path, orient, indent):
    import pandas

    path = write(tmp_path, json.loads(pandas.DataFrame(ROWS).to_json(orient=orient)), indent=indent)
    (record,) = rows(path)
    with pytest.raises(DataError) as raised:
        resolve_format(record, "auto", {}, "x.json, row 1")
    setting = settings_in(str(raised.value))[0]
    found = rows(path, rows=setting.removeprefix("data.rows=").strip('"'))
    assert [{key: row[key] for key in ("question", "answer")} for row in found] == ROWS


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("value", "key"),
    [
        ({"canary": "x", "examples": ROWS}, "examples"),
        ({"type": "text2text", "instances": ROWS}, "instances"),
        ({"version": "1.0", "data": ROWS}, "data"),
        ({"data": {"train": ROWS, "note": "x"}}, "data.train"),
        ({"my rows": ROWS}, "my rows"),
        ({"yes": ROWS}, "yes"),
        ({"id-1": ROWS[0], "id-2": ROWS[1], "id-3": ROWS[2]}, "*"),
    ],
)
def test_rows_inside_an_object_are_named_and_read_by_the_line_that_is_printed(tmp_path, value, key, indent):
    path = write(tmp_path, value, indent=indent)
    (record,) = rows(path)
    hint = rows_inside(record)
    assert "3 rows" in hint
    (setting,) = settings_in(hint)
    from qlora_trainer.config.load import load_config

    config = write(tmp_path, "model: {name: m}\ndata: {train: x}\n", "c.yaml")
    named = load_config(config, [setting]).data.rows
    assert named == key
    assert rows(path, rows=named) == ROWS


def test_rows_deep_inside_are_read_by_their_path(tmp_path):
    paragraph = {"context": "c", "qas": ROWS}
    value = {"version": "1", "data": [{"title": "t", "paragraphs": [paragraph, paragraph]}, {"paragraphs": []}]}
    for indent in (None, 1):
        assert rows(write(tmp_path, value, indent=indent), rows="data.*.paragraphs.*.qas") == ROWS * 2
    lines = "".join(json.dumps({"id": n, "qas": ROWS}) + "\n" for n in range(2))
    found = list(open_source(str(write(tmp_path, lines, "x.jsonl")), rows="qas").records())
    assert [row for _, row in found] == ROWS * 2
    assert found[4][0] == "x.jsonl, line 2, row 2"
    assert rows(write(tmp_path, [{"conversation": ROWS}, {"conversation": ROWS}]), rows="*.conversation") == ROWS * 2


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_rows_inside_are_read_a_piece_at_a_time_whatever_a_block_cuts(tmp_path, monkeypatch, block):
    monkeypatch.setattr(streams, "READ_BYTES", block)
    value = {"a": {"b": [1, {"c": "}"}]}, "rows": ROWS, "z": "]"}
    assert rows(write(tmp_path, value, indent=1), rows="rows") == ROWS


@pytest.mark.parametrize(
    ("rows_at", "words"),
    [
        ("exmples", "data.rows names exmples, but there is canary, examples"),
        ("canary", "data.rows leads to text and should lead to a list"),
        ("canary.x", "data.rows names x, where there is text"),
        ("examples.x", r"data.rows names x, where there is a list"),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_path_that_leads_to_no_rows_is_an_error_of_the_setting(tmp_path, rows_at, words, indent):
    path = write(tmp_path, {"canary": "x", "examples": ROWS}, indent=indent)
    with pytest.raises(DataError, match=words):
        rows(path, rows=rows_at)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"rows": [{"a": 1}', "the file was cut off, the array has no end"),
        ('{\n"rows": [{"a": 1}]', r"Expecting ',' or '}'"),
        ('{\n"rows" [{"a": 1}]}', "Expecting a key and ':'"),
        ('{\n"rows": [{"a": 1}], "rows": []}', "the key rows is there twice"),
    ],
)
def test_broken_json_around_rows_is_an_error(tmp_path, content, words):
    with pytest.raises(DataError, match=words):
        rows(write(tmp_path, content), rows="rows")


def test_a_list_of_turns_is_a_row_and_an_array_of_turns_one_conversation(tmp_path):
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    for turns in (TURNS, sharegpt):
        lines = json.dumps(turns) + "\n" + json.dumps(turns) + "\n"
        for name in ("x.jsonl", "x.json"):
            assert rows(write(tmp_path, lines, name)) == [{"messages": turns}] * 2
        for indent in (None, 1):
            assert rows(write(tmp_path, turns, indent=indent)) == [{"messages": turns}]
            assert rows(write(tmp_path, [turns, turns], indent=indent)) == [{"messages": turns}] * 2
        assert rows(write(tmp_path, {"rows": [turns]}), rows="rows") == [{"messages": turns}]


def test_rows_that_only_have_such_columns_stay_rows(tmp_path):
    posts = [{"role": "moderator", "content": "a"}, {"from": "x@y", "text": "b"}]
    assert rows(write(tmp_path, posts)) == posts
    mixed = [*TURNS, {"text": "c"}]
    assert rows(write(tmp_path, mixed)) == mixed


def test_lists_of_rows_a_line_are_rows_and_other_lists_are_bad_rows(tmp_path):
    lines = json.dumps(ROWS[:2]) + "\n" + json.dumps(ROWS[2:]) + "\n" + '["a", "b"]\n'
    found = list(open_source(str(write(tmp_path, lines, "x.jsonl"))).records())
    assert [row for _, row in found[:3]] == ROWS
    assert found[1][0] == "x.jsonl, line 1, item 2"
    assert "a row should be a JSON object with named columns, or a list of turns, and is a list" in str(found[3][1])


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"messages": TURNS, "tags": ["x", "y"]},
        {"messages": TURNS, "tools": [{"name": "f"}, {"name": "g"}]},
        {"text": "a"},
        {"question": "a", "answer": "b", "notes": []},
        {"user": {"text": "a"}, "assistant": {"text": "b"}},
    ],
)
def test_the_one_row_of_a_file_stays_one_row(tmp_path, record):
    for indent in (None, 1):
        assert rows(write(tmp_path, record, indent=indent)) == [record]


def test_no_hint_is_given_for_a_row_among_others(tmp_path):
    first, _ = rows(write(tmp_path, [{"data": ROWS}, {"data": ROWS}]))
    assert rows_inside(first) == ""


def test_one_row_is_not_made_of_the_first_of_many_inside(tmp_path):
    (record,) = rows(write(tmp_path, {"canary": "x", "examples": ROWS}))
    with pytest.raises(ConfigError, match="3 rows inside it") as raised:
        check_paths(record, ["examples.0.question"], "x.json, row 1")
    assert settings_in(str(raised.value)) == ["data.rows=examples"]
    check_paths(record, ["canary"], "")
    (row,) = rows(write(tmp_path, {"messages": TURNS}))
    check_paths(row, ["messages.0.content"], "")


def test_an_object_longer_than_a_row_may_be_names_the_key_that_holds_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "READ_BYTES", 64)
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 1000)
    many = [{"text": f"{n:09}"} for n in range(200)]
    for indent in (None, 1):
        path = write(tmp_path, {"version": 1, "entries": many}, indent=indent)
        with pytest.raises(DataError, match="longer than") as raised:
            rows(path)
        assert settings_in(str(raised.value)) == ["data.rows=entries"]
        assert rows(path, rows="entries") == many


def test_one_row_is_not_made_of_many_inside_where_columns_are_ignored(tmp_path):
    (record,) = rows(write(tmp_path, {"canary": "x", "label": 1, "examples": ROWS}))
    columns = {"question": "examples.0.question", "answer": "examples.0.answer"}
    reader = RecordReader("auto", columns, {}, ignore=["label"])
    with pytest.raises(ConfigError, match="3 rows inside it"):
        reader.read(record, "x.json, row 1")


def test_a_line_with_rows_inside_is_decoded_once_and_a_bad_one_is_named_as_any_other(tmp_path, monkeypatch):
    good = json.dumps({"id": 1, "qas": ROWS})
    bad = [good[:-1], f"{good} {good}", json.dumps({"id": 2}), "{'qas': []}"]
    path = write(tmp_path, "".join(f"{line}\n" for line in (good, *bad, good)), "x.jsonl")
    found = list(open_source(str(path), rows="qas").records())
    assert [row for _, row in found if not isinstance(row, DataError)] == ROWS * 2
    errors = [str(row) for _, row in found if isinstance(row, DataError)]
    said = ["line 2: not JSON: Expecting ',' delimiter at column", "line 3: not JSON: Extra data at column"]
    said += ["line 4: data.rows names qas, but there is id", "line 5: not JSON: Expecting property name"]
    assert [one for one, words in zip(errors, said, strict=True) if f"x.jsonl, {words}" not in one] == []
    monkeypatch.setattr(RowDecoder, "only_value", decode := Mock())
    assert rows(write(tmp_path, f"{good}\n{good}\n", "y.jsonl"), rows="qas") == ROWS * 2
    assert decode.call_count == 0
