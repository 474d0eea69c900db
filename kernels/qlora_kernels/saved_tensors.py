"""Save tensors for backward, and show autograd only what it needs: for the functions of this package.

A function that is run again in backward only to have its saved tensors is ended as soon as the last is there (see
`collected_by`). So `keep` hands them over at once then, where autograd would take them when the function ends: a layer
that ends with a large product does not make it again.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qlora_kernels.torch_internals import release_saved_tensors


class _Collecting(threading.local):
    """Hold what takes tensors in this thread, as backward of a card runs in a thread of its own."""

    take: Callable[[Tensor], object] | None = None


_COLLECTING = _Collecting()


def visible(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return tensors as a function may show them to autograd: under no_grad as if none required a gradient.

    Without this a function under no_grad would see that its parameters need a gradient, and save tensors for it.

    Args:
        *tensors: a function's inputs.

    Returns:
        They, or they detached.
    """
    if torch.is_grad_enabled():
        return tensors
    return tuple(None if tensor is None else tensor.detach() for tensor in tensors)


@contextmanager
def collected_by(take: Callable[[Tensor], object]) -> Iterator[None]:
    """Give what `keep` is given in the block to a function, at once, and save nothing.

    Args:
        take: is called with each tensor, in the order in which they would be saved; it may raise to end the work.
    """
    before, _COLLECTING.take = _COLLECTING.take, take
    try:
        yield
    finally:
        _COLLECTING.take = before


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for backward, from a function's forward; once in each.

    Args:
        ctx: of the function.
        *tensors: to be saved.
    """
    if _COLLECTING.take is None:
        ctx.save_for_backward(*tensors)
        return
    for tensor in tensors:
        if tensor is not None:
            _COLLECTING.take(tensor)


def fetch(ctx: Any) -> tuple[Tensor | None, ...]:
    """Return what `keep` saved, and let go of it, unless the graph is to be used again.

    Args:
        ctx: of the function, in its backward.

    Returns:
        The tensors.
    """
    tensors = ctx.saved_tensors
    release_saved_tensors(ctx)
    return tensors
