"""Call functions at once on a CPU, each in a thread of its own with a share of torch's threads.

The threads of one operation wait for each other at its end, thousands of times in a step of training, and much of a
step is no large operation: two threads are 1.6 times as fast as one. The rows of a micro-batch need nothing of each
other until their gradients are added up, and Python holds its lock for a tenth of the time, so two halves, each on one
core, are twice as fast (decision 0047).

What functions of this package write to, outside of their own results, is the workspace that a weight is dequantized
into, the gradients of adapters, and the generator that seeds of dropout are drawn from. Each thread has its own. Left
out: how rows are divided, and how gradients are added up.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

_Result = TypeVar("_Result")


class DrewRandomNumbersError(RuntimeError):
    """Report that functions at once drew from torch's global generator, which gives each other numbers each time."""


class _Worker(threading.local):
    number = 0
    generator: torch.Generator | None = None


_WORKER = _Worker()


def worker_number() -> int:
    """Return which of the functions that run at once this thread runs.

    Returns:
        From 0; 0 where there is one.
    """
    return _WORKER.number


def cpu_generator() -> torch.Generator:
    """Return what this thread draws its random numbers from.

    Returns:
        A generator of its own, where several functions run at once; else torch's global one.
    """
    return _WORKER.generator or torch.default_generator


def run_at_once(tasks: Sequence[Callable[[], _Result]], *, draws: bool = False) -> list[_Result]:
    """Call functions at once, the first in this thread, and divide torch's threads among them.

    Args:
        tasks: draw no random numbers but from `cpu_generator`.
        draws: give each a generator, whose seeds are drawn in order from torch's global one; False: they draw none.

    Returns:
        Their results, in order.

    Raises:
        DrewRandomNumbersError: they drew from torch's global one.
        Exception: of the first function that raised, once all have ended.
    """
    if len(tasks) == 1:
        return [tasks[0]()]
    name = f"part, begun by thread {threading.get_ident()}"
    for thread in threading.enumerate():
        if thread.name == name:  # it was left alone when a signal ended an earlier call
            thread.join()
    threads = torch.get_num_threads()
    seeds = torch.randint(2**63 - 1, (len(tasks),), device="cpu").tolist() if draws else [None] * len(tasks)
    random = torch.get_rng_state()
    outcomes: dict[int, tuple[bool, Any]] = {}

    def work(number: int) -> None:
        torch.set_num_threads(max(threads // len(tasks), 1))  # of this thread
        with _as_worker(number, seeds[number]):
            try:
                outcomes[number] = True, tasks[number]()
            except Exception as error:  # it is raised below, when all have ended; Ctrl-C waits for nothing
                outcomes[number] = False, error

    # Daemons: a second Ctrl-C ends the program while they compute.
    others = [threading.Thread(target=work, args=(number,), name=name, daemon=True) for number in range(1, len(tasks))]
    try:
        for thread in others:
            thread.start()
        work(0)
        for thread in others:
            thread.join()
    finally:
        torch.set_num_threads(threads)  # of this thread, and of those that begin later
    for number in range(len(tasks)):
        succeeded, value = outcomes[number]
        if not succeeded:
            raise value
    if not torch.equal(torch.get_rng_state(), random):
        raise DrewRandomNumbersError
    return [outcomes[number][1] for number in range(len(tasks))]


@contextmanager
def _as_worker(number: int, seed: int | None) -> Iterator[None]:
    before = _WORKER.number, _WORKER.generator
    _WORKER.number = number
    _WORKER.generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
    try:
        yield
    finally:
        _WORKER.number, _WORKER.generator = before
