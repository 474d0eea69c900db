"""A bad row stops preparation with its place, or is skipped, counted by its reason, and listed."""

import dataclasses
import functools
import json
from collections import Counter
from typing import Any

import pytest
from preparing import BAD_ROWS, ROWS, run, stores, write
from tiny_tokenizers import tiny_tokenizer

from qlora_trainer.common.errors import DataError
from qlora_trainer.config.data_schema import Source
from qlora_trainer.data.preparation import source_keys
from qlora_trainer.data.preparation.reports import MAX_REASONS, count_reasons


def test_a_row_that_the_template_refuses_stops_preparation_with_its_place(tmp_path):
    path = write(tmp_path, "x.jsonl", [ROWS[0], {**ROWS[1], "system": "Be brief."}])
    with pytest.raises(DataError, match=r"x.jsonl, line 2.*System role not supported"):
        run(tmp_path, path, tokenizer=tiny_tokenizer("gemma"))


def test_a_bad_row_stops_with_its_place_and_leaves_nothing(tmp_path):
    path = write(tmp_path, "x.jsonl", [*ROWS, {"question": "q"}])
    with pytest.raises(DataError, match=r"x.jsonl, line 41: "):
        run(tmp_path, path)
    assert stores(tmp_path) == []


def test_a_row_that_cannot_be_read_or_is_of_another_format_stops_preparation(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{\n")
    with pytest.raises(DataError, match=r"x.jsonl, line 2: not JSON"):
        run(tmp_path, str(path))
    with pytest.raises(DataError, match=r"y.jsonl, line 2: .*By its columns it is of the format text"):
        run(tmp_path, write(tmp_path, "y.jsonl", [ROWS[0], {"text": "t"}]))


def test_bad_rows_are_skipped_counted_by_reason_and_listed_when_asked(tmp_path):
    path = write(tmp_path, "x.jsonl", BAD_ROWS)
    with pytest.raises(DataError, match=r"x.jsonl, line 2: "):
        run(tmp_path, path)
    for cached in (False, True):
        prepared = run(tmp_path, path, on_bad_row="skip", max_skipped=0.5)
        assert prepared.report.cached == cached
        assert [prepared.train.where(i) for i in range(3)] == [f"x.jsonl, line {n}" for n in (1, 3, 6)]
        (source,) = prepared.report.sources
        assert (source.rows, source.examples, sorted(source.skipped.values())) == (6, 3, [1, 2])
        prepared.write_skipped_rows(tmp_path)
        listed = [json.loads(line) for line in (tmp_path / "skipped_rows.jsonl").read_text().splitlines()]
        assert [row["where"] for row in listed] == [f"x.jsonl, line {n}" for n in (2, 4, 5)]
        assert listed[0]["reason"].startswith("x.jsonl, line 2: ")
        (warning,) = [warning for warning in prepared.report.warnings if "skipped" in warning]
        assert "3 bad rows were skipped, 50.0% of all (2 " in warning
        assert "skipped_rows.jsonl" in warning


def test_rows_that_cannot_be_read_and_rows_that_a_template_refuses_are_bad_too(tmp_path, monkeypatch):
    source = source_keys.open_source(write(tmp_path, "x.jsonl", ROWS[:3]))
    refused = {"question": "q", "answer": "a", "system": "Mistral's template has no place for this."}
    records = [
        *source.records(),
        ("x.jsonl, line 4", DataError("x.jsonl, line 4: not JSON at column 5")),
        ("x.jsonl, line 5", refused),
        ("x.jsonl, line 6", ROWS[3]),
    ]
    broken = dataclasses.replace(source, records=lambda: iter(records))
    monkeypatch.setattr(source_keys, "open_source", lambda *_, **__: broken)
    with pytest.raises(DataError, match="line 4: not JSON at column 5"):
        run(tmp_path, "x.jsonl", tokenizer=tiny_tokenizer("mistral"))
    prepared = run(tmp_path, "x.jsonl", tokenizer=tiny_tokenizer("mistral"), on_bad_row="skip", max_skipped=0.4)
    assert [prepared.train.where(i)[-1] for i in range(4)] == ["1", "2", "3", "6"]
    first, second = prepared.report.sources[0].skipped
    assert first == "not JSON at column …"
    assert "template" in second


def test_a_row_nested_beyond_all_measure_is_a_bad_row_and_no_crash(tmp_path):
    notes: list[Any] = []
    deep = {**ROWS[0], "notes": functools.reduce(lambda inner, _: [inner], range(600), notes)}
    train = write(tmp_path, "rows.jsonl", [*ROWS, deep])
    with pytest.raises(DataError, match=r"rows\.jsonl, line 41: .* deep"):
        run(tmp_path, train)
    report = run(tmp_path, train, on_bad_row="skip").report
    assert (report.sources[0].examples, sum(report.sources[0].skipped.values())) == (40, 1)


def test_a_source_whose_rows_are_all_bad_is_an_error_all_the_same(tmp_path):
    good, bad = write(tmp_path, "good.jsonl", ROWS), write(tmp_path, "bad.jsonl", [{"question": "q"}] * 3)
    with pytest.raises(DataError, match=r"bad.jsonl: all 3 rows are bad.*: 3 .*answer"):
        run(tmp_path, [Source(path=good), Source(path=bad, format="question_answer")], on_bad_row="skip")
    assert stores(tmp_path) == []


def test_reasons_are_counted_without_what_differs_from_row_to_row(tmp_path):
    rows = [{"messages": [{"role": f"role {n}", "content": "c"}]} for n in range(200)]
    path = write(tmp_path, "x.jsonl", [*rows, {"messages": [{"role": "assistant", "content": "c"}]}])
    (source,) = run(tmp_path, path, on_bad_row="skip", max_skipped=1.0).report.sources
    assert list(source.skipped.values()) == [200]
    counts: Counter[str] = Counter()
    count_reasons(counts, [("x", f"x: reason {'abc'[n % 3] * (1 + n // 3)}") for n in range(1000)])
    assert counts.total() == 1000
    assert len(counts) == MAX_REASONS + 1
