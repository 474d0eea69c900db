"""What is set has an effect, and a run that would skip too many rows stops before it starts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from advice import settings_in
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_tokenizers import tiny_tokenizer

from qlora_trainer.common.errors import DataError
from qlora_trainer.config.load import load_config
from qlora_trainer.data.preparation.prepare import Prepared, prepare
from qlora_trainer.data.preparation.reports import SourceReport
from qlora_trainer.data.preparation.source_checks import check_skipped

TOKENIZER = tiny_tokenizer("smollm2")


def run(tmp_path: Path, *settings: str) -> Prepared:
    """Prepare as the command line would."""
    config = tmp_path / "config.yaml"
    config.write_text("model: {name: m}\ndata: {train: x, eval: 0, max_length: 128}\n")
    data = load_config(config, settings).data
    return prepare(data, TOKENIZER, max_positions=None, seed=0, cache_dir=tmp_path / "cache")


def write(tmp_path: Path, name: str, rows: list[Any]) -> str:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if name.endswith(".csv"):
        path.write_text("".join(",".join(row.values()) + "\n" for row in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(good: int, bad: int) -> list[dict[str, str]]:
    return [{"question": f"q{n}", "answer": "a"} for n in range(good)] + [{"question": "q"}] * bad


@pytest.mark.parametrize(("good", "bad"), [(1, 99), (8, 1), (19, 41)])
def test_more_skipped_rows_than_allowed_stop_the_run_until_they_are_allowed(tmp_path, good, bad):
    path = write(tmp_path, "x.jsonl", rows_of(good, bad))
    settings = [f"data.train={path}", "data.on_bad_row=skip"]
    share = re.escape(f"x.jsonl: {bad} of {good + bad} rows ({bad / (good + bad):.1%}) would be skipped")
    for _ in range(2):  # prepared, and then from the cache
        with pytest.raises(DataError, match=share) as raised:
            run(tmp_path, *settings)
    report = run(tmp_path, *settings, *settings_in(str(raised.value))).report
    assert report.train.examples == good


@given(st.integers(1, 10**6).flatmap(lambda rows: st.tuples(st.integers(1, rows), st.just(rows))))
@example((29, 100))
@example((57, 100))
@example((58, 200))
def test_the_share_that_the_message_prints_is_allowed_and_a_hundredth_less_is_not(counts):
    skipped, rows = counts
    report = SourceReport("x.jsonl", rows, skipped={"bad": skipped})
    with pytest.raises(DataError) as raised:
        check_skipped([report], 0)
    (setting,) = settings_in(str(raised.value))
    allowed = float(setting.removeprefix("data.max_skipped="))
    check_skipped([report], allowed)
    with pytest.raises(DataError):
        check_skipped([report], allowed - 0.01)


def test_a_share_below_the_limit_is_the_first_warning(tmp_path):
    path = write(tmp_path, "x.jsonl", rows_of(18, 2))
    report = run(tmp_path, f"data.train={path}", "data.on_bad_row=skip").report
    assert report.warnings[0].startswith("2 bad rows were skipped, 10.0% of all (")
    with pytest.raises(DataError, match=r"data.max_skipped allows \(0.05\)"):
        run(tmp_path, f"data.train={path}", "data.on_bad_row=skip", "data.max_skipped=0.05")


def test_each_source_is_held_to_the_limit(tmp_path):
    good, bad = write(tmp_path, "a.jsonl", rows_of(100, 0)), write(tmp_path, "b.jsonl", rows_of(3, 2))
    with pytest.raises(DataError, match=r"b.jsonl: 2 of 5 rows"):
        run(tmp_path, f"data.train=[{good}, {bad}]", "data.on_bad_row=skip")


ROWS = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]


@pytest.mark.parametrize(
    ("name", "setting", "key"),
    [
        ("x.jsonl", "data.header=[x, y]", "header"),
        ("x.json", "data.header=[x, y]", "header"),
        ("x.parquet", "data.encoding=cp1252", "encoding"),
        ("x.parquet", "data.header=[x, y]", "header"),
        ("x.parquet", "data.rows=data", "rows"),
        ("x.csv", "data.rows=data", "rows"),
    ],
)
def test_a_setting_without_effect_is_refused_and_left_out_as_the_message_says(tmp_path, name, setting, key):
    import pyarrow
    import pyarrow.parquet

    path = str(tmp_path / name)
    if name == "x.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        write(tmp_path, name, [dict(zip(ROWS[0], ROWS[0], strict=True)), *ROWS])
    with pytest.raises(DataError, match=rf"data.{key} is for .*, and has no effect on {name}") as raised:
        run(tmp_path, f"data.train={path}", setting)
    assert run(tmp_path, f"data.train={path}", setting, *settings_in(str(raised.value))).report.train.examples >= 2
    with pytest.raises(DataError, match=rf"{name}: {key} is for .*, and has no effect here"):
        run(tmp_path, f"data.train=[{{path: {path}, {setting.removeprefix('data.').replace('=', ': ')}}}]")


def test_a_setting_for_all_sources_is_meant_for_those_that_can_have_it(tmp_path):
    table, lines = write(tmp_path, "x.csv", ROWS), write(tmp_path, "x.jsonl", ROWS)
    assert run(tmp_path, f"data.train=[{table}, {lines}]", "data.header=[question, answer]").report.train.examples == 4
    prepared = run(tmp_path, f"data.train={table}", f"data.eval={lines}", "data.header=[question, answer]")
    assert (len(prepared.train), len(prepared.eval)) == (2, 2)


def test_files_of_a_list_a_folder_and_a_pattern_are_prepared_and_counted(tmp_path):
    first, second = write(tmp_path, "rows/a.jsonl", ROWS), write(tmp_path, "rows/b.jsonl", ROWS)
    listed = run(tmp_path, f"data.train=[{first}, {second}]", f"data.eval=[{first}]")
    assert [(source.name, source.rows) for source in listed.report.sources] == [
        ("a.jsonl", 2),
        ("b.jsonl", 2),
        ("a.jsonl", 2),
    ]
    assert (len(listed.train), len(listed.eval)) == (4, 2)
    for path in (tmp_path / "rows", tmp_path / "rows" / "*.jsonl"):
        prepared = run(tmp_path, f"data.train={path}")
        assert len(prepared.train) == 4
        assert any("2 files are read: " in warning for warning in prepared.report.warnings)
    before = run(tmp_path, f"data.train={tmp_path / 'rows'}")
    write(tmp_path, "rows/b.jsonl", ROWS[::-1])
    assert run(tmp_path, f"data.train={tmp_path / 'rows'}").key != before.key


def test_what_is_worth_knowing_of_how_a_file_was_read_is_said_again_from_the_cache(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"question": ["a", "c"], "answer": ["b", "d"]}))
    reports = [run(tmp_path, f"data.train={path}").report for _ in range(2)]
    assert [report.cached for report in reports] == [False, True]
    assert [report.train.examples for report in reports] == [2, 2]
    for report in reports:
        assert "x.json: is one object that holds a table by its columns; it is read as 2 rows" in report.warnings
