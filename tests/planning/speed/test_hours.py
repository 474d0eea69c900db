"""How long a run takes is the sum of what it does, each by its cost."""

import dataclasses
import math
from typing import Any

import pytest

from qlora_trainer.config.load import make_config
from qlora_trainer.planning.speed.candidates import Pace
from qlora_trainer.planning.speed.hours import CPU_FEW_TOKENS, DISK, run_hours
from qlora_trainer.planning.speed.rates import Rates
from qlora_trainer.planning.speed.rows import Steps, full_rows
from qlora_trainer.planning.speed.shape import Shape
from qlora_trainer.training.memory.activations import Policy

SHAPE = Shape(2, 8, 100, 16, 1000, 1000.0, 600, 50, 0.0, 4)
ONLY_THE_HOST = Rates("a device", math.inf, math.inf, math.inf, 0.0, (1.0, 2.0, 0.0), 1.0, overlaps=True)
CONFIG = make_config(
    {
        "model": {"name": "m"},
        "data": {"train": "x.jsonl", "max_length": 64},
        "training": {"evaluate_every": 4, "save_every": 5},
        "evaluation": {"samples": 1, "max_new_tokens": 7},
    }
)


def test_steps_evaluation_samples_and_checkpoints_are_added() -> None:
    """Of two layers that take 1 s forward and 2 s backward: two micro-batches a step, one for evaluation."""
    steps = Steps(((32, 32),), 64, True, count=10, eval_lengths=(16, 16))
    hours = run_hours(SHAPE, Pace(ONLY_THE_HOST, steps), Policy("none"), 32, CONFIG)
    assert hours is not None
    assert hours.steps == 10 * 2 * 2 * 3
    assert hours.evaluation == 3 * 2, "after steps 4 and 8, and at the end"
    assert hours.samples == 2 * 7 * 2
    assert hours.checkpoints == pytest.approx(3 * 28 * 50 / DISK)
    assert hours.total == pytest.approx(120 + 6 + 28, abs=0.1)
    assert str(hours) == "about 3 min, estimated (10 steps 2 min, evaluation 6 s, samples 28 s)"
    later = run_hours(SHAPE, Pace(ONLY_THE_HOST, steps), Policy("none"), 32, CONFIG, taken=8)
    assert later is not None
    assert (later.count, later.steps, later.evaluation) == (2, 2 * 2 * 2 * 3, 2)


@pytest.mark.parametrize(("every", "count"), [(1, 5), (3, 7), (4, 8), (100, 8)])
def test_what_is_done_every_so_many_steps_is_counted_as_the_loop_does_it(every: int, count: int) -> None:
    """After every so many and after the last, wherever a run goes on."""
    config = CONFIG.replace({"training.evaluate_every": every, "training.save_every": every, "evaluation.samples": 0})
    pace = Pace(ONLY_THE_HOST, Steps(((32, 32),), 64, True, count=count, eval_lengths=(16, 16)))
    for taken in range(count + 1):
        times = sum(step % every == 0 or step == count for step in range(taken + 1, count + 1))
        hours = run_hours(SHAPE, pace, Policy("none"), 32, config, taken)
        assert hours is not None
        assert hours.evaluation == 2 * times
        assert hours.checkpoints == pytest.approx((times + (taken == 0)) * 28 * 50 / DISK)


def test_answers_begin_with_their_prompts_and_come_a_token_at_a_time() -> None:
    """Twenty are two batches of ten. A card reads weights in NF4; a CPU makes them of it, and its products are thin."""
    config = CONFIG.replace({"evaluation.samples": 20, "evaluation.max_new_tokens": 5})
    steps = Steps(((32, 32),), 64, True, count=10, trained=0.25, eval_lengths=(40, 56))

    def seconds(**rates: Any) -> float:
        pace = Pace(dataclasses.replace(ONLY_THE_HOST, **rates), steps)
        hours = run_hours(SHAPE, pace, Policy("none"), 32, config, taken=10)
        assert hours is not None
        return hours.samples

    assert seconds() == 2 * (2 + 5 * 2), "two layers, for the prompts and for each token"
    silent, products, once = (0.0, 0.0, 0.0), 2 * (1000 + 100 * 8), 2 * (1000 + 50)
    prompts = 10 * 36 * once + 2 * 16 * 10 * 36**2
    assert seconds(host=silent, products=1.0) == 2 * (prompts + 5 * 10 * products)
    assert seconds(host=silent, bandwidth=1.0) == pytest.approx(2 * 5 * (100 * 8 * 4 + 0.52 * 1000))
    on_cpu: dict[str, Any] = {"overlaps": False, "host": silent}
    assert seconds(**on_cpu, expansion=1.0) == 2 * (1000 + 5 * 1000)
    assert seconds(**on_cpu, products=1.0) == 2 * (prompts + 5 * 10 * products * CPU_FEW_TOKENS)
    assert seconds(**on_cpu, expansion=1.0, threads=4, parallel=1.0) == 2 * (1000 + 5 * 1000) / 4


def test_without_rows_or_figures_nothing_is_estimated() -> None:
    unknown = Pace(ONLY_THE_HOST, full_rows(32, 2, packing=True))
    assert run_hours(SHAPE, unknown, Policy("none"), 32, CONFIG) is None
    known = Steps(((32, 32),), 64, True, count=10)
    absurd = Pace(dataclasses.replace(ONLY_THE_HOST, is_known=False), known)
    assert run_hours(SHAPE, absurd, Policy("none"), 32, CONFIG) is None
