"""Rotate heads by their position on CUDA: values are read once and written once, fp32 between, one rounding.

The contract is rotary.py's. Heads of a token are neighbors in memory, so a program takes a few of them, of one token or
of neighbors. Left out: fp64, which goes to plain torch.

Legend: B rows, H heads, T tokens, D head size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels.rotary import rotate_torch

ELEMENTS_PER_PROGRAM = 2048
ROTARY_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # fewer roundings


@triton.jit
def rotate_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (B, H, T, D)
    cos_ptr,  # (1 or B, T, D), as sin
    sin_ptr,
    out_ptr,  # (B, H, T, D)
    heads,
    tokens,
    half,  # D / 2
    x_row,  # strides
    x_head,
    x_token,
    table_row,
    table_token,
    out_row,
    out_head,
    out_token,
    TRANSPOSED: tl.constexpr,
    PLACES: tl.constexpr,  # tokens and heads, heads the faster
    HALF: tl.constexpr,
):
    """Rotate the heads of some tokens, or with TRANSPOSED their gradients."""  # noqa: DOC101, DOC103, DOC107
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    token, head = (place // heads).to(tl.int64), (place % heads).to(tl.int64)  # heads may lie 2**31 elements apart
    column = tl.arange(0, HALF)[None, :]
    inside = (token < tokens)[:, None] & (column < half)
    x_at = x_ptr + row * x_row + (token * x_token + head * x_head)[:, None] + column
    table_at = row * table_row + (token * table_token)[:, None] + column
    first = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_at + half, mask=inside, other=0.0).to(tl.float32)
    cos_first = tl.load(cos_ptr + table_at, mask=inside, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_ptr + table_at + half, mask=inside, other=0.0).to(tl.float32)
    sin_first = tl.load(sin_ptr + table_at, mask=inside, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_ptr + table_at + half, mask=inside, other=0.0).to(tl.float32)
    if TRANSPOSED:
        rotated_first = first * cos_first + second * sin_second
        rotated_second = second * cos_second - first * sin_first
    else:
        rotated_first = first * cos_first - second * sin_first
        rotated_second = second * cos_second + first * sin_second
    out_at = out_ptr + row * out_row + (token * out_token + head * out_head)[:, None] + column
    tl.store(out_at, rotated_first.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_at + half, rotated_second.to(out_ptr.dtype.element_ty), mask=inside)


def rotate_triton(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    """Compute `rotary.rotate_torch` in one pass.

    Args:
        x: (B, H, T, D).
        cos: (1 or B, T, D).
        sin: (1 or B, T, D).
        transposed: rotate a gradient.

    Returns:
        (B, H, T, D), in memory as x.
    """
    rows, heads, tokens, size = x.shape
    if x.dtype == torch.float64:
        return rotate_torch(x, cos, sin, transposed)
    x, cos, sin = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, cos, sin))
    sin = sin if sin.stride() == cos.stride() else sin.contiguous()
    cos = cos if sin.stride() == cos.stride() else cos.contiguous()
    out = torch.empty_like(x)
    if out.numel():
        padded = triton.next_power_of_2(size // 2)
        places = max(ELEMENTS_PER_PROGRAM // padded, 1)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            rotate_kernel[(triton.cdiv(heads * tokens, places), rows)](
                x,
                cos,
                sin,
                out,
                heads,
                tokens,
                size // 2,
                x.stride(0),
                x.stride(1),
                x.stride(2),
                cos.stride(0) if cos.shape[0] == rows else 0,
                cos.stride(1),
                out.stride(0),
                out.stride(1),
                out.stride(2),
                TRANSPOSED=transposed,
                PLACES=places,
                HALF=padded,
                **ROTARY_OPTIONS,
            )
    return out
