"""Repeats are counted as by looking at every pair of rows."""

from typing import cast

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.data.preparation.reports import eval_repeats, train_repeats
from qlora_trainer.data.preparation.store import ExampleSet

# A digest of 3 * prompt + answer, so that equal examples have equal prompts; prompt 0 is none.
ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=12)


class Digests(list[tuple[int, int]]):
    """As much of an ExampleSet as is read."""

    @property
    def digests(self) -> np.ndarray:
        return np.array([3 * prompt + answer for prompt, answer in self], dtype=np.uint64)

    @property
    def prompt_digests(self) -> np.ndarray:
        return np.array([prompt for prompt, _ in self], dtype=np.uint64)


def examples(rows: list[tuple[int, int]]) -> ExampleSet:
    return cast(ExampleSet, Digests(rows))


@given(ROWS)
def test_repeats_in_training_are_counted(rows: list[tuple[int, int]]) -> None:
    repeats = [row in rows[:index] for index, row in enumerate(rows)]
    others = [
        row[0] != 0 and row not in rows[:index] and row[0] in [prompt for prompt, _ in rows[:index]]
        for index, row in enumerate(rows)
    ]
    assert train_repeats(examples(rows)) == (sum(repeats), sum(others))


@given(ROWS, ROWS)
def test_repeats_of_training_in_the_eval_rows_are_counted(
    eval_rows: list[tuple[int, int]], rows: list[tuple[int, int]]
) -> None:
    repeats = [row in rows for row in eval_rows]
    others = [row[0] != 0 and row not in rows and row[0] in [prompt for prompt, _ in rows] for row in eval_rows]
    assert eval_repeats(examples(eval_rows), examples(rows)) == (sum(repeats), sum(others))
