"""The comparison of the formula with measured steps judges as it says."""

import pytest

from benchmarks.fastest import Setting, budgets_between, choose, kendall
from qlora_trainer.planning.speed.candidates import Candidate
from qlora_trainer.training.memory.activations import Policy


def setting(level: str, limit: int, predicted: float, needed: int, measured: float) -> Setting:
    return Setting(Candidate(Policy(level), limit, predicted), needed, [measured])  # type: ignore[arg-type]


SETTINGS = [
    setting("none", 512, 1.0, 100, 1.1),
    setting("none", 256, 1.2, 60, 1.0),
    setting("full", 512, 1.4, 40, 1.5),
    setting("tiled", 512, 2.0, 20, 1.9),
]


def test_kendalls_tau_counts_the_pairs_in_order() -> None:
    assert kendall([(1, 1), (2, 2), (3, 3)]) == 1
    assert kendall([(1, 3), (2, 2), (3, 1)]) == -1
    assert kendall([(one.candidate.seconds, one.measured) for one in SETTINGS]) == pytest.approx((5 - 1) / 6)


def test_each_policy_is_the_best_in_some_budget() -> None:
    assert {20, 40, 60} <= set(budgets_between(SETTINGS, 4))
    assert len(budgets_between(SETTINGS, 3)) == 3


def test_what_auto_takes_is_set_against_the_fastest_that_fits() -> None:
    taken, best = choose(SETTINGS, 100)
    assert (taken.candidate.micro_batch_tokens, best.candidate.micro_batch_tokens) == (512, 256)
    taken, best = choose(SETTINGS, 40)
    assert taken is best is SETTINGS[2]
