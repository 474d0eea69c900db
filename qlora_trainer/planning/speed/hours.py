"""Estimate how long a run takes: its steps, evaluation, samples and checkpoints, each by its cost.

After the first steps of a run the time left is what they took; until then it is this. Left out: loading the base, and
preparing the rows.
"""

from dataclasses import dataclass

from qlora_trainer.common.units import counted, duration
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning.speed.candidates import Pace
from qlora_trainer.planning.speed.cost import UPDATE_BYTES, forward_seconds, step_seconds
from qlora_trainer.planning.speed.rates import Rates
from qlora_trainer.planning.speed.rows import Steps
from qlora_trainer.planning.speed.shape import Shape
from qlora_trainer.training.memory.activations import Policy

DISK = 200e6  # bytes a second that a checkpoint is written, read back and hashed with; not measured
TIMES_SAMPLED = 2  # before and after training


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
    left = max(steps.count - taken, 0)
    of_a_step = step_seconds(shape, rates, policy, pace.layout(micro_batch_tokens), steps.trained).step
    evaluation = 0.0
    if steps.eval_lengths:
        rows = Steps((steps.eval_lengths,), max(steps.eval_lengths), steps.packing)
        once = forward_seconds(shape, rates, pace.layout(micro_batch_tokens, rows), steps.trained)
        evaluation = once * -(-left // config.training.evaluate_every)
    saved = -(-left // config.training.save_every) + (taken == 0)
    return Hours(
        count=left,
        steps=left * of_a_step,
        evaluation=evaluation,
        samples=(TIMES_SAMPLED - (taken > 0)) * _answers(shape, rates, config),
        checkpoints=saved * UPDATE_BYTES * shape.adapters / DISK,
    )


def _answers(shape: Shape, rates: Rates, config: RunConfig) -> float:
    """Estimate the seconds of generating the samples of a run, all at once, a token of each after the other."""
    if not config.evaluation.samples:
        return 0.0
    device = shape.stored * rates.expansion + shape.head * shape.itemsize / rates.bandwidth
    device += 2 * config.evaluation.samples * (shape.active + shape.head) / rates.products
    host = shape.layers * rates.host[0]
    of_a_token = max(device, host) if rates.overlaps else device + host
    return of_a_token * config.evaluation.max_new_tokens
