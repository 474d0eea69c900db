"""Save tensors for backward early, and show autograd only what it needs: for the functions of this package."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_kernels.torch_internals import release_saved_tensors


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


class Kept(NamedTuple):
    """Hold what `keep` saved: the node's output, as up to torch 2.11 the node lets go of what it saved with it."""

    output: Tensor  # (0,)


def keep(*tensors: Tensor | None) -> Kept:
    """Save tensors for backward now, inside a function's forward, instead of when it ends.

    Args:
        *tensors: to be saved.

    Returns:
        What `fetch` takes.
    """
    with torch.enable_grad():
        return Kept(_Saved.apply(torch.empty(0, requires_grad=True), *tensors))


def fetch(kept: Kept) -> tuple[Tensor | None, ...]:
    """Return what `keep` saved, and let go of it, unless the graph is to be used again.

    Args:
        kept: as `keep` gives it.

    Returns:
        The tensors.
    """
    node: Any = kept.output.grad_fn
    tensors = node.saved_tensors
    release_saved_tensors(node)
    return tensors


class _Saved(torch.autograd.Function):
    """Make a node that holds saved tensors, seen by hooks of saved tensors, and is never a part of the graph."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)
