"""Which of the prepared rows are for training, which for evaluation, and how many of each source an epoch takes."""

from collections import Counter

import pytest
from preparing import ROWS, row, run, write

from qlora_trainer.common.errors import DataError
from qlora_trainer.config.data_schema import Source
from qlora_trainer.data.batching.loader import StepLoader
from qlora_trainer.data.types import Document


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


@pytest.mark.parametrize(
    ("other", "settings"),
    [
        ({"text": "a notice", "kind": "junk"}, {"keep": {"kind": "good"}}),
        ({"messages": [{"role": "note", "content": "n"}], **row("q", "a"), "kind": "good"}, {"ignore": ["messages"]}),
    ],
    ids=["keep", "ignore"],
)
def test_the_format_is_that_of_the_rows_and_columns_that_are_kept(tmp_path, other, settings):
    """What the config leaves out says nothing about the rows that are read."""
    kept = [{**one, "kind": "good"} for one in ROWS[:3]]
    prepared = run(tmp_path, write(tmp_path, "x.jsonl", [other, *kept]), **settings)
    said = [prepared.train.row(index).messages[0].content for index in range(len(prepared.train))]
    assert said[-3:] == ["question 0", "question 1", "question 2"]
