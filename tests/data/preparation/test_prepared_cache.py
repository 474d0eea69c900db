"""A set is prepared once: the cache is taken where nothing that makes tokens changed, and holds whole sets only."""

import datetime
import errno
import os
from typing import Any

import pytest
from preparing import BAD_ROWS, ROWS, TOKENIZER, as_lists, row, run, stores, write
from tiny_tokenizers import tiny_tokenizer

from qlora_trainer.common.errors import DataError, DiskError
from qlora_trainer.config.data_schema import Source
from qlora_trainer.data.preparation import prepare as preparation
from qlora_trainer.data.reading import files


def test_the_second_call_takes_the_cache_and_gives_the_same(tmp_path, monkeypatch):
    path = write(tmp_path, "x.jsonl", ROWS)
    first = run(tmp_path, path, eval=0.2)
    monkeypatch.setattr(preparation, "_write", None)
    second = run(tmp_path, path, eval=0.2)
    assert not first.report.cached
    assert second.report.cached
    assert second.key == first.key
    assert as_lists(second.train) == as_lists(first.train)
    assert second.report.to_json() | {"cached": False} == first.report.to_json()


def test_two_processes_that_prepare_one_set_at_the_same_time_both_get_it(tmp_path):
    path = write(tmp_path, "x.jsonl", ROWS)
    others: list[preparation.Prepared] = []

    def meanwhile(*_):
        if not others:
            others.append(run(tmp_path, path))

    first = run(tmp_path, path, progress=meanwhile)
    assert first.key == others[0].key
    assert not first.report.cached
    assert not others[0].report.cached
    assert len(stores(tmp_path)) == 1


def test_anything_that_could_change_tokens_is_prepared_anew(tmp_path):
    path = write(tmp_path, "x.jsonl", ROWS)
    run(tmp_path, path)
    changes: list[dict[str, Any]] = [
        {"train_on": "last"},
        {"train_on": ["assistant", "user"]},
        {"max_length": 64},
        {"max_positions": 100},
        {"too_long": "drop"},
        {"on_bad_row": "skip"},
        {"tokenizer": tiny_tokenizer("generation")},
    ]
    assert not any(run(tmp_path, path, **change).report.cached for change in changes)
    assert not run(tmp_path, [Source(path=path, format="question_answer")]).report.cached
    assert not run(tmp_path, write(tmp_path, "x.jsonl", ROWS[1:])).report.cached


@pytest.mark.parametrize("package", ["tokenizers", "transformers", "jinja2"])
def test_what_another_version_tokenized_or_rendered_is_prepared_anew(tmp_path, monkeypatch, package):
    path = write(tmp_path, "x.jsonl", ROWS)
    run(tmp_path, path)
    version = preparation.metadata.version
    monkeypatch.setattr(preparation.metadata, "version", lambda name: "another" if name == package else version(name))
    assert not run(tmp_path, path).report.cached


def test_a_template_that_writes_the_date_is_prepared_for_one_date_and_it_is_reported(tmp_path):
    path = write(tmp_path, "x.jsonl", ROWS)
    dated, days = tiny_tokenizer("llama3_2"), [datetime.date(2026, 1, 30), datetime.date(2026, 1, 31)]
    runs = [run(tmp_path, path, tokenizer=dated, template_date=day) for day in (days[0], days[0], days[1])]
    assert [prepared.report.cached for prepared in runs] == [False, True, False]
    assert runs[0].key == runs[1].key != runs[2].key
    reported = "the chat template writes a date into every conversation: it is fixed to 2026-01-30 (data.template_date)"
    assert reported in runs[0].report.warnings
    plain = [run(tmp_path, path, template_date=day) for day in (None, *days)]
    assert [prepared.report.cached for prepared in plain] == [False, True, True]
    assert not plain[0].report.warnings
    assert "data.template_date has no effect: the tokenizer's chat template writes no date" in plain[1].report.warnings


def test_the_key_follows_the_examples_and_nothing_else(tmp_path):
    path = write(tmp_path, "x.jsonl", ROWS)
    key = run(tmp_path, path).key
    assert run(tmp_path, path, max_length=64).key == key, "no row is that long"
    assert run(tmp_path, write(tmp_path, "other_name.jsonl", ROWS)).key == key
    assert run(tmp_path, path, eval=0.1).key != key
    assert run(tmp_path, path, eval=0.1).key != run(tmp_path, path, eval=0.1, seed=1).key
    eval_set = [write(tmp_path, f"{n}.jsonl", ROWS[n : n + 1]) for n in range(2)]
    assert run(tmp_path, path, eval=eval_set[0]).key != run(tmp_path, path, eval=eval_set[1]).key
    assert run(tmp_path, path, train_on="all").key != key
    assert run(tmp_path, write(tmp_path, "x.jsonl", ROWS[::-1])).key != key


def test_what_only_chooses_among_rows_costs_no_second_preparation(tmp_path):
    path = write(tmp_path, "x.jsonl", ROWS)
    run(tmp_path, [Source(path=path)])
    assert run(tmp_path, [Source(path=path, count=7)], eval=0.2, seed=3).report.cached
    assert run(tmp_path, [Source(path=path, weight=2.0)]).report.cached
    assert run(tmp_path, path).report.cached


def test_padding_left_on_by_another_caller_changes_nothing(tmp_path):
    path = write(tmp_path, "x.jsonl", ROWS)
    first = run(tmp_path, path)
    TOKENIZER(["a", "b c d e"], padding=True, truncation=True, max_length=2)
    assert run(tmp_path, path).report.cached
    (tmp_path / "fresh").mkdir()
    TOKENIZER(["a", "b c d e"], padding=True, truncation=True, max_length=2)
    assert as_lists(run(tmp_path / "fresh", path).train) == as_lists(first.train)


@pytest.mark.parametrize("name", ["examples.arrow", "summary.json"])
def test_a_damaged_cache_is_made_anew(tmp_path, name):
    path = write(tmp_path, "x.jsonl", ROWS)
    expected = as_lists(run(tmp_path, path).train)
    (file,) = (tmp_path / "cache").glob(f"*/{name}")
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-40])
    again = run(tmp_path, path)
    assert not again.report.cached
    assert as_lists(again.train) == expected


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preparation.StoreWriter, "append", full)
    with pytest.raises(DiskError, match=r"No space left on device.*set XDG_CACHE_HOME to another folder"):
        run(tmp_path, write(tmp_path, "x.jsonl", ROWS))
    assert stores(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ENOSPC])
def test_a_file_that_fails_while_it_is_read_is_not_reported_as_one_that_cannot_be_written(tmp_path, monkeypatch, code):
    def failing(file):
        yield "line 1", row("q", "a")
        raise OSError(code, os.strerror(code), str(file))

    monkeypatch.setattr(files, "read_jsonl", failing)
    with pytest.raises(DataError, match=rf"x.jsonl cannot be read any further: {os.strerror(code)}. Look at"):
        run(tmp_path, write(tmp_path, "x.jsonl", ROWS))
    assert stores(tmp_path) == []


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = write(tmp_path, "x.jsonl", ROWS)

    def change(*_):
        write(tmp_path, "x.jsonl", ROWS[::-1])

    with pytest.raises(DataError, match=r"x.jsonl changed while being read"):
        run(tmp_path, path, progress=change)
    assert stores(tmp_path) == []


def test_the_set_is_the_same_byte_by_byte_whatever_the_number_of_threads(tmp_path, monkeypatch):
    path = write(tmp_path, "x.jsonl", [*BAD_ROWS, *ROWS * 20])
    found = []
    for parallel in ("true", "false"):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
        (tmp_path / parallel).mkdir()
        assert not run(tmp_path / parallel, path, on_bad_row="skip").report.cached
        (directory,) = stores(tmp_path / parallel)
        found.append({file.name: file.read_bytes() for file in directory.iterdir()})
    assert found[0] == found[1]
    assert set(found[0]) == {"examples.arrow", "skipped_rows.jsonl", "summary.json"}
