"""A ladder of sizes depends on the rows alone, and layouts are those of the loader."""

import numpy as np
import pytest

from qlora_trainer.data.batching.loader import StepLoader
from qlora_trainer.data.types import Example
from qlora_trainer.planning.speed.rows import full_rows, ladder, micro_batches_of, steps_of


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (60, [100]),
        (100, [100]),
        (130, [100, 192]),
        (1600, [100, 200, 300, 400, 600, 800, 1200, 1600]),
        (1601, [100, 200, 300, 400, 600, 800, 1200, 1600, 1664]),
    ],
)
def test_a_ladder_is_short_and_ends_at_the_largest_step(largest: int, expected: list[int]) -> None:
    steps = full_rows(largest, 1, packing=True)
    assert ladder(100, steps) == expected


def test_a_ladder_of_padded_rows_has_whole_rows() -> None:
    assert ladder(100, full_rows(130, 1, packing=False)) == [100, 200]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("packing", [True, False])
def test_a_runs_steps_are_those_that_its_loader_gives(packing: bool, seed: int) -> None:
    """The largest may be in a later epoch, as with one of these seeds."""
    lengths = [7, 30, 12, 5, 44, 9, 21, 3, 18, 40]
    rows = [Example([1] * n, [1] * n) for n in lengths]
    loader = StepLoader(rows, 4, 64, packing, seed=seed)
    steps = steps_of(loader, np.array(lengths), 6, trained=0.5)
    packs = [loader.next() for _ in range(6)]  # two epochs
    assert steps.count == 6
    first_epoch = [sorted(n for pack in step for n in pack.row_lengths) for step in packs[:3]]
    if packing:
        assert [sorted(step) for step in steps.rows] == first_epoch
        assert steps.largest == max(sum(pack.tokens for pack in step) for step in packs)
    layout = micro_batches_of(steps, 64)
    assert layout.steps == 3
    assert sorted(layout.tokens) == sorted(float(pack.input_ids.numel()) for step in packs[:3] for pack in step)
    assert (loader.epoch, loader.step) == (2, 0)
    again = StepLoader(rows, 4, 64, packing, seed=seed)
    steps_of(again, np.array(lengths), 6)
    assert (again.epoch, again.step) == (0, 0), "the loader is not moved"
