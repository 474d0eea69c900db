"""Define NF4 in plain torch: the contract that every faster version is compared with, bit for bit.

The format and its formulas are in nf4.py, whose operations these functions define; they are apart from it so that the
versions for a CPU and for CUDA can import the contract without a circle.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

NF4_CODE = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float32,
    device="cpu",
)
"""The sixteen values of NF4: quantiles of the normal distribution, zero among them (QLoRA, appendix E)."""
MIDPOINTS = (NF4_CODE[1:] + NF4_CODE[:-1]) / 2
"""(15,) fp32: a value's code is the number of these below it."""
BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
# Elements handled at a time. On a CPU a chunk should stay in the cache; on a GPU each chunk costs a few launches, and
# quantizing makes 14 bytes an element besides the weight.
_CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}
_QUANTIZED_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 21}


def quantize_torch(
    values: Tensor,  # (elements,) any float dtype
    packed: Tensor,  # (ceil(elements/2),) uint8, filled
    maxima: Tensor,  # (blocks,) fp32, filled: not finite where the block holds such a value
) -> None:
    """Quantize values to codes, in chunks; an odd last byte has the code of zero in its low half.

    Args:
        values: to be quantized.
        packed: takes the codes.
        maxima: takes the largest magnitude of each block.
    """
    chunk = _QUANTIZED_AT_ONCE.get(values.device.type, 1 << 21)
    for begin in range(0, values.numel(), chunk):
        codes, maximum = _nearest_codes(values[begin : begin + chunk].float())
        packed[begin // 2 : (begin + chunk) // 2] = (codes[0::2] << 4) | codes[1::2]
        maxima[begin // BLOCK_SIZE : (begin + chunk) // BLOCK_SIZE] = maximum


def _nearest_codes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of fp32 values, (n rounded up to even,) uint8, and the maximum magnitude of each block, fp32."""
    whole = values.numel() // BLOCK_SIZE * BLOCK_SIZE
    blocks, rest = values[:whole].view(-1, BLOCK_SIZE), values[whole:]
    maxima = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / maxima.clamp(min=1e-38))[:, None]).view(-1)
    if rest.numel():  # bitsandbytes divides a short last block where it multiplies the others by the inverse
        last = rest.abs().amax().clamp(min=1e-38)
        maxima, scaled = torch.cat([maxima, last[None]]), torch.cat([scaled, rest / last])
        scaled = F.pad(scaled, (0, scaled.numel() % 2))
    return torch.bucketize(scaled, _midpoints(values.device), out_int32=True).to(torch.uint8), maxima


@functools.cache
def _midpoints(device: torch.device) -> Tensor:
    return MIDPOINTS.to(device)


def dequantize_torch(
    packed: Tensor,  # (bytes,) uint8
    absmax: Tensor,  # (blocks,) uint8
    nested_absmax: Tensor,  # (nested blocks,) fp32
    nested_code: Tensor,  # (256,) fp32
    offset: Tensor,  # () fp32
    start: int,  # the first element wanted
    block_size: int,
    nested_block_size: int,
    out: Tensor,  # of any shape, contiguous, filled
) -> None:
    """Fill `out` with the elements from `start` on, in chunks that keep fp32 in the cache.

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
    packed, out, count = packed.view(-1), out.view(-1), out.numel()
    if count == 0:
        return
    first = start // block_size
    last = -((start + count) // -block_size)
    begin = first * block_size  # whole blocks are decoded from here
    packed = packed[begin // 2 : (start + count + 1) // 2]
    nested = first // nested_block_size  # scales are decoded from the beginning of their own block
    scale = nested_code.index_select(0, absmax[nested * nested_block_size : last].int())
    scale = _multiply_blocks_(scale, nested_absmax[nested:], nested_block_size).add_(offset)
    scale = scale[first - nested * nested_block_size :]

    # In place where `out` begins and ends with what is decoded; else aside, and what was not asked for is cut off.
    decoded = packed.numel() * 2
    aside = begin != start or decoded != count
    values = torch.empty(decoded, dtype=out.dtype, device=out.device) if aside else out
    _decode(packed, scale, block_size, values)
    if aside:
        out.copy_(values[start - begin :][:count])


def _decode(packed: Tensor, scale: Tensor, block_size: int, out: Tensor) -> None:
    """Decode every packed byte's two values, in chunks; fp32 in place, another dtype aside and cast once."""
    pairs = _pair_table(packed.device)
    chunk_blocks = max(_CHUNK_ELEMENTS.get(packed.device.type, 1 << 24) // block_size, 1)
    for block in range(0, scale.numel(), chunk_blocks):
        part = out[block * block_size : (block + chunk_blocks) * block_size]
        codes = packed[block * block_size // 2 : (block + chunk_blocks) * block_size // 2].int()
        values = part if out.dtype == torch.float32 else torch.empty_like(part, dtype=torch.float32)
        torch.index_select(pairs, 0, codes, out=values.view(torch.int64))
        _multiply_blocks_(values, scale[block : block + chunk_blocks], block_size)
        if values is not part:
            part.copy_(values)


def _multiply_blocks_(values: Tensor, scale: Tensor, block_size: int) -> Tensor:
    """Multiply each block of `values` by its scale, in place; the last block may be short."""
    whole = values.numel() // block_size
    values[: whole * block_size].view(whole, block_size).mul_(scale[:whole, None])
    if values.numel() > whole * block_size:
        values[whole * block_size :].mul_(scale[whole])
    return values


@functools.cache
def _pair_table(device: torch.device) -> Tensor:
    """Make a table (256,) int64: for each packed byte its two fp32 values as one 8-byte word, to look up both."""
    byte = torch.arange(256, device="cpu")
    return torch.stack([NF4_CODE[byte >> 4], NF4_CODE[byte & 15]], dim=1).view(torch.int64).view(256).to(device)
