"""Give each step its learning rate: linear warmup, then cosine, linear or constant."""

import math

from qlora_trainer.config.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Compute the learning rate of a step.

    Over the first W = ceil(warmup_ratio * total_steps) steps it rises linearly, from peak/W at step 0 to the peak at
    step W-1. Then it starts at the peak again and falls to 0 as a half cosine or a line, or stays; 0 would be reached
    at step `total_steps`, one after the last, so that no step is wasted.

    Args:
        config: the config's section `optimizer`.
        step: 0-based index of the optimizer step.
        total_steps: of the run.

    Returns:
        The learning rate.
    """
    assert 0 <= step < total_steps, f"step {step} of {total_steps}"
    warmup = math.ceil(config.warmup_ratio * total_steps - 1e-9)  # 0.07 * 100 is 7.000000000000001
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / (total_steps - warmup)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
    if config.schedule == "linear":
        return config.learning_rate * (1.0 - done)
    return config.learning_rate
