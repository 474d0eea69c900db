"""Rotate heads by their position, the rotary embedding (Su et al. 2021, arXiv:2104.09864) as Llama has it.

The halves of a head are rotated together:

    out[first half]  = x[first half] * cos[first half] - x[second half] * sin[first half]
    out[second half] = x[second half] * cos[second half] + x[first half] * sin[second half]

The gradient is the transpose of that, which for the tables that models make (both halves alike) is the rotation by the
angle's negative; nothing is kept for it but the tables. Forward and backward are one operation of the register: in
plain torch, with the bits of the formula in autograd; on CUDA one kernel (rotary_triton.py). Left out: gradients of the
tables, and heads of which only a part is rotated.

Legend: B rows, H heads, T tokens, D head size (even).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.registry import define, from_triton
from qlora_kernels.saved_tensors import fetch, keep, visible


def rotate(
    x: Tensor,  # (B, H, T, D)
    cos: Tensor,  # (1 or B, T, D), of x's dtype
    sin: Tensor,  # (1 or B, T, D), of x's dtype
) -> Tensor:  # (B, H, T, D), laid out in memory as x
    """Rotate each head's values by its token's angles.

    Args:
        x: queries or keys.
        cos: of the angles.
        sin: of the angles.

    Returns:
        The rotated values.
    """
    assert cos.dtype == sin.dtype == x.dtype, "rotate takes tables of its input's dtype"
    return _Rotate.apply(*visible(x), cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if ctx.needs_input_grad[0]:
            keep(ctx, cos, sin)
        return torch.ops.qlora_kernels.rotate(x, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # grad: (B, H, T, D)
        return torch.ops.qlora_kernels.rotate(grad, *fetch(ctx), True), None, None


def rotate_torch(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    """Define `rotate` and its gradient in plain torch.

    Args:
        x: (B, H, T, D).
        cos: (1 or B, T, D).
        sin: (1 or B, T, D).
        transposed: rotate a gradient.

    Returns:
        (B, H, T, D).
    """
    half = x.shape[-1] // 2
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    out = torch.mul(x, cos, out=torch.empty_like(x))
    if transposed:
        out[..., :half] += x[..., half:] * sin[..., half:]
        out[..., half:] -= x[..., :half] * sin[..., :half]
    else:
        out[..., :half] -= x[..., half:] * sin[..., :half]
        out[..., half:] += x[..., :half] * sin[..., half:]
    return out


def rotary_workspace_bytes(x: Tensor) -> int:
    """Compute what plain torch uses inside and frees again: half of x at a time.

    Args:
        x: (B, H, T, D).

    Returns:
        Bytes, beyond inputs and results.
    """
    return x.numel() // 2 * x.element_size()


define(
    "rotate(Tensor x, Tensor cos, Tensor sin, bool transposed) -> Tensor",
    rotate_torch,
    lambda x, *others: torch.empty_like(x),
    cuda=from_triton("rotary_triton", "rotate_triton"),
)
