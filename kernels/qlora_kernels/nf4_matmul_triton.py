"""Multiply a few tokens with an NF4 weight on CUDA: its values are never written to memory.

Each program takes some rows of the weight and all tokens, a span of the in features at a time. The weight's values have
the very bits of `nf4_reference.dequantize_torch`, cast to x's dtype; products of 16 bits run on tensor cores and are
summed in fp32, products of fp32 are not shortened to TF32. The high halves of the bytes are the even in features and
the low halves the odd ones, so each meets its half of x, and nothing is interleaved. Left out: splitting the in
features over programs, which would fill a large card better for the smallest layers, at the price of a second pass.

Legend: N tokens, I in features, O out features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels.nf4_matmul import MOST_FEW, multiply_few_torch
from qlora_kernels.nf4_triton import code_on, load_scale

ROWS_PER_PROGRAM = 16
BLOCKS_PER_TURN = {2: 4, 4: 1}  # of the format, by bytes of an element: 256 or 64 in features
# One stage: with more the loop waits for loads of single bytes, and took four times as long on an H200 (0028). With two
# blocks of 16 bits a turn, Triton 3.6 spills on sm_90.
NF4_MATMUL_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


@triton.jit
def multiply_few_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (N, I)
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    nf4_code_ptr,
    bias_ptr,  # (O,); x_ptr again where there is no bias
    out_ptr,  # (N, O)
    tokens,
    out_features,
    in_features,
    HAS_BIAS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Multiply a few tokens with some rows of the weight, and add the bias."""  # noqa: DOC101, DOC103, DOC107
    half: tl.constexpr = BLOCK_SIZE // 2
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    blocks_per_row = in_features // BLOCK_SIZE
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, blocks_per_row, BLOCKS):
        place = first + tl.arange(0, BLOCKS)
        inside = (row < out_features)[:, None] & (place < blocks_per_row)[None, :]
        # 64-bit: a weight may hold more than 2**31 elements.
        block = row.to(tl.int64)[:, None] * blocks_per_row + place[None, :]
        scale = load_scale(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, block, inside, NESTED_BLOCK_SIZE)
        byte = block[:, :, None] * half + tl.arange(0, half)[None, None, :]
        packed = tl.load(packed_ptr + byte, mask=inside[:, :, None], other=0)
        even = tl.load(nf4_code_ptr + (packed >> 4).to(tl.int32)) * scale[:, :, None]
        odd = tl.load(nf4_code_ptr + (packed & 15).to(tl.int32)) * scale[:, :, None]
        even = tl.reshape(even.to(x_ptr.dtype.element_ty), (ROWS, BLOCKS * half))
        odd = tl.reshape(odd.to(x_ptr.dtype.element_ty), (ROWS, BLOCKS * half))

        pair = first * half + tl.arange(0, BLOCKS * half)
        column = 2 * pair[:, None] + tl.arange(0, 2)[None, :]
        known = (token < tokens)[:, None, None] & (column < in_features)[None, :, :]
        x = tl.load(x_ptr + token[:, None, None] * in_features + column[None, :, :], mask=known, other=0.0)
        x_even, x_odd = tl.split(x)
        total = tl.dot(even, tl.trans(x_even), total, input_precision="ieee")
        total = tl.dot(odd, tl.trans(x_odd), total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias_ptr + row, mask=row < out_features, other=0.0).to(tl.float32)[:, None]
    place = token[None, :] * out_features + row[:, None]
    wanted = (row < out_features)[:, None] & (token < tokens)[None, :]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=wanted)


def multiply_few_triton(
    x: Tensor,  # (N, I)
    packed: Tensor,  # (bytes,) uint8
    absmax: Tensor,  # (blocks,) uint8
    nested_absmax: Tensor,  # (nested blocks,) fp32
    nested_code: Tensor,  # (256,) fp32
    offset: Tensor,  # () fp32
    bias: Tensor | None,  # (O,)
    workspace: Tensor | None,  # (any,), overwritten
    out_features: int,
    block_size: int,
    nested_block_size: int,
) -> Tensor:  # (N, O)
    """Compute `nf4_matmul.multiply_few_torch` in one pass over the four bits.

    Left to plain torch: rows that begin inside a block of the format, fp64, and 16 bits on cards before Ampere, where
    Triton has no tensor cores and multiplies by additions that take more registers than there are.

    Args:
        x: the tokens.
        packed: codes of the weight.
        absmax: indices into nested_code.
        nested_absmax: scale of each nested block.
        nested_code: the dynamic code.
        offset: added to each scale.
        bias: of the layer, or None.
        workspace: for plain torch.
        out_features: O.
        block_size: of the format.
        nested_block_size: of the format.

    Returns:
        The product.
    """
    tokens, in_features = x.shape
    tables = (packed, absmax, nested_absmax, nested_code, offset)
    is_narrow = x.element_size() == 2 and not has_tensor_cores(x.device)
    if in_features % block_size or x.dtype == torch.float64 or tokens > MOST_FEW or is_narrow:
        sizes = (out_features, block_size, nested_block_size)
        return multiply_few_torch(x, *tables, bias, workspace, *sizes)
    x, out = x.contiguous(), x.new_empty(tokens, out_features)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(x):  # Triton launches on the current device
        multiply_few_kernel[(triton.cdiv(out_features, ROWS_PER_PROGRAM),)](
            x,
            *(table.contiguous() for table in tables),
            code_on(x.device),
            x if bias is None else bias.contiguous(),
            out,
            tokens,
            out_features,
            in_features,
            HAS_BIAS=bias is not None,
            BLOCK_SIZE=block_size,
            NESTED_BLOCK_SIZE=nested_block_size,
            TOKENS=MOST_FEW,
            ROWS=ROWS_PER_PROGRAM,
            BLOCKS=BLOCKS_PER_TURN[x.element_size()],
            **NF4_MATMUL_OPTIONS,
        )
    return out


def has_tensor_cores(device: torch.device) -> bool:
    """Return True for cards whose tensor cores Triton uses, and for a CPU, where the interpreter runs.

    Args:
        device: of the tensors.

    Returns:
        True for Ampere and later.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
