"""The data in numbers: every row is in one bin, and the layouts are those of the run's own steps."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import tiny_tokenizer

from qlora_trainer.config.data_schema import DataConfig, Source
from qlora_trainer.data.batching.loader import StepLoader
from qlora_trainer.data.preparation.overview import (
    MOST_BINS,
    bin_labels,
    count_lengths,
    eval_facts,
    make_overview,
    source_facts,
    train_facts,
)
from qlora_trainer.data.preparation.prepare import prepare
from qlora_trainer.data.preparation.reports import PreparationReport, SetReport, SourceReport
from qlora_trainer.data.types import Example

LENGTHS = st.lists(st.integers(1, 5000), min_size=1, max_size=60)


@given(train=LENGTHS, eval_set=st.lists(st.integers(1, 9000), max_size=20))
def test_every_row_is_counted_in_the_bin_of_its_length(train: list[int], eval_set: list[int]) -> None:
    found = count_lengths(np.array(train), np.array(eval_set, dtype=np.int64))
    edges = found.edges
    assert edges == sorted(set(edges))
    assert edges[-1] == max(train + eval_set) + 1
    for lengths, counts in ((train, found.train), (eval_set, found.eval)):
        expected = [sum(begin <= n < end for n in lengths) for begin, end in pairwise(edges)]
        assert counts == expected
        assert sum(counts) == len(lengths)


@given(train=LENGTHS)
def test_bins_are_few_and_of_one_round_size_but_for_the_last(train: list[int]) -> None:
    edges = count_lengths(np.array(train), np.array([], dtype=np.int64)).edges
    sizes = np.diff(edges)
    assert len(sizes) <= MOST_BINS + 1
    assert len(set(sizes[:-1].tolist())) <= 1
    if len(sizes) > 1:
        assert str(sizes[0]).rstrip("0") in {"1", "2", "5"}
        assert all(edge % sizes[0] == 0 for edge in edges[:-1])


def test_a_few_very_long_rows_do_not_flatten_the_plot() -> None:
    found = count_lengths(np.array([*range(1, 100), 50_000]), np.array([], dtype=np.int64))
    assert found.edges == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 50_001]
    assert found.train == [9, *[10] * 9, 1]
    assert bin_labels(found)[-1] == "100-50,000"


def lengths_and_loader(rows: int, global_batch_size: int, packing: bool) -> tuple[np.ndarray, StepLoader]:
    lengths = np.random.default_rng(0).integers(3, 40, rows)
    examples = [Example([1] * n, [1] * n) for n in lengths.tolist()]
    return lengths, StepLoader(examples, global_batch_size, 64, packing, seed=5)


@pytest.mark.parametrize("packing", [True, False])
def test_layouts_are_those_of_the_packs_that_the_run_makes(packing: bool) -> None:
    lengths, loader = lengths_and_loader(23, 4, packing)
    overview = make_overview(loader, lengths, lengths[:0]).epoch
    steps = [loader.next() for _ in range(loader.steps_per_epoch)]
    packs = [pack for step in steps for pack in step]
    layout = overview.packed if packing else overview.padded
    assert overview.steps == loader.steps_per_epoch == 6
    assert overview.tokens_per_step == pytest.approx(lengths.sum() / 6)
    assert layout.micro_batches == pytest.approx(len(packs) / 6)
    assert layout.fill == pytest.approx(lengths.sum() / sum(pack.input_ids.numel() for pack in packs))


def test_packing_fills_all_and_whole_steps_padded_the_least() -> None:
    lengths, loader = lengths_and_loader(100, 8, packing=True)
    epoch, order = make_overview(loader, lengths, lengths[:3]).epoch, loader.order(0)
    assert epoch.packed.fill == 1.0
    assert epoch.fill_of_whole_steps < epoch.padded.fill < 1.0
    computed = sum(len(part) * max(part) for part in (lengths[order[at : at + 8]].tolist() for at in range(0, 100, 8)))
    assert epoch.fill_of_whole_steps == pytest.approx(lengths.sum() / computed)


def report(**changes: Any) -> PreparationReport:
    source = SourceReport("rows.jsonl", 16, 9, {"nothing to train on": 2, "too long": 1}, {"no answer": 4}, 3, 1)
    source.train, source.eval, source.epoch = 8, 1, 20
    sets = {"train": SetReport(8, 400, 100, 10, 50, 90), "eval": SetReport(1, 40, 10, 40, 40, 40)}
    counts = {"train_duplicates": 2, "eval_duplicates": 1, "train_other_answers": 3, "eval_other_answers": 0}
    rest = {"epoch_examples": 20, "max_length": 64, "warnings": [], "skipped_rows": None, "cached": False}
    fields: dict[str, Any] = {"sources": [source], **sets, **counts, **rest, **changes}
    return PreparationReport(**fields)


def test_every_reason_and_count_is_put_into_words() -> None:
    (source,) = report().sources
    words = dict(source_facts(source, 64))
    assert words == {
        "rows read": "16",
        "rows used, or parts of them": "9",
        "dropped: nothing to train on": "2",
        "dropped: too long": "1",
        "skipped: no answer": "4",
        "cut to at most 64 tokens": "3",
        "split into parts of at most 64 tokens": "1",
        "training rows an epoch takes": "20 of 8",
    }


@pytest.mark.parametrize(("packing", "words"), [(True, "100%, as rows are packed"), (False, "data.packing=true")])
def test_sets_are_put_into_words(packing: bool, words: str) -> None:
    lengths, loader = lengths_and_loader(8, 3, packing)
    epoch = make_overview(loader, lengths, lengths[:1]).epoch
    train = dict(train_facts(report(), epoch))
    assert train["repeat an earlier row"] == "2"
    assert train["have an earlier row's prompt, with another answer"] == "3"
    assert train["tokens"] == "400, of which 25.0% are trained"
    assert train["an epoch"].startswith("3 steps of up to 3 rows")
    assert words in train["fill"]
    assert dict(eval_facts(report()))["also in training"] == "1"
    assert eval_facts(report(eval=SetReport(0, 0, 0, 0, 0, 0))) == [("rows", "none")]


@pytest.mark.parametrize(
    ("packing", "can_pack", "words"),
    [
        (True, False, "padding wastes .* attention cannot keep packed rows apart"),
        (False, False, "padding wastes .* attention cannot keep packed rows apart"),
        (True, None, "100%, as rows are packed, if the model's attention can keep them apart"),
        (False, None, "padding wastes .* with data.packing=true"),
    ],
)
def test_fill_is_promised_only_for_models_that_can_be_packed(packing: bool, can_pack: bool | None, words: str) -> None:
    lengths, loader = lengths_and_loader(8, 3, packing)
    epoch = make_overview(loader, lengths, lengths[:1], can_pack).epoch
    assert re.search(words, dict(train_facts(report(), epoch))["fill"])
    assert (epoch.packing, epoch.can_pack) == (packing and can_pack is None, can_pack)


def test_an_epoch_of_mixed_sources_is_the_mixtures(tmp_path: Path) -> None:
    for name, count in (("few", 3), ("many", 9)):
        lines = [json.dumps({"prompt": f"{name} {i}", "completion": "word " * (i + 1)}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    sources = [Source(path=str(tmp_path / "few.jsonl"), count=12), Source(path=str(tmp_path / "many.jsonl"))]
    config = DataConfig(train=sources, eval=0.0)
    prepared = prepare(config, tiny_tokenizer("smollm2"), max_positions=None, seed=0, cache_dir=tmp_path / "cache")
    loader = StepLoader(prepared.train, 4, 64, True, 0, prepared.mixture)
    epoch = make_overview(loader, prepared.train.lengths, prepared.eval.lengths).epoch
    assert (epoch.rows, epoch.steps) == (12 + 9, 6)
    assert epoch.tokens_per_step == pytest.approx(sum(pack.tokens for _ in range(6) for pack in loader.next()) / 6)
