"""The rows of each optimizer step, in an order that is a pure function of (seed, epoch), so a run resumes exactly.

A step is a set of `batch_size` rows, the last of an epoch maybe fewer; micro-batches are made from the step's rows
afterwards, so no choice of memory changes what a step learns from. The cursor is two integers.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from qlora_trainer.data.packing import Example, Pack, make_packs
from qlora_trainer.errors import CheckpointError, DataError


class Examples(Protocol):
    """What rows are taken from: an ExampleSet, or a plain list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class StepLoader:
    """Endless steps over `examples`: after an epoch's last step comes the next epoch's first.

    `epoch` and `step` say what `next` gives next; `step` counts from 0 in each epoch.
    """

    def __init__(self, examples: Examples, batch_size: int, micro_batch_tokens: int, packing: bool, seed: int) -> None:
        if len(examples) == 0:
            raise DataError("There are no rows to train on.")
        self.examples = examples
        self.batch_size = batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.packing = packing
        self.seed = seed
        self.epoch = 0
        self.step = 0
        self._order = epoch_order(len(examples), seed, 0)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def next(self) -> list[Pack]:
        """The packs of one optimizer step; moves the cursor."""
        rows = self._order[self.step * self.batch_size : (self.step + 1) * self.batch_size]
        packs = make_packs([self.examples[int(row)] for row in rows], self.micro_batch_tokens, self.packing)
        self.step += 1
        if self.step == self.steps_per_epoch:
            self._move_to(self.epoch + 1, 0)
        return packs

    def state_dict(self) -> dict[str, int]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "rows": len(self.examples),
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to where `state` was taken.

        Raises:
            CheckpointError: the rows, batch size or seed are others now, so the order would be another too.
        """
        own = self.state_dict()
        if state.keys() != own.keys():
            raise CheckpointError(f"The data position holds {sorted(state)}, and should hold {sorted(own)}.")
        changed = [
            f"{name} was {state[name]} and is {own[name]}"
            for name in ("rows", "batch_size", "seed")
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
                f"{self.steps_per_epoch} steps."
            )
        self._move_to(state["epoch"], state["step"])

    def _move_to(self, epoch: int, step: int) -> None:
        self._order = epoch_order(len(self.examples), self.seed, epoch)
        self.epoch, self.step = epoch, step


def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of an epoch, (rows,) int64.

    Sorted raw random bits: numpy promises that these stay the same from version to version, which it does not promise
    of its own `permutation`, nor torch of `randperm`.
    """
    bits = np.random.PCG64([seed, epoch]).random_raw(rows)
    return np.argsort(bits, kind="stable")
