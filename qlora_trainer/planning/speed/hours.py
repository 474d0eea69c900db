"""Estimate how long a run takes: its steps, evaluation, samples and checkpoints, each by its cost.

After the first steps of a run the time left is what they took; until then it is this. Left out: loading the base, and
preparing the rows.
"""

from dataclasses import dataclass

import numpy as np

from qlora_trainer.common.units import counted, duration
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning.speed.candidates import Pace
from qlora_trainer.planning.speed.cost import UPDATE_BYTES, forward_seconds, step_seconds
from qlora_trainer.planning.speed.rates import PACKED_BYTES
from qlora_trainer.planning.speed.rows import Steps
from qlora_trainer.planning.speed.shape import Shape
from qlora_trainer.training.generation import TOGETHER
from qlora_trainer.training.memory.activations import Policy

DISK = 200e6  # bytes a second that a checkpoint is written, read back and hashed with; not measured
TIMES_SAMPLED = 2  # before and after training
# A token of an answer asks about as much of the host as a forward of training does (python -m benchmarks.host_overhead
# counts both). On a CPU that is lost in what else a token takes: SmolLM2-135M on one thread of a Zen 5 processor (30
# November 2026), seconds of the processor a token: 0.14 for one answer, 0.17 for 4 at once, 0.26 for 16; by this
# formula 0.15, 0.18 and 0.28.
CPU_FEW_TOKENS = 6.0  # times as long products of so few tokens take as those of many


@dataclass(frozen=True)
class Hours:
    """Hold the estimated seconds of what a run does."""

    count: int  # steps to come
    steps: float
    evaluation: float
    samples: float
    checkpoints: float

    @property
    def total(self) -> float:
        """Return the sum.

        Returns:
            Seconds.
        """
        return self.steps + self.evaluation + self.samples + self.checkpoints

    def __str__(self) -> str:
        others = {"evaluation": self.evaluation, "samples": self.samples, "checkpoints": self.checkpoints}
        parts = [f"{counted(self.count, 'step')} {duration(self.steps)}"]
        parts += [f"{name} {duration(seconds)}" for name, seconds in others.items() if seconds >= 0.5]
        return f"about {duration(self.total)}, estimated ({', '.join(parts)})"


def run_hours(
    shape: Shape, pace: Pace, policy: Policy, micro_batch_tokens: int, config: RunConfig, taken: int = 0
) -> Hours | None:
    """Estimate how long a run, or what is left of it, takes.

    Args:
        shape: of the model and its adapters.
        pace: device and rows.
        policy: what backward keeps.
        micro_batch_tokens: most tokens of a micro-batch.
        config: of the run.
        taken: steps that were taken already.

    Returns:
        The estimate; None where no rows are known, or the device's figures are not.
    """
    steps, rates = pace.steps, pace.rates
    if steps.count is None or not rates.is_known:
        return None
    of_a_step = step_seconds(shape, rates, policy, pace.layout(micro_batch_tokens), steps.trained).step
    evaluation = 0.0
    if steps.eval_lengths:
        rows = Steps((steps.eval_lengths,), max(steps.eval_lengths), steps.packing)
        once = forward_seconds(shape, rates, pace.layout(micro_batch_tokens, rows), steps.trained)
        evaluation = once * _times(config.training.evaluate_every, taken, steps.count)
    saved = _times(config.training.save_every, taken, steps.count) + (taken == 0)
    left = max(steps.count - taken, 0)
    return Hours(
        count=left,
        steps=left * of_a_step,
        evaluation=evaluation,
        samples=(TIMES_SAMPLED - (taken > 0)) * _answers(shape, pace, config),
        checkpoints=saved * UPDATE_BYTES * shape.adapters / DISK,
    )


def _times(every: int, taken: int, count: int) -> int:
    """Count the steps to come after which something is done: after every so many, and after the last."""
    return count // every - taken // every + (count % every > 0) if taken < count else 0


def _answers(shape: Shape, pace: Pace, config: RunConfig) -> float:
    """Estimate the seconds of generating the samples of a run once: prompts, then a token of each after the other.

    Each answer is taken to be as long as it may be, and a prompt to be the part of a row that has no label.
    """
    samples, rates = config.evaluation.samples, pace.rates
    if not samples:
        return 0.0
    lengths = pace.steps.eval_lengths or [length for rows in pace.steps.rows for length in rows]
    prompt = round((1 - pace.steps.trained) * sum(lengths) / len(lengths))
    batches = -(-samples // TOGETHER)
    together = -(-samples // batches)
    rows = Steps(((prompt,) * together,), together * prompt, packing=True)
    prompts = forward_seconds(shape, rates, pace.layout(together * prompt, rows), 0.0) if prompt else 0.0
    products = 2 * together * (shape.active + shape.head) / rates.products
    head = shape.head * shape.itemsize / rates.bandwidth
    if rates.overlaps:  # weights are read as they are stored, and multiplied by
        of_a_token = max(products + head + shape.stored * PACKED_BYTES / rates.bandwidth, shape.layers * rates.host[0])
    else:
        device = CPU_FEW_TOKENS * products + head + shape.stored * rates.expansion
        of_a_token = device / float(rates.speedup(np.array(rates.threads)))
    return batches * (prompts + of_a_token * config.evaluation.max_new_tokens)
