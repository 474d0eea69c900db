"""Promises of functions that run at once: results in order, a thread's own share, its own number and generator."""

import threading
from collections.abc import Callable

import pytest
import torch

from qlora_kernels.dropout import draw_seed
from qlora_kernels.side_by_side import DrewRandomNumbersError, cpu_generator, run_at_once, worker_number


def test_functions_run_at_once_and_results_keep_their_order() -> None:
    """Each waits for the other: one after the other, they would wait for ever."""
    meeting = threading.Barrier(3, timeout=60)

    def task(number: int) -> Callable[[], tuple[int, int]]:
        def meet() -> tuple[int, int]:
            meeting.wait()
            return number, worker_number()

        return meet

    assert run_at_once([task(number) for number in range(3)]) == [(0, 0), (1, 1), (2, 2)]
    assert worker_number() == 0


def test_threads_are_divided_and_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert run_at_once([torch.get_num_threads] * 2) == [2, 2]
        assert run_at_once([torch.get_num_threads] * 8) == [1] * 8
        assert torch.get_num_threads() == 4
        assert run_at_once([torch.get_num_threads]) == [4]
    finally:
        torch.set_num_threads(before)


def test_an_error_is_raised_once_all_have_ended() -> None:
    ended = threading.Event()

    def fails() -> None:
        raise ValueError("first")

    def takes_longer() -> None:
        threading.Event().wait(0.2)
        ended.set()
        raise ValueError("second")

    with pytest.raises(ValueError, match="first"):
        run_at_once([fails, takes_longer])
    assert ended.is_set()
    assert worker_number() == 0


def test_each_draws_its_own_numbers_and_the_same_again() -> None:
    torch.manual_seed(3)
    first = run_at_once([draw_seed] * 3, draws=True)
    then = run_at_once([draw_seed] * 3, draws=True)
    torch.manual_seed(3)
    again = run_at_once([draw_seed] * 3, draws=True)
    assert [int(seed) for seed in first] == [int(seed) for seed in again]
    assert len({int(seed) for seed in first + then}) == 6
    assert cpu_generator() is torch.default_generator


@pytest.mark.parametrize("draws", [True, False])
def test_numbers_drawn_from_the_global_generator_are_an_error(draws: bool) -> None:
    with pytest.raises(DrewRandomNumbersError):
        run_at_once([lambda: torch.rand(1), lambda: torch.ones(1)], draws=draws)


def test_functions_that_draw_none_leave_the_generator_alone() -> None:
    """Or an evaluation in between would change the masks of the training steps after it."""
    before = torch.get_rng_state()
    run_at_once([lambda: torch.ones(1)] * 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_interruption_waits_for_no_other_function_and_the_next_call_does() -> None:
    """As a second Ctrl-C, which Python raises in the main thread."""
    may_end, ended = threading.Event(), threading.Event()

    def interrupted() -> None:
        raise KeyboardInterrupt

    def computes_on() -> None:
        may_end.wait(60)
        ended.set()

    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        run_at_once([interrupted, computes_on])
    assert not ended.is_set()
    assert (worker_number(), torch.get_num_threads()) == (0, before)
    may_end.set()
    assert run_at_once([ended.is_set] * 2) == [True, True]
