"""What is prepared: the examples that rendering gives, from the sources as they are set, each row in the report."""

import json

import numpy as np
import pytest
from preparing import ROWS, TOKENIZER, as_lists, row, run, write

from qlora_trainer.common.errors import DataError
from qlora_trainer.config.data_schema import Source
from qlora_trainer.data.batching.loader import StepLoader
from qlora_trainer.data.formats.parse import CALL_IS_TEXT, TEXT_IS_TURNS
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.data.types import Conversation, Document, Message, PromptCompletion


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
        DataError,
        match=r"none of the 2 rows of x.jsonl can be used: the answer is empty \(1: line 1\); longer .* \(1: line 2\)",
    ):
        run(tmp_path, path, max_length=64)
    good = write(tmp_path, "good.jsonl", ROWS)
    with pytest.raises(DataError, match=r"data.eval: none of the 2 rows"):
        run(tmp_path, good, max_length=64, eval=path)


def test_sources_keep_their_formats_and_unused_columns_are_reported(tmp_path):
    first = write(tmp_path, "a.jsonl", [{"query": "q", "reply": "a", "votes": 5}])
    second = write(tmp_path, "b.jsonl", [{"text": "t", "title": "p", "votes": 3}])
    sources = [
        Source(path=first, columns={"question": "query", "answer": "reply"}),
        Source(path=second, format="text"),
    ]
    prepared = run(tmp_path, sources)
    assert isinstance(prepared.train.row(0), Conversation)
    assert prepared.train.row(1) == Document("t")
    assert "a.jsonl: not used: votes" in prepared.report.warnings
    assert prepared.report.sources[1].unused_columns == {"title": 1, "votes": 1}


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
