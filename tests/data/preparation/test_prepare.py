import dataclasses
import datetime
import errno
import functools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tokenizers import tiny_tokenizer

from qlora_trainer.common.errors import DataError, DiskError
from qlora_trainer.config.data_schema import DataConfig, Source
from qlora_trainer.data.batching.loader import StepLoader
from qlora_trainer.data.formats.parse import CALL_IS_TEXT, TEXT_IS_TURNS
from qlora_trainer.data.preparation import prepare as preparation
from qlora_trainer.data.preparation.prepare import prepare
from qlora_trainer.data.preparation.reports import MAX_REASONS, count_reasons
from qlora_trainer.data.reading import files
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.data.types import Conversation, Document, Message, PromptCompletion

TOKENIZER = tiny_tokenizer("smollm2")


def row(question: str, answer: str) -> dict:
    return {"question": question, "answer": answer}


def write(tmp_path: Path, name: str, rows: list[dict]) -> str:
    path = tmp_path / name
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def run(
    tmp_path: Path, train, *, tokenizer=TOKENIZER, seed=0, max_positions=None, vocab_size=None, progress=None, **data
):
    settings = {"eval": 0.0, "max_length": 128} | data
    return prepare(
        DataConfig(train=train, **settings),
        tokenizer,
        max_positions=max_positions,
        seed=seed,
        cache_dir=tmp_path / "cache",
        vocab_size=vocab_size,
        **({"progress": progress} if progress else {}),
    )


def stores(tmp_path: Path) -> list[Path]:
    """Everything in the cache, remembered digests of files left aside."""
    return [entry for entry in (tmp_path / "cache").iterdir() if entry.name != "digests"]


ROWS = [row(f"question {n}", f"answer {n}") for n in range(40)]


def as_lists(examples) -> list[tuple[list[int], list[int]]]:
    return [(examples[i].input_ids, examples[i].labels) for i in range(len(examples))]


def test_prepared_examples_are_those_that_rendering_gives(tmp_path):
    prepared = run(tmp_path, write(tmp_path, "x.jsonl", ROWS))
    conversations = [Conversation((Message("user", r["question"]), Message("assistant", r["answer"]))) for r in ROWS]
    expected = [Renderer(TOKENIZER).render(conversation) for conversation in conversations]
    assert as_lists(prepared.train) == [(e.input_ids, e.labels) for e in expected]
    assert [prepared.train.row(i) for i in range(40)] == conversations
    assert prepared.train.where(7) == "x.jsonl, line 8"
    assert prepared.train.lengths.tolist() == [len(e.input_ids) for e in expected]
    assert prepared.train.trained_counts.tolist() == [e.trained_tokens for e in expected]


def test_what_is_read_in_a_way_worth_telling_is_reported_by_source(tmp_path):
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f(1)"}]
    calls = write(tmp_path, "calls.jsonl", [{"conversations": turns}, row("q", "a") | {"conversations": turns[:1] * 2}])
    asked, answered = (json.dumps([{"role": role, "content": "a"}]) for role in ("user", "assistant"))
    table = tmp_path / "turns.jsonl"
    table.write_text(json.dumps({"prompt": asked, "completion": answered}) + "\n")
    sources = [Source(path=calls), Source(path=str(table))]
    prepared = run(tmp_path, sources, on_bad_row="skip", max_skipped=0.5)
    assert [source.warnings for source in prepared.report.sources] == [{CALL_IS_TEXT: 1}, {TEXT_IS_TURNS: 1}]
    assert f"calls.jsonl: 1 of 2 rows: {CALL_IS_TEXT}" in prepared.report.warnings
    assert run(tmp_path, sources, on_bad_row="skip", max_skipped=0.5).report.warnings == prepared.report.warnings


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


def test_a_row_that_the_template_refuses_stops_preparation_with_its_place(tmp_path):
    path = write(tmp_path, "x.jsonl", [ROWS[0], {**ROWS[1], "system": "Be brief."}])
    with pytest.raises(DataError, match=r"x.jsonl, line 2.*System role not supported"):
        run(tmp_path, path, tokenizer=tiny_tokenizer("gemma"))


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


def test_a_bad_row_stops_with_its_place_and_leaves_nothing(tmp_path):
    path = write(tmp_path, "x.jsonl", [*ROWS, {"question": "q"}])
    with pytest.raises(DataError, match=r"x.jsonl, line 41: "):
        run(tmp_path, path)
    assert stores(tmp_path) == []


def test_the_eval_share_is_chosen_by_seed_and_apart_from_training(tmp_path):
    path = write(tmp_path, "x.jsonl", ROWS)
    prepared = run(tmp_path, path, eval=0.1)
    train, eval_set = ({s.where(i) for i in range(len(s))} for s in (prepared.train, prepared.eval))
    assert (len(train), len(eval_set)) == (36, 4)
    assert not train & eval_set
    again = run(tmp_path, path, eval=0.1, seed=1).eval
    assert {again.where(i) for i in range(4)} != eval_set
    assert len(run(tmp_path, path, eval=0.001).eval) == 1
    assert len(run(tmp_path, path, eval=0.999).train) == 1
    single = run(tmp_path, write(tmp_path, "one.jsonl", ROWS[:1]), eval=0.5)
    assert (len(single.train), len(single.eval)) == (1, 0)


def test_parts_of_a_document_stay_on_one_side_unless_it_is_the_only_one(tmp_path):
    documents = [{"text": f"{n} The quick brown fox. " * 30} for n in range(10)]
    prepared = run(tmp_path, write(tmp_path, "x.jsonl", documents), eval=0.2)
    assert prepared.report.sources[0].split == 10
    sides = [{s.where(i) for i in range(len(s))} for s in (prepared.train, prepared.eval)]
    assert [len(side) for side in sides] == [8, 2]
    assert not sides[0] & sides[1]
    alone = run(tmp_path, write(tmp_path, "one.jsonl", [{"text": "The quick brown fox. " * 300}]), eval=0.2)
    assert len(alone.eval) >= 1
    assert len(alone.train) > len(alone.eval)
    assert isinstance(alone.train.row(0), Document)


def test_an_eval_file_is_only_eval_and_its_duplicates_are_counted(tmp_path):
    train = write(tmp_path, "train.jsonl", [*ROWS[:10], ROWS[0], ROWS[1]])
    eval_set = write(tmp_path, "eval.jsonl", [ROWS[1], ROWS[2], ROWS[30]])
    prepared = run(tmp_path, train, eval=eval_set)
    assert (len(prepared.train), len(prepared.eval)) == (12, 3)
    assert prepared.eval.where(2) == "eval.jsonl, line 3"
    assert (prepared.report.train_duplicates, prepared.report.eval_duplicates) == (2, 2)


def test_every_row_read_is_used_or_counted_with_a_reason(tmp_path):
    pairs = [*ROWS[:5], row("q", ""), row("q", " \n"), row("q", "long " * 200), row("long " * 200, "a")]
    rows = [{"prompt": pair["question"], "completion": pair["answer"]} for pair in pairs]
    report = run(tmp_path, write(tmp_path, "x.jsonl", rows), max_length=64).report
    (source,) = report.sources
    assert (source.rows, source.examples, source.truncated) == (9, 6, 1)
    assert sum(source.dropped.values()) == 3
    assert sorted(source.dropped.values()) == [1, 2]
    dropping = run(tmp_path, write(tmp_path, "x.jsonl", rows), max_length=64, too_long="drop").report.sources[0]
    assert (dropping.examples, dropping.truncated, sum(dropping.dropped.values())) == (5, 0, 4)


def test_the_report_counts_the_tokens_that_training_gets(tmp_path):
    prepared = run(tmp_path, write(tmp_path, "x.jsonl", ROWS), eval=0.1)
    loader = StepLoader(prepared.train, 8, 256, packing=True, seed=0)
    packs = [pack for _ in range(loader.steps_per_epoch) for pack in loader.next()]
    summary = prepared.report.train
    assert sum(pack.tokens for pack in packs) == summary.tokens
    assert sum(pack.label_tokens for pack in packs) == summary.trained_tokens
    lengths = [len(prepared.train[i].input_ids) for i in range(36)]
    assert (summary.shortest, summary.longest) == (min(lengths), max(lengths))
    assert summary.median == int(np.median(lengths))
    json.dumps(prepared.report.to_json())


def test_nothing_left_to_train_on_says_why_with_counts(tmp_path):
    path = write(tmp_path, "x.jsonl", [row("q", ""), row("long " * 200, "a")])
    with pytest.raises(
        DataError, match=r"none of the 2 rows of x.jsonl can be used \(1 the answer is empty.*1 longer than"
    ):
        run(tmp_path, path, max_length=64)
    good = write(tmp_path, "good.jsonl", ROWS)
    with pytest.raises(DataError, match=r"data.eval: none of the 2 rows"):
        run(tmp_path, good, max_length=64, eval=path)


def test_sources_keep_their_formats_and_unused_columns_are_reported(tmp_path):
    first = write(tmp_path, "a.jsonl", [{"query": "q", "reply": "a", "votes": 5}])
    second = write(tmp_path, "b.jsonl", [{"text": "t", "prompt": "p", "completion": "c"}])
    sources = [
        Source(path=first, columns={"question": "query", "answer": "reply"}),
        Source(path=second, format="text"),
    ]
    prepared = run(tmp_path, sources)
    assert isinstance(prepared.train.row(0), Conversation)
    assert prepared.train.row(1) == Document("t")
    assert "a.jsonl: not used: votes" in prepared.report.warnings
    assert prepared.report.sources[1].unused_columns == {"prompt": 1, "completion": 1}


def test_a_row_that_cannot_be_read_or_is_of_another_format_stops_preparation(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{\n")
    with pytest.raises(DataError, match=r"x.jsonl, line 2: not JSON"):
        run(tmp_path, str(path))
    with pytest.raises(DataError, match=r"y.jsonl, line 2: .*By its columns it is of the format text"):
        run(tmp_path, write(tmp_path, "y.jsonl", [ROWS[0], {"text": "t"}]))


def test_templates_and_columns_of_the_config_hold_for_sources_that_have_none(tmp_path):
    path = write(tmp_path, "x.jsonl", [{"a": {"b": "long"}, "c": "x"}] * 2)
    shape = {"columns": {"completion": "c"}, "template": {"prompt": "<{a.b}>"}}
    prepared = run(tmp_path, path, **shape)
    assert prepared.train.row(0) == PromptCompletion("<long>", "x")
    source = Source(path=path, columns={"prompt": "c", "completion": "a.b"})
    assert run(tmp_path, [source], **shape).train.row(0) == PromptCompletion("x", "long")


def test_the_models_positions_cap_the_length_and_it_is_said(tmp_path):
    prepared = run(
        tmp_path,
        write(tmp_path, "x.jsonl", [{"prompt": "q", "completion": "long " * 300}]),
        max_length=512,
        max_positions=100,
    )
    assert prepared.report.train.longest == prepared.report.max_length == 100
    assert "data.max_length is 512, but the model has 100 positions: rows end there" in prepared.report.warnings


def test_a_token_beyond_the_models_vocabulary_is_refused(tmp_path):
    path = write(tmp_path, "x.jsonl", ROWS)
    with pytest.raises(DataError, match=r"x.jsonl, line 1: .*only 100 embeddings"):
        run(tmp_path, path, vocab_size=100)
    run(tmp_path, path, vocab_size=len(TOKENIZER))


def test_progress_is_reported(tmp_path):
    calls = []
    run(tmp_path, write(tmp_path, "x.jsonl", ROWS), progress=lambda *call: calls.append(call))
    assert calls[-1] == ("reading x.jsonl", 40, 40)
    run(tmp_path, write(tmp_path, "x.json", ROWS), progress=lambda *call: calls.append(call))
    assert calls[-1] == ("reading x.json", 40, None)


BAD_ROWS = [ROWS[0], {"question": "q1"}, ROWS[1], {"question": 5, "answer": "a"}, {"question": "q2"}, ROWS[2]]


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
    source = preparation.open_source(write(tmp_path, "x.jsonl", ROWS[:3]))
    refused = {"question": "q", "answer": "a", "system": "Mistral's template has no place for this."}
    records = [
        *source.records(),
        ("x.jsonl, line 4", DataError("x.jsonl, line 4: not JSON at column 5")),
        ("x.jsonl, line 5", refused),
        ("x.jsonl, line 6", ROWS[3]),
    ]
    broken = dataclasses.replace(source, records=lambda: iter(records))
    monkeypatch.setattr(preparation, "open_source", lambda *_, **__: broken)
    with pytest.raises(DataError, match="line 4: not JSON at column 5"):
        run(tmp_path, "x.jsonl", tokenizer=tiny_tokenizer("mistral"))
    prepared = run(tmp_path, "x.jsonl", tokenizer=tiny_tokenizer("mistral"), on_bad_row="skip", max_skipped=0.4)
    assert [prepared.train.where(i)[-1] for i in range(4)] == ["1", "2", "3", "6"]
    first, second = prepared.report.sources[0].skipped
    assert first == "not JSON at column N"
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


def test_sources_are_mixed_by_weight_and_the_report_says_how_many_rows_an_epoch_takes(tmp_path):
    many = write(tmp_path, "many.jsonl", [row(f"many {n}", "a") for n in range(200)])
    few = write(tmp_path, "few.jsonl", [row(f"few {n}", "a") for n in range(20)])
    sources = [Source(path=many, weight=0.75), Source(path=few, weight=0.25)]
    prepared = run(tmp_path, sources, eval=0.1)
    report = prepared.report
    # Of all rows an epoch would take 60 and 20: a tenth of that is kept for evaluation. The 18 rows left of the scarce
    # source set the scale.
    assert [(s.train, s.eval, s.epoch) for s in report.sources] == [(194, 6, 54), (18, 2, 18)]
    assert (len(prepared.train), len(prepared.eval), report.epoch_examples) == (212, 8, 72)
    loader = StepLoader(prepared.train, 8, 256, packing=True, seed=0, mixture=prepared.mixture)
    assert loader.steps_per_epoch == 9
    for epoch in range(3):
        taken = [prepared.train.where(int(i)).split(".")[0] for i in loader.order(epoch)]
        assert Counter(taken) == {"many": 54, "few": 18}
    assert prepared.key != run(tmp_path, [sources[0].model_copy(update={"weight": 1.0}), sources[1]], eval=0.1).key
    assert prepared.key == run(tmp_path, sources, eval=0.1).key


def test_a_source_with_a_count_is_repeated_to_that_count_and_others_are_used_whole(tmp_path):
    first, second = write(tmp_path, "a.jsonl", ROWS[:30]), write(tmp_path, "b.jsonl", ROWS[30:])
    prepared = run(tmp_path, [Source(path=first), Source(path=second, count=25)])
    assert [(s.train, s.epoch) for s in prepared.report.sources] == [(30, 30), (10, 25)]
    assert prepared.mixture
    times = Counter(prepared.mixture.epoch_rows(0, 0).tolist())
    assert [times[row] for row in range(30)] == [1] * 30
    assert {times[row] for row in range(30, 40)} == {2, 3}


def test_a_mixed_source_without_a_usable_row_is_an_error(tmp_path):
    good, empty = write(tmp_path, "good.jsonl", ROWS), write(tmp_path, "empty.jsonl", [row("q", "")])
    run(tmp_path, [Source(path=good), Source(path=empty)])
    with pytest.raises(DataError, match=r"data.train: the only row of empty.jsonl cannot be used"):
        run(tmp_path, [Source(path=good, weight=1), Source(path=empty, weight=1)])


def test_the_eval_share_is_taken_from_each_source(tmp_path):
    first = write(tmp_path, "a.jsonl", [row(f"a {n}", "a") for n in range(90)])
    second = write(tmp_path, "b.jsonl", [row(f"b {n}", "a") for n in range(10)])
    report = run(tmp_path, [Source(path=first), Source(path=second)], eval=0.1).report
    assert [source.eval for source in report.sources] == [9, 1]


def test_an_eval_source_has_a_format_and_columns_of_its_own(tmp_path):
    eval_set = write(tmp_path, "h.jsonl", [{"frage": "question 3", "antwort": "answer 3"}])
    columns = {"question": "frage", "answer": "antwort"}
    prepared = run(tmp_path, write(tmp_path, "x.jsonl", ROWS), eval={"path": eval_set, "columns": columns})
    assert prepared.eval[0] == prepared.train[3]
    assert prepared.report.eval_duplicates == 1
    assert [(s.train, s.eval, s.epoch) for s in prepared.report.sources] == [(40, 0, 40), (0, 1, 0)]


def test_an_equal_prompt_with_another_answer_is_counted_apart_from_repeats(tmp_path):
    train = [*ROWS[:5], ROWS[0], row("question 1", "another answer"), row("question 1", "a third")]
    eval_set = [ROWS[2], row("question 3", "another answer"), row("new", "answer 4")]
    prepared = run(tmp_path, write(tmp_path, "x.jsonl", train), eval=write(tmp_path, "h.jsonl", eval_set))
    report = prepared.report
    assert (report.train_duplicates, report.train_other_answers) == (1, 2)
    assert (report.eval_duplicates, report.eval_other_answers) == (1, 1)
    said = "\n".join(report.warnings)
    assert "1 of 3 eval rows is in training too" in said
    assert "1 training row repeats an earlier one" in said
    assert not [n for n in run(tmp_path, write(tmp_path, "y.jsonl", ROWS)).report.warnings if "rows" in n]


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


@pytest.mark.parametrize(("name", "rows"), [("alpaca_en_demo/alpaca_en_demo.json", 999), ("e2e/train.jsonl", 547)])
def test_real_rows_are_all_used(tmp_path, shared_data, name, rows):
    prepared = run(tmp_path, str(shared_data(name)), eval=0.05, max_length=4096)
    (source,) = prepared.report.sources
    assert (source.rows, source.examples, source.dropped, source.truncated) == (rows, rows, {}, 0)
    assert len(prepared.train) + len(prepared.eval) == rows


def test_a_real_text_is_prepared_to_its_last_token(tmp_path, shared_data):
    text = shared_data("tinyshakespeare/input.txt").read_text(encoding="utf-8")[:100_000]
    (tmp_path / "play.txt").write_text(text, encoding="utf-8")
    report = run(tmp_path, str(tmp_path / "play.txt"), eval=0.05, max_length=512).report
    assert report.train.longest <= 512
    assert report.train.tokens + report.eval.tokens == len(TOKENIZER(text, verbose=False).input_ids) + 1
