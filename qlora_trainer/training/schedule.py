"""Give each step its learning rate: a linear warmup, then the peak, and a fall of the schedule's shape or none."""

import math

from qlora_trainer.config.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Compute the learning rate of a step.

    Over the first W = ceil(warmup_ratio * total_steps) steps it rises linearly, from peak/W at step 0 to the peak at
    step W-1. Then it starts at the peak again and falls by the schedule's shape to minimum_ratio of it, or stays; of
    warmup_stable_decay it stays until the last ceil(decay_ratio * total_steps) steps. The end of the fall would be
    reached at step `total_steps`, one after the last, so that no step is wasted.

    Args:
        config: the config's section `optimizer`.
        step: 0-based index of the optimizer step.
        total_steps: of the run.

    Returns:
        The learning rate.
    """
    assert 0 <= step < total_steps, f"step {step} of {total_steps}"
    warmup = _share(config.warmup_ratio, total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    shape: str = config.schedule
    start = warmup
    if config.schedule == "warmup_stable_decay":
        shape, start = config.decay_shape, max(warmup, total_steps - _share(config.decay_ratio, total_steps))
    left = _left(shape, max(0, step - start) / (total_steps - start), config.polynomial_power)
    return config.learning_rate * (config.minimum_ratio + (1.0 - config.minimum_ratio) * left)


def _share(ratio: float, total_steps: int) -> int:
    return math.ceil(ratio * total_steps - 1e-9)  # 0.07 * 100 is 7.000000000000001


def _left(shape: str, done: float, power: float) -> float:
    """Return how much of the fall is still to come, 1 to 0, when so much of its steps is done, 0 to 1."""
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    if shape == "1-sqrt":
        return 1.0 - math.sqrt(done)
    return float((1.0 - done) ** (power if shape == "polynomial" else 1.0))
