"""The choice is near the fastest that fits, never slower with more memory, and by few plans."""

import random
from typing import Any

import pytest

from qlora_trainer.planning.speed.candidates import Candidate
from qlora_trainer.planning.speed.choice import next_smaller, search
from qlora_trainer.training.memory.activations import Policy


def drawn(seed: int) -> dict[Candidate, int]:
    """Candidates with the bytes that they need."""
    draw = random.Random(seed)
    return {Candidate(Policy("none"), index, draw.uniform(1, 1.3)): draw.randint(1, 100) for index in range(1, 20)}


def chosen(needed: dict[Candidate, int], budget: int, plan: Any = lambda one: one) -> Any:
    ordered = sorted(needed, key=lambda one: one.seconds)

    def also_fits(one: Candidate, chosen: Candidate) -> bool:
        return needed[one] <= needed[chosen]

    return search(ordered, lambda one: needed[one] if needed[one] <= budget else None, plan, also_fits)


@pytest.mark.parametrize("seed", range(30))
def test_of_those_as_fast_as_the_fastest_the_one_with_least_memory_is_taken(seed: int) -> None:
    needed = drawn(seed)
    slower = float("inf")
    for budget in range(101):
        fitting = [one for one in needed if needed[one] <= budget]
        found = chosen(needed, budget)
        if not fitting:
            assert found is None
            continue
        fastest = min(one.seconds for one in fitting)
        as_fast = [one for one in fitting if one.seconds <= 1.03 * fastest]
        assert needed[found.chosen] == min(needed[one] for one in as_fast)
        assert found.chosen in as_fast
        assert found.following != found.chosen
        assert found.chosen.seconds <= slower, "more memory is never slower"
        slower = found.chosen.seconds


def test_what_does_not_fit_by_its_plan_is_passed_over() -> None:
    needed = {Candidate(Policy("none"), size, 10.0 - size): size for size in (1, 2, 3)}
    planned = []

    def plan(one: Candidate) -> str | None:
        planned.append(one.micro_batch_tokens)
        return "fits" if one.micro_batch_tokens < 3 else None

    found = chosen(needed, 5, plan)
    assert (found.chosen.micro_batch_tokens, found.plan, planned) == (2, "fits", [3, 2])
    assert found.following.micro_batch_tokens == 1


def test_after_memory_ran_out_the_fastest_that_is_5_percent_smaller_is_next() -> None:
    sizes = {100: 1.0, 96: 2.0, 95: 3.0, 10: 4.0}
    ordered = [Candidate(Policy("none"), size, seconds) for size, seconds in sizes.items()]

    def after(lays_out: Any = lambda one: True) -> int | None:
        found = next_smaller(ordered, lambda one: one.micro_batch_tokens, 100, lays_out)
        return found.micro_batch_tokens if found else None

    assert after() == 95
    assert after(lambda one: one.micro_batch_tokens < 50) == 10
    assert after(lambda one: False) is None
