"""Put a model into evaluation mode within a block."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Turn dropout off within the block, and give the model its own mode back after it, also when the block raises.

    Args:
        model: of which all modules are in one mode, as `train` and `eval` leave them.
    """
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
