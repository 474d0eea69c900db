"""Promises of the learning rate's schedule: warmup to the peak, then down, and never above it."""

import math

import pytest

from qlora_trainer.config.schema import OptimizerConfig
from qlora_trainer.training.schedule import learning_rate


def test_warmup_rises_from_a_share_to_the_peak() -> None:
    settings = OptimizerConfig(learning_rate=1.0, warmup_ratio=0.25, schedule="constant")
    rates = [learning_rate(settings, step, 16) for step in range(16)]
    assert rates == [0.25, 0.5, 0.75, 1.0] + [1.0] * 12


def test_linear_schedule_reaches_zero_one_step_after_the_last() -> None:
    settings = OptimizerConfig(learning_rate=1.0, warmup_ratio=0.0, schedule="linear")
    assert [learning_rate(settings, step, 4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_cosine_schedule_is_half_way_down_in_the_middle() -> None:
    settings = OptimizerConfig(learning_rate=2.0, warmup_ratio=0.2, schedule="cosine")
    rates = [learning_rate(settings, step, 10) for step in range(10)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[6] == pytest.approx(1.0, abs=1e-12)
    assert rates[4] + rates[8] == pytest.approx(2.0, abs=1e-12)  # symmetric about the middle
    assert rates[9] > 0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.5, 0.99])
def test_every_step_learns_at_no_more_than_the_peak(schedule: str, ratio: float) -> None:
    settings = OptimizerConfig(schedule=schedule, warmup_ratio=ratio)
    for total in (1, 2, 3, 10, 101):
        rates = [learning_rate(settings, step, total) for step in range(total)]
        assert all(0 < rate <= settings.learning_rate for rate in rates)
        assert max(rates) == settings.learning_rate
        peak = rates.index(max(rates))
        assert rates[: peak + 1] == sorted(rates[: peak + 1])
        assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_warmup_steps_do_not_grow_by_rounding() -> None:
    settings = OptimizerConfig(learning_rate=1.0, warmup_ratio=0.07, schedule="constant")
    assert math.ceil(0.07 * 100) == 8  # what rounding would make of 7 %
    assert learning_rate(settings, 6, 100) == 1.0
