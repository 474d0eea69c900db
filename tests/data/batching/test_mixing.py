"""Promises of mixing: exact numbers of rows, nothing repeated that need not be, other rows in other epochs."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qlora_trainer.config.data_schema import Source
from qlora_trainer.data.batching.mixing import Mixture, SourceAmount, epoch_quotas, eval_counts, is_mixed


def mixture(available: list[int], quotas: list[int]) -> Mixture:
    bounds = np.cumsum([0, *available])
    return Mixture(tuple(np.arange(b, e) for b, e in itertools.pairwise(bounds)), tuple(quotas))


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def test_weights_are_shares_and_the_scarcest_source_is_used_once():
    assert epoch_quotas([1000, 50], [SourceAmount(weight=1), SourceAmount(weight=1)]) == [50, 50]
    assert epoch_quotas([1000, 50], [SourceAmount(weight=0.9), SourceAmount(weight=0.1)]) == [450, 50]
    assert epoch_quotas([30, 500], [SourceAmount(weight=3), SourceAmount(weight=7)]) == [30, 70]
    assert epoch_quotas([100, 7], [SourceAmount(weight=1e-6), SourceAmount(weight=1)]) == [1, 7], (
        "a source named is a source used"
    )


@given(sizes, st.data())
def test_no_weighted_source_is_repeated_and_one_is_used_whole(available, data):
    weights = data.draw(st.lists(st.floats(0.01, 100), min_size=len(available), max_size=len(available)))
    quotas = epoch_quotas(available, [SourceAmount(weight=weight) for weight in weights])
    assert all(1 <= quota <= count for quota, count in zip(quotas, available, strict=True))
    assert any(quota == count for quota, count in zip(quotas, available, strict=True))
    scale = min(count / weight for count, weight in zip(available, weights, strict=True))
    assert all(abs(q - w * scale) <= 0.5 or q == 1 for q, w in zip(quotas, weights, strict=True))


@pytest.mark.parametrize("weight", [0.0, -1.0, 1e-320, 1e-10, 1e10, 1e308])
def test_a_weight_that_arithmetic_cannot_bear_is_refused(weight):
    with pytest.raises(ValidationError, match="weight"):
        Source(path="x.jsonl", weight=weight)


@pytest.mark.parametrize("weights", [(1e-9, 1e-9), (1e-9, 1e9), (1e9, 1e9)])
def test_the_smallest_and_largest_weights_allowed_are_mixed(weights):
    parts = [SourceAmount(weight=Source(path="x.jsonl", weight=weight).weight) for weight in weights]
    expected = [5, 5] if weights[0] == weights[1] else [1, 2**40]
    assert epoch_quotas([5, 2**40], parts) == expected


def test_a_count_is_kept_exactly_and_sources_without_one_give_all_their_rows():
    parts = [SourceAmount(count=5), SourceAmount(), SourceAmount(count=30)]
    assert epoch_quotas([100, 7, 10], parts) == [5, 7, 30]
    assert is_mixed(parts)
    assert not is_mixed([SourceAmount(), SourceAmount()])


@given(sizes, st.data(), st.integers(0, 2**63 - 1), st.integers(0, 50))
def test_an_epoch_has_whole_passes_and_no_row_twice_beyond_them(available, data, seed, epoch):
    quotas = data.draw(st.lists(st.integers(1, 100), min_size=len(available), max_size=len(available)))
    mixed = mixture(available, quotas)
    rows = mixed.epoch_rows(seed, epoch)
    assert len(rows) == len(mixed) == sum(quotas)
    assert rows.tolist() == mixed.epoch_rows(seed, epoch).tolist()
    for mine, quota in zip(mixed.rows, quotas, strict=True):
        times = Counter(rows[np.isin(rows, mine)].tolist())
        assert times.total() == quota
        assert {times[row] for row in mine.tolist()} <= {quota // len(mine), -(-quota // len(mine))}


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_over_epochs_rows_not_seen_come_before_rows_seen(available, quota, seed):
    mixed = mixture([available], [quota])
    seen = Counter[int]()
    for epoch in range(6):
        seen.update(mixed.epoch_rows(seed, epoch).tolist())
        times = [seen[row] for row in range(available)]
        assert max(times) - min(times) <= 1


def test_seeds_and_sources_draw_apart():
    mixed = mixture([50, 50], [10, 10])
    draws = {tuple(mixed.epoch_rows(seed, 0).tolist()) for seed in range(5)}
    assert len(draws) == 5
    first, second = mixed.epoch_rows(0, 0)[:10], mixed.epoch_rows(0, 0)[10:] - 50
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize(
    ("available", "parts", "share", "expected"),
    [
        ([40], [SourceAmount()], 0.1, [4]),
        ([40], [SourceAmount()], 0.001, [1]),
        ([40], [SourceAmount()], 0.999, [39]),
        ([900, 100], [SourceAmount(), SourceAmount()], 0.1, [90, 10]),
        ([10_000, 100], [SourceAmount(weight=1), SourceAmount(weight=1)], 0.1, [10, 10]),
        ([10_000, 100], [SourceAmount(count=300), SourceAmount()], 0.1, [30, 10]),
        ([10, 10], [SourceAmount(count=500), SourceAmount()], 0.1, [1, 1]),
        ([1, 50], [SourceAmount(weight=1), SourceAmount(weight=1)], 0.5, [0, 1]),
    ],
)
def test_rows_are_eval_of_each_source_as_an_epoch_takes_them(available, parts, share, expected):
    assert eval_counts(available, parts, share) == expected


@given(sizes, st.floats(0.001, 0.999), st.booleans())
def test_holding_out_always_leaves_rows_to_train_on(available, share, weighted):
    held = eval_counts(available, [SourceAmount(weight=1.5 if weighted else None)] * len(available), share)
    assert all(0 <= h <= count for h, count in zip(held, available, strict=True))
    assert sum(held) < sum(available)
    assert not weighted or all(h < count for h, count in zip(held, available, strict=True))
