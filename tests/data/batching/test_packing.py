from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer.data.batching import packing
from qlora_trainer.data.batching.packing import (
    EVEN,
    FEWEST_OF_A_PART,
    divide_rows,
    group_for_packing,
    laid_out_tokens,
    make_packs,
)
from qlora_trainer.data.types import Example

LIMIT = 32
FIRST_FIT_ONLY = [
    ([11, 9, 38, 1, 16, 43], 60),
    ([14, 17, 8, 1, 8, 12], 32),
    ([19, 31, 20, 18, 27, 1], 60),
    ([1, 1, 1, 1, 1, 1, 8, 9, 10, 15, 16, 26, 31], 32),  # several are fullest, and one of them gives a row away
]


@st.composite
def examples(draw):
    """Rows of unlike lengths, each token unique, each labeled or not."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    rows = []
    start = 1
    for length in lengths:
        ids = list(range(start, start + length))
        start += length
        trained = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        rows.append(Example(ids, [token if flag else -100 for token, flag in zip(ids, trained, strict=True)]))
    return rows


def labeled_pairs(rows: list[Example]) -> Counter:
    """(token, the trained token after it) for every label that carries loss."""
    return Counter(
        (row.input_ids[i], row.labels[i + 1])
        for row in rows
        for i in range(len(row.labels) - 1)
        if row.labels[i + 1] != -100
    )


@settings(max_examples=80)
@given(rows=examples(), packing=st.booleans())
def test_every_token_and_every_label_is_in_a_pack_exactly_once(rows, packing):
    packs = make_packs(rows, LIMIT, packing)
    tokens: Counter = Counter()
    pairs: Counter = Counter()
    for pack in packs:
        tokens.update(token for token in pack.input_ids.flatten().tolist() if token != 0)
        trained = pack.labels != -100
        pairs.update(zip(pack.input_ids[trained].tolist(), pack.labels[trained].tolist(), strict=True))
        assert pack.label_tokens == int(trained.sum())
        assert pack.tokens == int((pack.input_ids != 0).sum())
    assert tokens == Counter(token for row in rows for token in row.input_ids)
    assert pairs == labeled_pairs(rows)


@settings(max_examples=80)
@given(rows=examples(), packing=st.booleans())
def test_packs_stay_within_the_limit_but_for_a_longer_row_alone(rows, packing):
    for pack in make_packs(rows, LIMIT, packing):
        documents = pack.input_ids.shape[0] if pack.cu_seqlens is None else len(pack.cu_seqlens) - 1
        assert pack.input_ids.numel() <= LIMIT or documents == 1


@settings(max_examples=80)
@given(rows=examples())
def test_packed_rows_are_whole_documents_with_positions_from_zero_and_no_padding(rows):
    by_first = {row.input_ids[0]: row for row in rows}
    for pack in make_packs(rows, LIMIT, packing=True):
        assert pack.input_ids.dtype == pack.labels.dtype == pack.position_ids.dtype == torch.int64
        assert pack.cu_seqlens is not None
        assert pack.cu_seqlens.dtype == torch.int32
        bounds = pack.cu_seqlens.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == pack.input_ids.shape[1] == pack.tokens
        for begin, end in pairwise(bounds):
            row = by_first[int(pack.input_ids[0, begin])]
            assert pack.input_ids[0, begin:end].tolist() == row.input_ids
            assert pack.labels[0, begin:end].tolist() == [*row.labels[1:], -100]
            assert pack.position_ids[0, begin:end].tolist() == list(range(end - begin))


def test_padding_is_on_the_right_and_carries_no_label():
    rows = [Example([5, 6], [5, 6]), Example([7, 8, 9, 10], [-100, 8, 9, 10])]
    (pack,) = make_packs(rows, 8, packing=False)
    assert pack.input_ids.tolist() == [[7, 8, 9, 10], [5, 6, 0, 0]]
    assert pack.labels.tolist() == [[8, 9, 10, -100], [6, -100, -100, -100]]
    assert pack.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    assert pack.cu_seqlens is None


@settings(max_examples=80)
@given(lengths=st.lists(st.integers(1, LIMIT), min_size=1, max_size=14))
def test_no_pack_could_be_emptied_into_another(lengths):
    totals = sorted(sum(lengths[i] for i in group) for group in group_for_packing(lengths, LIMIT))
    assert len(totals) == 1 or totals[0] + totals[1] > LIMIT


def assert_balanced(lengths: list[int], limit: int) -> None:
    groups = [group for group in group_for_packing(lengths, limit) if lengths[group[0]] <= limit]
    totals = [sum(lengths[index] for index in group) for group in groups]
    assert max(totals) <= limit
    for total, group in zip(totals, groups, strict=True):
        assert total - min(totals) <= min(lengths[index] for index in group)


@settings(max_examples=300)
@given(lengths=st.lists(st.integers(1, LIMIT), min_size=1, max_size=14))
def test_no_pack_exceeds_the_emptiest_by_more_than_its_shortest_row(lengths):
    assert_balanced(lengths, LIMIT)


# Emptiest-first overflows with as many groups as first-fit needs, so the balance comes from moving rows.
@pytest.mark.parametrize(("lengths", "limit"), FIRST_FIT_ONLY)
def test_rows_that_only_first_fit_places_are_balanced_too(lengths, limit):
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    first_fit = packing._first_fit(order, lengths, limit)
    for count in range(1, len(first_fit) + 1):
        assert any(sum(lengths[i] for i in group) > limit for group in packing._emptiest_first(order, lengths, count))
    assert_balanced(lengths, limit)


def test_packs_are_as_few_as_possible_and_balanced():
    groups = group_for_packing([6, 6, 6, 6, 4, 4, 4, 4], 20)
    assert sorted(sum([6, 6, 6, 6, 4, 4, 4, 4][i] for i in group) for group in groups) == [20, 20]
    totals = [sum([5] * len(group)) for group in group_for_packing([5] * 9, 22)]
    assert totals == [15, 15, 15]


@given(lengths=st.lists(st.integers(1, 900), min_size=1, max_size=20), workers=st.integers(1, 8), packing=st.booleans())
def test_rows_of_a_micro_batch_are_divided_evenly_or_not_at_all(
    lengths: list[int], workers: int, packing: bool
) -> None:
    parts = divide_rows(lengths, packing, workers)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    assert divide_rows(lengths, packing, workers) == parts
    sizes = [laid_out_tokens([lengths[index] for index in part], packing) for part in parts]
    if len(parts) > 1:
        assert workers % len(parts) == 0  # each has as many threads as the others
        assert min(sizes) >= FEWEST_OF_A_PART
        assert sum(sizes) >= EVEN * len(parts) * max(sizes)


def test_equal_rows_are_divided_among_all_workers() -> None:
    assert divide_rows([300, 300], True, 2) == [[0], [1]]
    assert divide_rows([300] * 8, True, 4) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert divide_rows([300, 300, 300], True, 2) == [[0, 1, 2]]  # two would do twice as much as one
    assert divide_rows([20, 20], True, 2) == [[0, 1]]  # too few to be worth it
