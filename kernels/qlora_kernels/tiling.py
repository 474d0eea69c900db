"""Apply a function of each token by itself to a tile of tokens at a time, forward and backward.

What it computes inside, and what backward needs of that, then exists for one tile only: of an MLP, which is three to
four times as wide as the model, that is most of the memory of a long context. Backward runs each tile forward again (as
"tiled MLP" of Arctic Long Sequence Training, arXiv:2506.13996, does). Parameters inside get their gradients in `.grad`,
tile by tile.

The same values come out, up to the last bits in which matrix products of other sizes differ. Random numbers are drawn
tile by tile, and again in backward from the state that forward began with, so a dropout mask is the same both times but
not that of one draw for all tokens.

Left out: choosing the size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.random_state import RandomState
from qlora_kernels.saved_tensors import fetch, keep


def tiled(
    function: Callable[[Tensor], Tensor],  # (n, I) -> (n, O), each row by itself
    x: Tensor,  # (..., I)
    tile_tokens: int,
) -> Tensor:  # (..., O)
    """Compute function(x), with what lies between x and the result only for `tile_tokens` rows at a time.

    Args:
        function: of each row by itself.
        x: the tokens.
        tile_tokens: rows of a tile.

    Returns:
        The result.
    """
    return _Tiled.apply(torch.empty(0, requires_grad=True), x, function, tile_tokens)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,  # makes a graph where x needs no gradient but a parameter inside does
        x: Tensor,
        function: Callable[[Tensor], Tensor],
        tile_tokens: int,
    ) -> Tensor:
        if ctx.needs_input_grad[0]:
            keep(ctx, x)
        ctx.function, ctx.tile_tokens, ctx.random = function, tile_tokens, RandomState(x)
        rows, output = x.reshape(-1, x.shape[-1]), None
        for part in _tiles(rows, tile_tokens):
            result = function(rows[part])
            if output is None:
                output = result.new_empty(len(rows), result.shape[-1])
            output[part] = result
        assert output is not None
        return output.view(*x.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # grad: (..., O)
        (x,) = fetch(ctx)
        assert x is not None
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        needs_x = ctx.needs_input_grad[1]
        grad_x = torch.empty_like(rows) if needs_x else None
        with ctx.random.restored():
            for part in _tiles(rows, ctx.tile_tokens):
                with torch.enable_grad():
                    tile = rows[part].detach().requires_grad_(needs_x)
                    result = ctx.function(tile)
                if result.requires_grad:
                    torch.autograd.backward(result, grads[part])
                del result
                if grad_x is not None:
                    assert tile.grad is not None
                    grad_x[part] = tile.grad
        return None, None if grad_x is None else grad_x.view(x.shape), None, None


def _tiles(rows: Tensor, tile_tokens: int) -> list[slice]:
    """Cut the rows into tiles; at least one, so that an empty input goes through the function too."""
    return [slice(start, start + tile_tokens) for start in range(0, max(len(rows), 1), tile_tokens)]
