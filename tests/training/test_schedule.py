"""Promises of the learning rate's schedule: warmup to the peak, then down, and never above it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    get_cosine_with_min_lr_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from qlora_trainer.common.errors import ConfigError
from qlora_trainer.config.load import make_config
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


def peer_rates(schedule: LambdaLR, total: int) -> list[float]:
    """The rates of a schedule of transformers, step by step."""
    rates = []
    for _ in range(total):
        rates.append(float(schedule.get_last_lr()[0]))
        schedule.optimizer.step()
        schedule.step()
    return rates


def optimizer() -> Optimizer:
    return SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)


@pytest.mark.parametrize("total", [10, 97])
@pytest.mark.parametrize(
    ("settings", "peer"),
    [
        (
            {"schedule": "cosine", "minimum_ratio": 0.1},
            lambda total: get_cosine_with_min_lr_schedule_with_warmup(optimizer(), 0, total, min_lr_rate=0.1),
        ),
        (
            {"schedule": "polynomial", "minimum_ratio": 0.2, "polynomial_power": 3.0},
            lambda total: get_polynomial_decay_schedule_with_warmup(optimizer(), 0, total, lr_end=6e-5, power=3.0),
        ),
        *(
            (
                {"schedule": "warmup_stable_decay", "minimum_ratio": 0.1, "decay_ratio": 0.4, "decay_shape": shape},
                lambda total, shape=shape: get_wsd_schedule(
                    optimizer(),
                    num_warmup_steps=0,
                    num_decay_steps=math.ceil(0.4 * total),
                    num_training_steps=total,
                    decay_type=shape,
                    min_lr_ratio=0.1,
                ),
            )
            for shape in ("linear", "cosine", "1-sqrt")
        ),
    ],
    ids=["cosine", "polynomial", "linear decay", "cosine decay", "1-sqrt decay"],
)
def test_schedules_are_those_of_transformers_after_the_warmup(
    settings: dict[str, Any], peer: Callable[[int], LambdaLR], total: int
) -> None:
    ours = OptimizerConfig(learning_rate=3e-4, warmup_ratio=0.0, **settings)
    assert [learning_rate(ours, step, total) for step in range(total)] == pytest.approx(
        peer_rates(peer(total), total), rel=1e-12
    )


def test_the_rate_stays_at_its_peak_until_the_decay() -> None:
    settings = OptimizerConfig(
        learning_rate=1.0, schedule="warmup_stable_decay", warmup_ratio=0.2, decay_ratio=0.4, decay_shape="linear"
    )
    assert [learning_rate(settings, step, 10) for step in range(10)] == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"polynomial_power": 3.0}, "optimizer.polynomial_power has no effect with optimizer.schedule=cosine"),
        ({"schedule": "linear", "decay_ratio": 0.2}, "set optimizer.schedule=warmup_stable_decay"),
        ({"schedule": "polynomial", "decay_shape": "linear"}, "optimizer.decay_shape has no effect"),
        ({"schedule": "constant", "minimum_ratio": 0.1}, "optimizer.minimum_ratio has no effect"),
        ({"schedule": "warmup_stable_decay", "warmup_ratio": 0.5, "decay_ratio": 0.6}, "more than all steps"),
    ],
)
def test_settings_that_a_schedule_has_not_are_refused_by_name(settings: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        make_config({"model": {"name": "m"}, "data": {"train": "t.jsonl"}, "optimizer": settings})


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "cosine"},
        {"schedule": "linear", "minimum_ratio": 0.3},
        {"schedule": "polynomial"},
        {"schedule": "warmup_stable_decay", "decay_ratio": 0.01},
        {"schedule": "constant"},
    ],
    ids=lambda settings: settings["schedule"],
)
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.5, 0.99])
def test_every_step_learns_at_no_more_than_the_peak(settings: dict[str, Any], ratio: float) -> None:
    config = OptimizerConfig(warmup_ratio=ratio, **settings)
    for total in (1, 2, 3, 10, 101):
        rates = [learning_rate(config, step, total) for step in range(total)]
        assert all(0 < rate <= config.learning_rate for rate in rates)
        assert max(rates) == config.learning_rate
        peak = rates.index(max(rates))
        assert rates[: peak + 1] == sorted(rates[: peak + 1])
        assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_warmup_steps_do_not_grow_by_rounding() -> None:
    settings = OptimizerConfig(learning_rate=1.0, warmup_ratio=0.07, schedule="constant")
    assert math.ceil(0.07 * 100) == 8  # what rounding would make of 7 %
    assert learning_rate(settings, 6, 100) == 1.0
