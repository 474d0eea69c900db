"""List the ways in which a run can take its steps, in the order of their time.

The list depends on model, config, row lengths and device alone, not on how much memory is free. Left out: which of them
fit (planning/fit.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning.speed.cost import step_seconds
from qlora_trainer.planning.speed.rates import Rates
from qlora_trainer.planning.speed.rows import MicroBatches, Steps, ladder, micro_batches_of
from qlora_trainer.planning.speed.shape import Shape
from qlora_trainer.training.memory.activations import LEVELS, MOST_BETWEEN_OFFLOADED, Policy, choose_policy

PARTS_KEPT = 8  # of the layers: an eighth more or less of them is a candidate of its own


@dataclass(frozen=True)
class Candidate:
    """Hold a way to take the steps of a run."""

    policy: Policy
    micro_batch_tokens: int  # most tokens of a micro-batch
    seconds: float  # of a step, by the formula
    waiting: float = 0.0  # of these, the seconds in which the device waits for the host

    def __str__(self) -> str:
        return f"{self.policy}, micro-batches of up to {self.micro_batch_tokens:,} tokens"


@dataclass(frozen=True)
class Pace:
    """Hold what the time of a step depends on, next to the model: the device and the rows."""

    rates: Rates
    steps: Steps
    note: str = ""  # on the rows
    names_faster: bool = True  # where the config sets a policy or size itself, what would be faster is looked for
    workers: int = 1  # on a CPU, most parts of a micro-batch that run at once

    def layout(self, limit: int, steps: Steps | None = None) -> MicroBatches:
        """Lay steps out in micro-batches, as this device runs them.

        Args:
            limit: most tokens of a micro-batch.
            steps: other ones than the run's.

        Returns:
            The micro-batches.
        """
        return micro_batches_of(steps or self.steps, limit, self.workers, self.rates.threads)


def open_policies(layers: int) -> list[Policy]:
    """List the policies that auto chooses from.

    Args:
        layers: of the model.

    Returns:
        None, full but for some of the last layers, full, and offload and tiled with one input in 1 to 3 on the host.
    """
    kept = sorted({round(part * layers / PARTS_KEPT) for part in range(1, PARTS_KEPT)} - {0, layers}, reverse=True)
    every = range(1, MOST_BETWEEN_OFFLOADED + 1)
    return [
        Policy("none"),
        *(Policy("full", uncheckpointed_layers=count) for count in kept),
        Policy("full"),
        *(Policy("offload", offload_every_n_layers=n) for n in every),
        *(Policy("tiled", offload_every_n_layers=n) for n in every),
    ]


def candidates(shape: Shape, pace: Pace, policies: Sequence[Policy], limits: Sequence[int]) -> list[Candidate]:
    """Put ways to take a run's steps in the order of their time.

    Args:
        shape: of the model and its adapters.
        pace: device and rows.
        policies: to choose from.
        limits: most tokens of a micro-batch, to choose from.

    Returns:
        The fastest first; of equal ones the one that keeps more, then the smaller micro-batch.
    """
    found = []
    for limit in limits:
        layout = pace.layout(limit)
        for policy in policies:
            seconds = step_seconds(shape, pace.rates, policy, layout, pace.steps.trained)
            found.append(Candidate(policy, limit, seconds.step, seconds.waiting))
    return sorted(found, key=lambda one: (one.seconds, *_rank(one.policy), one.micro_batch_tokens))


def choices_left(config: RunConfig, pace: Pace, layers: int) -> tuple[list[Policy], list[int]]:
    """List the policies and sizes of a micro-batch that a config leaves open.

    Args:
        config: of the run.
        pace: device and rows.
        layers: of the model.

    Returns:
        (policies, limits); one of each that the config sets.
    """
    settings = config.training
    is_open = settings.activation_checkpointing == "auto"
    device = torch.device("cpu")  # any: the policy is set
    policies = open_policies(layers) if is_open else [choose_policy(settings, device)]
    if settings.micro_batch_tokens != "auto":
        return policies, [settings.micro_batch_tokens]
    longest = config.data.max_length
    return policies, ladder(longest, pace.steps) if pace.rates.is_known else [longest]


def keeps_less(one: Policy, than: Policy) -> bool:
    """Return True if backward keeps less under a policy: a level further, or fewer layers whole.

    Args:
        one: the policy.
        than: another.

    Returns:
        True if it does.
    """
    levels = LEVELS.index(one.level), LEVELS.index(than.level)
    return levels[0] > levels[1] or (levels[0] == levels[1] and one.uncheckpointed_layers < than.uncheckpointed_layers)


def _rank(policy: Policy) -> tuple[int, int, int]:
    return LEVELS.index(policy.level), -policy.uncheckpointed_layers, policy.offload_every_n_layers
