"""Dequantize NF4 on CUDA in one pass: four bits and a share of a scale in, the value in the wanted dtype out.

The contract is that of `nf4_reference.dequantize_torch`, bit for bit: every product and the sum of the scale are
rounded by themselves, so the kernel is launched without fusing multiplications into additions. It is bound by memory;
plain torch would make and read back several full-size tensors. The product with few tokens, where fusing it gains, is
`nf4_matmul_triton`.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels.nf4_reference import NF4_CODE

BYTES_PER_PROGRAM = 1024
NF4_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def load_scale(  # type: ignore[no-untyped-def]
    absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, block, inside, NESTED_BLOCK_SIZE: tl.constexpr
):
    """Load the scale of each block; of those outside, the offset."""  # noqa: DOC101, DOC103, DOC107, DOC201
    # It is rounded twice: launch without floating-point fusion.
    absmax = tl.load(absmax_ptr + block, mask=inside, other=0)
    nested_absmax = tl.load(nested_absmax_ptr + block // NESTED_BLOCK_SIZE, mask=inside, other=0.0)
    return tl.load(nested_code_ptr + absmax.to(tl.int32)) * nested_absmax + tl.load(offset_ptr)


@triton.jit
def dequantize_kernel(  # type: ignore[no-untyped-def]
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    nf4_code_ptr,
    out_ptr,
    first_byte,  # the byte that holds the first element wanted
    odd,  # 1 where that element is the low half of its byte, else 0
    count,  # elements wanted
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Dequantize some bytes of a weight, two elements each."""  # noqa: DOC101, DOC103, DOC107
    # 64-bit from the start: a weight may hold more than 2**31 elements.
    begin = tl.program_id(0).to(tl.int64) * BYTES
    index = begin + tl.arange(0, BYTES)
    inside = 2 * index - odd < count
    byte = first_byte + index
    block = byte * 2 // BLOCK_SIZE  # blocks hold whole bytes, so both halves share one
    packed = tl.load(packed_ptr + byte, mask=inside, other=0)
    scale = load_scale(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, block, inside, NESTED_BLOCK_SIZE)
    high = tl.load(nf4_code_ptr + (packed >> 4).to(tl.int32)) * scale
    low = tl.load(nf4_code_ptr + (packed & 15).to(tl.int32)) * scale
    element = 2 * begin - odd + tl.arange(0, 2 * BYTES)
    values = tl.interleave(high, low).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + element, values, mask=(element >= 0) & (element < count))


def dequantize_triton(
    packed: Tensor,  # (bytes,) uint8
    absmax: Tensor,  # (blocks,) uint8
    nested_absmax: Tensor,  # (nested blocks,) fp32
    nested_code: Tensor,  # (256,) fp32
    offset: Tensor,  # () fp32
    start: int,
    block_size: int,
    nested_block_size: int,
    out: Tensor,  # of any shape, contiguous, filled
) -> None:
    """Fill `out` with the elements from `start` on, as `nf4_reference.dequantize_torch` does.

    Args:
        packed: codes.
        absmax: indices into nested_code.
        nested_absmax: scale of each nested block.
        nested_code: the dynamic code.
        offset: added to each scale.
        start: the first element wanted.
        block_size: elements of a block.
        nested_block_size: blocks of a nested block.
        out: any floating dtype.
    """
    assert block_size % 2 == 0, "a block must begin at a byte"
    count, odd = out.numel(), start % 2
    if count == 0:
        return
    tables = (packed, absmax, nested_absmax, nested_code, offset)
    with torch.cuda.device_of(packed):  # Triton launches on the current device
        dequantize_kernel[(triton.cdiv(count + odd, 2 * BYTES_PER_PROGRAM),)](
            *(table.contiguous() for table in tables),
            code_on(packed.device),
            out,
            start // 2,
            odd,
            count,
            BLOCK_SIZE=block_size,
            NESTED_BLOCK_SIZE=nested_block_size,
            BYTES=BYTES_PER_PROGRAM,
            **NF4_OPTIONS,
        )


@functools.cache
def code_on(device: torch.device) -> Tensor:
    """Return the sixteen values of NF4 on a device, copied once.

    Args:
        device: of a kernel's tensors.

    Returns:
        (16,) fp32.
    """
    return NF4_CODE.to(device)
