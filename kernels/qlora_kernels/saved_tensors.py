"""Save tensors for backward early, and show autograd only what it needs: for the autograd functions of this package."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_kernels.torch_internals import release_saved_tensors


def visible(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors as a function may show them to autograd: where no gradient is asked for, as if none required one.

    Without this a function under no_grad would be reported that its parameters need a gradient, and `none` for it.
    """
    if torch.is_grad_enabled():
        return tensors
    return tuple(None if tensor is None else tensor.detach() for tensor in tensors)


class Kept(NamedTuple):
    """What `none` saved: the node's output, as up to torch 2.11 the node ends with it and lets go of what it saved."""

    output: Tensor  # (0,)


def keep(*tensors: Tensor | None) -> Kept:
    """Save tensors for backward now, inside a function's forward, instead of when it ends; `fetch` gives them back."""
    with torch.enable_grad():
        return Kept(_Saved.apply(torch.empty(0, requires_grad=True), *tensors))


def fetch(kept: Kept) -> tuple[Tensor | None, ...]:
    """What `none` saved; freed from there, unless the graph is to be used again."""
    node: Any = kept.output.grad_fn
    tensors = node.saved_tensors
    release_saved_tensors(node)
    return tensors


class _Saved(torch.autograd.Function):
    """Never a part of the graph: a node that holds saved tensors, seen by whoever hooks saved tensors."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)
