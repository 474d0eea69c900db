"""Take the rows of each optimizer step in an order that depends on (seed, epoch) alone, so that a run resumes exactly.

A step is a set of `global_batch_size` rows, the last of an epoch perhaps fewer; micro-batches are made from the step's
rows afterward, so no choice of memory changes what a step trains on. The position is two integers.

While a step runs, the next one may be laid out in a thread. That is the same function of the same rows, read from what
does not change; it is taken where position and limit are those it was made for, else dropped.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from qlora_trainer.common.background import Ahead
from qlora_trainer.common.errors import CheckpointError, DataError
from qlora_trainer.common.units import counted
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.batching.mixing import Mixture, shuffled
from qlora_trainer.data.batching.packing import Pack, group_rows, laid_out_tokens, make_packs
from qlora_trainer.data.types import Example


class Examples(Protocol):
    """Give rows by index: an ExampleSet, or a plain list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class StepLoader:
    """Give endless steps over `examples`: after an epoch's last step comes the next epoch's first.

    `epoch` and `step` say what `next` gives next; `step` counts from 0 in each epoch. `micro_batch_tokens` may be set
    anew at any time, and holds from the next packs on: it changes no step's rows.

    Args:
        examples: the training rows.
        global_batch_size: rows of a step.
        micro_batch_tokens: the most tokens of a pack, padding counted.
        packing: lay rows end to end; else pad them.
        seed: chooses the order of every epoch.
        mixture: what an epoch takes of each source; None: every row once.
        workers: threads among which the rows of a micro-batch are divided.

    Raises:
        DataError: there are no rows.
    """

    def __init__(
        self,
        examples: Examples,
        global_batch_size: int,
        micro_batch_tokens: int,
        packing: bool,
        seed: int,
        mixture: Mixture | None = None,
        workers: int = 1,
    ) -> None:
        if len(examples) == 0:
            raise DataError("There are no rows to train on.")
        self.examples = examples
        self.global_batch_size = global_batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.packing = packing
        self.seed = seed
        self.mixture = mixture
        self.workers = workers
        self.epoch_rows = len(mixture or examples)
        self.epoch = 0
        self.step = 0
        self._order = self.order(0)
        self._ahead: tuple[tuple[int, int, int], Ahead[list[Pack]]] | None = None  # made for (epoch, step, limit)

    @property
    def steps_per_epoch(self) -> int:
        """Return the optimizer steps of an epoch."""
        return -(-self.epoch_rows // self.global_batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """Order an epoch.

        Args:
            epoch: from 0.

        Returns:
            Which of `examples` each place of the epoch has, (epoch_rows,) int64.
        """
        order = epoch_order(self.epoch_rows, self.seed, epoch)
        return order if self.mixture is None else self.mixture.epoch_rows(self.seed, epoch)[order]

    def rows_of_step(self, order: np.ndarray, step: int) -> np.ndarray:
        """Cut a step out of its epoch.

        Args:
            order: of the epoch, (epoch_rows,).
            step: within the epoch, from 0.

        Returns:
            Which of `examples` the step takes, (rows,) int64.
        """
        return order[step * self.global_batch_size : (step + 1) * self.global_batch_size]

    def next(self) -> list[Pack]:
        """Make the packs of one optimizer step, and move to the step after.

        Returns:
            One pack for each forward pass.
        """
        packs = self.peek()
        self.advance()
        return packs

    def peek(self) -> list[Pack]:
        """Make the packs of the step to come, under the present `micro_batch_tokens`, without moving.

        What `begin_step_after` began for it is taken; where that failed, its exception is raised here.

        Returns:
            One pack for each forward pass.
        """
        if self._ahead is not None and self._ahead[0] == (self.epoch, self.step, self.micro_batch_tokens):
            (_, ahead), self._ahead = self._ahead, None
            return ahead.take()
        return self._packs(self.rows_of_step(self._order, self.step), self.micro_batch_tokens)

    def begin_step_after(self) -> None:
        """Begin to make the packs of the step after the one to come, in a thread, without moving."""
        epoch, step = self._after()
        key = epoch, step, self.micro_batch_tokens
        if self._ahead is None or self._ahead[0] != key:
            order = self._order if epoch == self.epoch else None  # read here, as the loader moves on meanwhile
            self._ahead = key, Ahead(self._packs_at, order, *key)

    def advance(self) -> None:
        """Move to the step after."""
        epoch, step = self._after()
        if epoch == self.epoch:
            self.step = step
        else:
            self._move_to(epoch, step)

    def largest_pack(self, lengths: np.ndarray, steps: int) -> Pack:
        """Make the pack that has the most tokens, padding counted, in the steps to come, without moving.

        Args:
            lengths: tokens of each row of `examples`, (rows,): every step is laid out by these alone, which takes some
                30 microseconds.
            steps: how many steps to look at.

        Returns:
            The largest of all their packs.
        """
        largest, most = self._order[:0], 0
        epoch, step, order = self.epoch, self.step, self._order
        for _ in range(steps):
            rows = self.rows_of_step(order, step)
            row_lengths = lengths[rows].tolist()
            for group in group_rows(row_lengths, self.micro_batch_tokens, self.packing):
                tokens = laid_out_tokens([row_lengths[index] for index in group], self.packing)
                if tokens > most:
                    largest, most = rows[group], tokens
            step += 1
            if step == self.steps_per_epoch:
                epoch, step = epoch + 1, 0
                order = self.order(epoch)
        (pack,) = self._packs(largest, most)
        return pack

    def state_dict(self) -> dict[str, int]:
        """Return the position, and what it depends on.

        Returns:
            Integers by name.
        """
        return {
            "epoch": self.epoch,
            "step": self.step,
            "rows": self.epoch_rows,
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from where `state` was taken.

        Args:
            state: from `state_dict`.

        Raises:
            CheckpointError: the rows, batch size or seed are others now, so the order would be another too.
        """
        own = self.state_dict()
        if state.keys() != own.keys():
            raise CheckpointError(f"The data position holds {sorted(state)}, and should hold {sorted(own)}.")
        changed = [
            f"{name} was {state[name]} and is {own[name]}"
            for name in ("rows", "global_batch_size", "seed")
            if state[name] != own[name]
        ]
        if changed:
            raise CheckpointError(
                f"The checkpoint's data position does not fit this run: {', '.join(changed)}. "
                "Resume with the data and settings that the run began with."
            )
        if not (0 <= state["step"] < self.steps_per_epoch and state["epoch"] >= 0):
            raise CheckpointError(
                f"The data position says step {state['step']} of epoch {state['epoch']}, but an epoch has "
                f"{counted(self.steps_per_epoch, 'step')}."
            )
        self._move_to(state["epoch"], state["step"])

    def _after(self) -> tuple[int, int]:
        """Return epoch and step of the step after the one to come."""
        return (self.epoch, self.step + 1) if self.step + 1 < self.steps_per_epoch else (self.epoch + 1, 0)

    def _packs_at(self, order: np.ndarray | None, epoch: int, step: int, micro_batch_tokens: int) -> list[Pack]:
        order = self.order(epoch) if order is None else order
        return self._packs(self.rows_of_step(order, step), micro_batch_tokens)

    def _packs(self, rows: np.ndarray, micro_batch_tokens: int) -> list[Pack]:
        return make_packs([self.examples[int(row)] for row in rows], micro_batch_tokens, self.packing, self.workers)

    def _move_to(self, epoch: int, step: int) -> None:
        self._order = self.order(epoch)
        self.epoch, self.step = epoch, step


def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """Shuffle an epoch.

    Args:
        rows: how many rows an epoch has.
        seed: of the run.
        epoch: from 0.

    Returns:
        A permutation, (rows,) int64.
    """
    return shuffled(rows, [seed, epoch])


def micro_batch_tokens(config: RunConfig) -> int:
    """Return the most tokens of one forward pass; auto is the longest row allowed.

    Args:
        config: of the run.

    Returns:
        Tokens.
    """
    limit = config.training.micro_batch_tokens
    return config.data.max_length if limit == "auto" else limit
