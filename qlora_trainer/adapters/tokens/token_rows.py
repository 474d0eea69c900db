"""Put rows that train in the place of rows that an embedding looked up, with a gradient that repeats.

Legend: B rows, T tokens, R rows that train, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TOKENS_AT_ONCE = 1024  # of the gradient, which are cast to fp32 together


def put_rows_over(
    rows: Tensor,  # (B, T, H), without a gradient; written over
    values: Tensor,  # (R, H)
    index: Tensor,  # (B, T) int64
    scale: Tensor | float | None = None,
) -> Tensor:  # (B, T, H)
    """Write rows that train over what an embedding has in their places; backward needs these places alone.

    Args:
        rows: of the embedding.
        values: the rows that train.
        index: which of these each token has; below 0: none.
        scale: what the embedding multiplies its rows by, a number, (); None: by nothing.

    Returns:
        The rows, in their dtype.
    """
    return _RowsOver.apply(rows, values, index, scale)


class _RowsOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, values: Tensor, index: Tensor, scale: Tensor | float | None) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape, ctx.dtype, ctx.scale = values.shape, values.dtype, scale
        ctx.mark_dirty(rows)
        narrow = values.to(rows.dtype)
        if scale is not None:
            narrow = narrow * _as(scale, rows.dtype)
        return torch.where((index >= 0).unsqueeze(-1), narrow[index.clamp(min=0)], rows, out=rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        # The gradients of each row are added up in fp32, by a product: in an order that repeats.
        (index,) = ctx.saved_tensors
        index, grad = index.flatten(), grad.flatten(0, -2)
        numbers = torch.arange(ctx.shape[0], device=index.device).unsqueeze(1)
        total = grad.new_zeros(ctx.shape, dtype=torch.promote_types(grad.dtype, torch.float32))
        for some, of_some in zip(index.split(TOKENS_AT_ONCE), grad.split(TOKENS_AT_ONCE), strict=True):
            # What is not finite elsewhere would not be multiplied away.
            of_trained = of_some.masked_fill((some < 0).unsqueeze(1), 0).to(total.dtype)
            total.addmm_((some == numbers).to(total.dtype), of_trained)
        if ctx.scale is not None:
            total *= _as(_as(ctx.scale, grad.dtype), total.dtype)
        return None, total.to(ctx.dtype), None, None


def _as(scale: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """Round a scale that is a tensor to a dtype, as the embedding does."""
    return scale.to(dtype) if isinstance(scale, Tensor) else scale
