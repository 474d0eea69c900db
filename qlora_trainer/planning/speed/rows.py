"""Lay the rows of a run's steps out in micro-batches of every size that is considered, by their lengths alone.

Left out: how long a micro-batch takes (cost.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qlora_trainer.data.batching.loader import StepLoader
from qlora_trainer.data.batching.packing import divide_rows, group_rows, laid_out_tokens

STEPS_LOOKED_AT = 64  # of the first epoch, evenly; to lay out one takes some 50 microseconds
TOKENS_APART = 64  # of the last size; a CPU multiplies numbers of tokens in steps of so many


@dataclass(frozen=True)
class Steps:
    """Hold the lengths of the rows of some of a run's steps, and what is known of all of them."""

    rows: tuple[tuple[int, ...], ...]  # tokens of each row, by step
    largest: int  # tokens of the largest step of the run, padding counted
    packing: bool
    count: int | None = None  # steps of the run; None: no rows are known, and these are rows of full length
    trained: float = 1.0  # share of the tokens that has a label
    eval_lengths: tuple[int, ...] = ()  # tokens of each eval row

    @property
    def tokens(self) -> float:
        """Return the tokens of a step, on average.

        Returns:
            Tokens without padding.
        """
        return sum(map(sum, self.rows)) / len(self.rows)


def full_rows(length: int, global_batch_size: int, packing: bool) -> Steps:
    """Make steps of rows of full length, where no rows are known.

    Args:
        length: tokens of a row.
        global_batch_size: rows of a step.
        packing: rows are packed; else padded.

    Returns:
        One step.
    """
    return Steps(((length,) * global_batch_size,), length * global_batch_size, packing)


def steps_of(
    loader: StepLoader,
    lengths: np.ndarray,  # (rows,) tokens of each training row
    count: int,
    trained: float = 1.0,
    eval_lengths: Sequence[int] = (),
) -> Steps:
    """Look at the steps of a run, and find its largest among all of them.

    Args:
        loader: at the first step or later; it is not moved.
        lengths: of the rows that the loader takes from.
        count: steps of the run.
        trained: share of the tokens that has a label.
        eval_lengths: tokens of each eval row.

    Returns:
        The steps.
    """
    in_epoch = min(loader.steps_per_epoch, count)
    order, every = loader.order(0), -(-in_epoch // STEPS_LOOKED_AT)
    looked_at = tuple(tuple(lengths[loader.rows_of_step(order, step)].tolist()) for step in range(0, in_epoch, every))
    largest = max(
        int(laid_out_tokens(lengths[rows], loader.packing)) for rows in _all_steps(loader, count) if len(rows)
    )
    return Steps(looked_at, largest, loader.packing, count, trained, tuple(eval_lengths))


def _all_steps(loader: StepLoader, count: int) -> Iterator[np.ndarray]:
    """Yield the rows of each step of the run."""
    epoch = 0
    while count > 0:
        order = loader.order(epoch)
        for step in range(min(loader.steps_per_epoch, count)):
            yield loader.rows_of_step(order, step)
        count -= loader.steps_per_epoch
        epoch += 1


def ladder(longest: int, steps: Steps) -> list[int]:
    """List the sizes of a micro-batch that are considered.

    They are few, so that a little more or less free memory rarely changes the choice: the longest row times 1, 2, 3, 4,
    6, 8, 12, 16 and so on, up to the largest step, which ends the list.

    Args:
        longest: tokens of the longest row that the config allows.
        steps: of the run.

    Returns:
        Most tokens of a micro-batch, rising.
    """
    found, power = [longest], 2
    while found[-1] < steps.largest:
        found += [longest * power, longest * power * 3 // 2]
        power *= 2
    found = sorted({size for size in found if size < steps.largest} | {longest})
    if steps.largest > longest:
        grain = TOKENS_APART if steps.packing else longest  # padded rows all take as much as the longest
        found.append(-(-steps.largest // grain) * grain)
    return found


@dataclass(frozen=True)
class MicroBatches:
    """Hold the micro-batches of some steps: tokens, padding counted, and squares of the lengths that attend.

    Of a micro-batch whose parts run at once, these are the part that takes longest.
    """

    tokens: np.ndarray  # (micro-batches,)
    squares: np.ndarray  # (micro-batches,) sum over rows of tokens squared
    threads: np.ndarray  # (micro-batches,) of the processor, that work on it, or on each of its parts
    steps: int


def micro_batches_of(steps: Steps, limit: int, workers: int = 1, threads: int = 1) -> MicroBatches:
    """Lay steps out in micro-batches.

    Args:
        steps: of the run.
        limit: most tokens of a micro-batch.
        workers: most parts of a micro-batch that run at once.
        threads: of the processor.

    Returns:
        The micro-batches.
    """
    found = []
    for lengths in steps.rows:
        for group in group_rows(lengths, limit, steps.packing):
            rows = [lengths[index] for index in group]
            parts = [[rows[index] for index in part] for part in divide_rows(rows, steps.packing, workers)]
            largest = max(parts, key=lambda part: laid_out_tokens(part, steps.packing))
            longest = max(largest)
            squares = sum((row if steps.packing else longest) ** 2 for row in largest)
            found.append((laid_out_tokens(largest, steps.packing), squares, max(threads // len(parts), 1)))
    tokens, squares, share = np.array(found, float).T
    return MicroBatches(tokens, squares, share, len(steps.rows))
