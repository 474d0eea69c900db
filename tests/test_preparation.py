import errno
import json
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizers import tiny_tokenizer

from qlora_trainer.data import preparation
from qlora_trainer.data.loader import StepLoader
from qlora_trainer.data.messages import Conversation, Document, Message
from qlora_trainer.data.preparation import prepare
from qlora_trainer.data.rendering import Renderer
from qlora_trainer.errors import DataError, DiskError
from qlora_trainer.settings import DataConfig, Source

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
    settings = {"heldout": 0.0, "max_length": 128} | data
    return prepare(
        DataConfig(train=train, **settings),
        tokenizer,
        max_positions=max_positions,
        seed=seed,
        cache_dir=tmp_path / "cache",
        vocab_size=vocab_size,
        **({"progress": progress} if progress else {}),
    )


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
    assert prepared.train.learned_counts.tolist() == [e.learned_tokens for e in expected]


def test_the_second_call_takes_the_cache_and_gives_the_same(tmp_path, monkeypatch):
    path = write(tmp_path, "x.jsonl", ROWS)
    first = run(tmp_path, path, heldout=0.2)
    monkeypatch.setattr(preparation, "_write", None)
    second = run(tmp_path, path, heldout=0.2)
    assert not first.report.cached
    assert second.report.cached
    assert second.key == first.key
    assert as_lists(second.train) == as_lists(first.train)
    assert second.report.to_json() | {"cached": False} == first.report.to_json()


def test_anything_that_could_change_tokens_is_prepared_anew(tmp_path):
    path = write(tmp_path, "x.jsonl", ROWS)
    run(tmp_path, path)
    changes = [
        {"learn": "last"},
        {"max_length": 64},
        {"max_positions": 100},
        {"too_long": "drop"},
        {"tokenizer": tiny_tokenizer("generation")},
    ]
    assert not any(run(tmp_path, path, **change).report.cached for change in changes)
    assert not run(tmp_path, [Source(path=path, format="question_answer")]).report.cached
    assert not run(tmp_path, write(tmp_path, "x.jsonl", ROWS[1:])).report.cached


def test_the_key_follows_the_examples_and_nothing_else(tmp_path):
    path = write(tmp_path, "x.jsonl", ROWS)
    key = run(tmp_path, path).key
    assert run(tmp_path, path, max_length=64).key == key, "no row is that long"
    assert run(tmp_path, write(tmp_path, "other_name.jsonl", ROWS)).key == key
    assert run(tmp_path, path, heldout=0.1).key != key
    assert run(tmp_path, path, heldout=0.1).key != run(tmp_path, path, heldout=0.1, seed=1).key
    heldout = [write(tmp_path, f"{n}.jsonl", ROWS[n : n + 1]) for n in range(2)]
    assert run(tmp_path, path, heldout=heldout[0]).key != run(tmp_path, path, heldout=heldout[1]).key
    assert run(tmp_path, path, learn="all").key != key
    assert run(tmp_path, write(tmp_path, "x.jsonl", ROWS[::-1])).key != key


def test_padding_left_on_by_another_caller_changes_nothing(tmp_path):
    path = write(tmp_path, "x.jsonl", ROWS)
    first = run(tmp_path, path)
    TOKENIZER(["a", "b c d e"], padding=True, truncation=True, max_length=2)
    assert run(tmp_path, path).report.cached
    (tmp_path / "fresh").mkdir()
    TOKENIZER(["a", "b c d e"], padding=True, truncation=True, max_length=2)
    assert as_lists(run(tmp_path / "fresh", path).train) == as_lists(first.train)


@pytest.mark.parametrize("name", ["tokens.npy", "learned.npy", "units.npy", "prompts.npy", "rows.jsonl", "summary.json"])
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
    with pytest.raises(DiskError, match=r"No space left on device.*another cache directory"):
        run(tmp_path, write(tmp_path, "x.jsonl", ROWS))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_bad_row_stops_with_its_place_and_leaves_nothing(tmp_path):
    path = write(tmp_path, "x.jsonl", [*ROWS, {"question": "q"}])
    with pytest.raises(DataError, match=r"x.jsonl, line 41: "):
        run(tmp_path, path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_held_out_share_is_chosen_by_seed_and_apart_from_training(tmp_path):
    path = write(tmp_path, "x.jsonl", ROWS)
    prepared = run(tmp_path, path, heldout=0.1)
    train, heldout = ({s.where(i) for i in range(len(s))} for s in (prepared.train, prepared.heldout))
    assert (len(train), len(heldout)) == (36, 4)
    assert not train & heldout
    again = run(tmp_path, path, heldout=0.1, seed=1).heldout
    assert {again.where(i) for i in range(4)} != heldout
    assert len(run(tmp_path, path, heldout=0.001).heldout) == 1
    assert len(run(tmp_path, path, heldout=0.999).train) == 1
    single = run(tmp_path, write(tmp_path, "one.jsonl", ROWS[:1]), heldout=0.5)
    assert (len(single.train), len(single.heldout)) == (1, 0)


def test_parts_of_a_document_stay_on_one_side_unless_it_is_the_only_one(tmp_path):
    documents = [{"text": f"{n} The quick brown fox. " * 30} for n in range(10)]
    prepared = run(tmp_path, write(tmp_path, "x.jsonl", documents), heldout=0.2)
    assert prepared.report.sources[0].split == 10
    sides = [{s.where(i) for i in range(len(s))} for s in (prepared.train, prepared.heldout)]
    assert [len(side) for side in sides] == [8, 2]
    assert not sides[0] & sides[1]
    alone = run(tmp_path, write(tmp_path, "one.jsonl", [{"text": "The quick brown fox. " * 300}]), heldout=0.2)
    assert len(alone.heldout) >= 1
    assert len(alone.train) > len(alone.heldout)
    assert isinstance(alone.train.row(0), Document)


def test_a_held_out_file_is_only_held_out_and_its_duplicates_are_counted(tmp_path):
    train = write(tmp_path, "train.jsonl", [*ROWS[:10], ROWS[0], ROWS[1]])
    heldout = write(tmp_path, "heldout.jsonl", [ROWS[1], ROWS[2], ROWS[30]])
    prepared = run(tmp_path, train, heldout=heldout)
    assert (len(prepared.train), len(prepared.heldout)) == (12, 3)
    assert prepared.heldout.where(2) == "heldout.jsonl, line 3"
    assert (prepared.report.train_duplicates, prepared.report.heldout_duplicates) == (2, 2)


def test_every_row_read_is_used_or_counted_with_a_reason(tmp_path):
    rows = [*ROWS[:5], row("q", ""), row("q", " \n"), row("q", "long " * 200), row("long " * 200, "a")]
    report = run(tmp_path, write(tmp_path, "x.jsonl", rows), max_length=64).report
    (source,) = report.sources
    assert (source.rows, source.examples, source.truncated) == (9, 6, 1)
    assert sum(source.dropped.values()) == 3
    assert sorted(source.dropped.values()) == [1, 2]
    dropping = run(tmp_path, write(tmp_path, "x.jsonl", rows), max_length=64, too_long="drop").report.sources[0]
    assert (dropping.examples, dropping.truncated, sum(dropping.dropped.values())) == (5, 0, 4)


def test_the_report_counts_the_tokens_that_training_gets(tmp_path):
    prepared = run(tmp_path, write(tmp_path, "x.jsonl", ROWS), heldout=0.1)
    loader = StepLoader(prepared.train, 8, 256, packing=True, seed=0)
    packs = [pack for _ in range(loader.steps_per_epoch) for pack in loader.next()]
    summary = prepared.report.train
    assert sum(pack.tokens for pack in packs) == summary.tokens
    assert sum(pack.label_tokens for pack in packs) == summary.learned_tokens
    lengths = [len(prepared.train[i].input_ids) for i in range(36)]
    assert (summary.shortest, summary.longest) == (min(lengths), max(lengths))
    assert summary.median == int(np.median(lengths))
    json.dumps(prepared.report.to_json())


def test_nothing_left_to_train_on_says_why_with_counts(tmp_path):
    path = write(tmp_path, "x.jsonl", [row("q", ""), row("long " * 200, "a")])
    with pytest.raises(
        DataError, match=r"none of the 2 rows of x.jsonl can be used \(1 nothing to learn.*1 longer than"
    ):
        run(tmp_path, path, max_length=64)
    good = write(tmp_path, "good.jsonl", ROWS)
    with pytest.raises(DataError, match=r"data.heldout: none of the 2 rows"):
        run(tmp_path, good, max_length=64, heldout=path)


def test_sources_keep_their_formats_and_unused_columns_are_told(tmp_path):
    first = write(tmp_path, "a.jsonl", [{"query": "q", "reply": "a", "tools": "[]"}])
    second = write(tmp_path, "b.jsonl", [{"text": "t", "prompt": "p", "completion": "c"}])
    sources = [
        Source(path=first, columns={"question": "query", "answer": "reply"}),
        Source(path=second, format="text"),
    ]
    prepared = run(tmp_path, sources)
    assert isinstance(prepared.train.row(0), Conversation)
    assert prepared.train.row(1) == Document("t")
    assert "a.jsonl: column tools (1 rows) is not used" in prepared.report.notices
    assert prepared.report.sources[1].unused_columns == {"prompt": 1, "completion": 1}


def test_the_models_positions_cap_the_length_and_it_is_said(tmp_path):
    prepared = run(tmp_path, write(tmp_path, "x.jsonl", [row("q", "long " * 300)]), max_length=512, max_positions=100)
    assert prepared.report.train.longest == prepared.report.max_length == 100
    assert "data.max_length is 512, but the model has 100 positions: rows end there" in prepared.report.notices


def test_a_token_beyond_the_models_vocabulary_is_refused(tmp_path):
    path = write(tmp_path, "x.jsonl", ROWS)
    with pytest.raises(DataError, match=r"x.jsonl, line 1: .*only 100 embeddings"):
        run(tmp_path, path, vocab_size=100)
    run(tmp_path, path, vocab_size=len(TOKENIZER))


def test_progress_is_told(tmp_path):
    calls = []
    run(tmp_path, write(tmp_path, "x.jsonl", ROWS), progress=lambda *call: calls.append(call))
    assert calls[-1] == ("reading x.jsonl", 40, None)


@pytest.mark.parametrize(("name", "rows"), [("alpaca_en_demo/alpaca_en_demo.json", 999), ("e2e/train.jsonl", 547)])
def test_real_rows_are_all_used(tmp_path, shared_data, name, rows):
    prepared = run(tmp_path, str(shared_data / name), heldout=0.05, max_length=4096)
    (source,) = prepared.report.sources
    assert (source.rows, source.examples, source.dropped, source.truncated) == (rows, rows, {}, 0)
    assert len(prepared.train) + len(prepared.heldout) == rows


def test_a_real_text_is_prepared_to_its_last_token(tmp_path, shared_data):
    text = (shared_data / "tinyshakespeare/input.txt").read_text(encoding="utf-8")[:100_000]
    (tmp_path / "play.txt").write_text(text, encoding="utf-8")
    report = run(tmp_path, str(tmp_path / "play.txt"), heldout=0.05, max_length=512).report
    assert report.train.longest <= 512
    assert report.train.tokens + report.heldout.tokens == len(TOKENIZER(text, verbose=False).input_ids) + 1
