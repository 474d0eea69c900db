"""Save tensors for backward, and show autograd only what it needs: for the functions of this package.

A layer that is run again in backward keeps other things instead of its tensors (see `KeptBy`). Autograd's own hooks
would do it for these functions too, with an operation for each tensor, and only once a function ends: what is handed
over by `keep` is there at once, so a layer that ends with a large product does not make it again.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora_kernels.torch_internals import release_saved_tensors

Saved = tuple[Tensor | None, ...]
Put = Callable[[Saved], Any]
Give = Callable[[Any], Saved]


class _Instead(threading.local):
    """Hold what this thread keeps in the place of tensors, as backward of a card runs in a thread of its own."""

    put: Put | None = None
    give: Give | None = None


_INSTEAD = _Instead()


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


class KeptBy:
    """Keep something else in the place of the tensors that functions of this package save in the block.

    Args:
        put: is called with the tensors of one function, in the order in which they would be saved, and returns what is
            kept; it may raise to end the work.
        give: is called in backward with what was kept, and returns the tensors.
    """

    def __init__(self, put: Put, give: Give) -> None:
        self._put, self._give = put, give

    def __enter__(self) -> None:
        self._before = _INSTEAD.put, _INSTEAD.give
        _INSTEAD.put, _INSTEAD.give = self._put, self._give

    def __exit__(self, *_: object) -> None:
        _INSTEAD.put, _INSTEAD.give = self._before


def saves_tensors() -> bool:
    """Return True where `keep` saves tensors, False where something else is kept in their place.

    Returns:
        True outside of `KeptBy`.
    """
    return _INSTEAD.put is None


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for backward, from a function's forward; once in each.

    Args:
        ctx: of the function.
        *tensors: to be saved.
    """
    put = _INSTEAD.put
    if put is None:
        ctx.save_for_backward(*tensors)
        return
    ctx.kept, ctx.give = put(tensors), _INSTEAD.give


def fetch(ctx: Any) -> Saved:
    """Return what `keep` saved, and let go of it, unless the graph is to be used again.

    Args:
        ctx: of the function, in its backward.

    Returns:
        The tensors.
    """
    give = getattr(ctx, "give", None)
    if give is not None:
        return give(ctx.kept)
    tensors = ctx.saved_tensors
    release_saved_tensors(ctx)
    return tensors
