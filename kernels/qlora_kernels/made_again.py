"""Note on a tensor how it was made, so that backward may make it again from something that is kept anyway.

The output of a norm would be kept by the layers over it, and takes as much as the norm's input, which the norm keeps.
So a norm notes on its output how that was made, and those layers keep the input and make the output again: a pass over
the values, next to products that take a hundred times as long. The same operation on the same values gives the same
bits, and autograd refuses a kept input that was written to.

Nothing is noted where something else is kept in the place of tensors, as in a layer that is run again: it makes the
output anyway. Left out: what notes (rms_norm.py), and what asks (lora_linear.py).
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from qlora_kernels.saved_tensors import saves_tensors
from qlora_kernels.torch_internals import version_of

_NAME = "_qlora_made_from"  # of an attribute of tensors


class Making(NamedTuple):
    """Hold what a tensor was made of, and by what."""

    source: Tensor  # of any shape
    make: Callable[[Tensor], Tensor]  # of the source
    version: int  # of the tensor, when it was made


def note_making(tensor: Tensor, source: Tensor, make: Callable[[Tensor], Tensor]) -> None:
    """Note how a tensor was made; it holds its source from then on.

    Args:
        tensor: of any shape.
        source: of any shape, kept for backward anyway.
        make: gives the tensor from the source, bit for bit and without gradients; holds nothing that takes memory.
    """
    setattr(tensor, _NAME, Making(source, make, version_of(tensor)))


def making_of(tensor: Tensor) -> Making | None:
    """Return how a tensor was made.

    Args:
        tensor: of any shape.

    Returns:
        What was noted; None where nothing was, or the tensor was written to since, or no tensors are to be saved.
    """
    making: Making | None = getattr(tensor, _NAME, None)
    return making if making is not None and making.version == version_of(tensor) and saves_tensors() else None
