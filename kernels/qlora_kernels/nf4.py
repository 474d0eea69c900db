"""Quantize to NF4 with double quantization and back: four bits a weight, and eight a block of 64 for its scale.

The format is that of QLoRA (Dettmers et al. 2023, arXiv:2305.14314) as bitsandbytes lays it out, so its weights are
read and made here bit for bit. Two formulas are the whole contract, in fp32, each operation rounded (no fused
multiply-add):

    scale[block] = nested_code[absmax[block]] * nested_absmax[block // 256] + offset
    value[i]     = NF4_CODE[code i] * scale[i // 64]                  then one cast to the dtype asked for

nf4_reference.py is that contract in plain torch. The registered operations take a CPU's tensors to compiled code
(`nf4_cpu`), a GPU's to Triton (`nf4_triton`), but for quantizing on a GPU, which is plain torch: bitsandbytes' kernel
there divides approximately, and gives about one fp32 weight in a million another code than a CPU does. Left out: other
block formats (fp4).
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kernels.nf4_reference import BLOCK_SIZE, NESTED_BLOCK_SIZE, dequantize_torch, quantize_torch
from qlora_kernels.registry import define, from_triton


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """Hold a quantized weight (O out, I in), row by row in blocks of `block_size` that may cross rows."""

    packed: Tensor  # (ceil(O*I/2),) uint8, two codes a byte, the first element in the high nibble
    # Of each block the largest magnitude, less the offset, as an index into nested_code:
    absmax: Tensor  # (blocks,) uint8
    nested_absmax: Tensor  # (ceil(blocks/nested_block_size),) fp32
    nested_code: Tensor  # (256,) fp32
    offset: Tensor  # () fp32: the mean of the block maxima
    shape: tuple[int, int]  # (O, I)
    block_size: int = BLOCK_SIZE
    nested_block_size: int = NESTED_BLOCK_SIZE
    # Where `dequantized_blocks` puts values of its dtype, one block of rows at a time:
    workspace: Tensor | None = None  # (any,)

    @functools.cached_property
    def whole_block(self) -> Tensor | None:
        """Return the part of the workspace that takes the whole weight.

        Returns:
            (O, I); None where the workspace is smaller.
        """
        elements = self.shape[0] * self.shape[1]
        if self.workspace is None or self.workspace.numel() < elements:
            return None
        return self.workspace[:elements].view(self.shape)


def quantize_nf4(weight: Tensor) -> NF4Weight:
    """Quantize a finite weight to the codes that bitsandbytes gives on a CPU.

    Blocks hold 64 elements; every value is divided by its block's largest magnitude and takes the nearest of the 16
    codes, a tie the lower one. The block maxima, less their mean, are quantized in turn (see `_quantize_maxima`).

    The packed codes are the same on every device, on a CPU all other bits too. A GPU sums the block maxima in another
    order; their mean may differ in its last bit, and with it how the maxima are quantized.

    Args:
        weight: (O, I), any floating dtype.

    Returns:
        The quantized weight, on the same device.
    """
    assert weight.dim() == 2, "quantize_nf4 takes one matrix"
    flat, elements = weight.detach().reshape(-1), weight.numel()
    packed = torch.empty((elements + 1) // 2, dtype=torch.uint8, device=weight.device)
    maxima = torch.empty(-(elements // -BLOCK_SIZE), dtype=torch.float32, device=weight.device)
    torch.ops.qlora_kernels.quantize_nf4(flat, packed, maxima)
    offset = maxima.mean()
    absmax, nested_absmax = _quantize_maxima(maxima - offset)
    nested_code = dynamic_code().to(weight.device, copy=True)  # its own: nobody's writes reach another weight
    return NF4Weight(packed, absmax, nested_absmax, nested_code, offset, (weight.shape[0], weight.shape[1]))


def _quantize_maxima(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize block maxima, fp32 (blocks,), to indices of the dynamic code, uint8, and an fp32 scale for each 256.

    They are rounded as bitsandbytes rounds: a value over its scale, in [-1, 1], is first rounded to a grid of 65,536
    points, and takes the code nearest to that point. Where all 256 values are zero, the index is 0: it is multiplied by
    zero.
    """
    count = values.numel()
    blocks = F.pad(values, (0, -count % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    scale = blocks.abs().amax(dim=1)
    normalized = blocks * (1.0 / scale)[:, None]
    point = ((normalized.clamp(-1.0, 1.0) + 1.0) * 32767.5 + 0.5).int()
    # A scale below fp32's normal range has an infinite inverse: zeros there become NaN, and take index 0.
    point = torch.where(normalized.isnan(), 0, point).view(-1)[:count]
    return _nearest_dynamic_code().to(values.device).index_select(0, point), scale


@functools.cache
def dynamic_code() -> Tensor:
    """Make bitsandbytes' signed 8-bit dynamic map (Dettmers 2015, arXiv:1511.04561), (256,) fp32, sorted.

    It has seven decades, each with twice the steps of the one below it: the midpoints of 2**k equal parts of [0.1, 1],
    times 10**(k - 6), with both signs; then zero and one.

    Returns:
        The map, on the CPU; the same tensor each time.
    """
    decades = []
    for k in range(7):
        edges = torch.linspace(0.1, 1.0, 2**k + 1, dtype=torch.float32, device="cpu")
        decades.append((edges[1:] + edges[:-1]) / 2.0 * 10.0 ** (k - 6))
    positive = torch.cat(decades)
    return torch.cat([-positive, torch.tensor([0.0, 1.0], device="cpu"), positive]).sort().values


@functools.cache
def _nearest_dynamic_code() -> Tensor:
    """Find the dynamic code nearest to each point of the even grid over [-1, 1], (65536,) uint8."""
    code = dynamic_code()
    grid = torch.arange(65536, dtype=torch.float32, device="cpu") / 65535.0 * 2.0 - 1.0
    return torch.bucketize(grid, (code[1:] + code[:-1]) / 2.0).to(torch.uint8)


def dequantize_nf4(weight: NF4Weight, dtype: torch.dtype, *, rows: slice | None = None) -> Tensor:
    """Dequantize the weight, or some of its rows: the fp32 value, cast once.

    Rows need not begin at a block; they have the same bits as the slice of the whole.

    Args:
        weight: quantized.
        dtype: any floating one.
        rows: those wanted, with a step of 1; None: all.

    Returns:
        (O, I), or (rows, I).
    """
    out_features, in_features = weight.shape
    start, stop, step = (rows or slice(None)).indices(out_features)
    assert step == 1, "rows must be a slice with step 1"
    out = torch.empty(max(stop - start, 0), in_features, dtype=dtype, device=weight.packed.device)
    _dequantize_into(out, weight, start)
    return out


def dequantized_blocks(weight: NF4Weight, dtype: torch.dtype) -> Iterable[tuple[slice, Tensor]]:
    """Dequantize from the first row to the last, in as few blocks of rows as the weight's workspace allows.

    With a workspace of this dtype each block overwrites the one before it: use it at once. Without one the whole weight
    is one new tensor.

    Args:
        weight: quantized.
        dtype: any floating one.

    Returns:
        (rows, their values (rows, I)) of each block.
    """
    workspace, (out_features, in_features) = weight.workspace, weight.shape
    if workspace is None or workspace.dtype != dtype or workspace.numel() < in_features:
        return ((slice(0, out_features), dequantize_nf4(weight, dtype)),)
    whole = weight.whole_block
    if whole is None:
        return _blocks_in(workspace, weight)
    _dequantize_into(whole, weight, 0)
    return ((slice(0, out_features), whole),)


def _blocks_in(workspace: Tensor, weight: NF4Weight) -> Iterator[tuple[slice, Tensor]]:
    out_features, in_features = weight.shape
    rows = workspace.numel() // in_features
    rows = rows // BLOCK_SIZE * BLOCK_SIZE or rows  # so that a block of rows begins at a block of the format
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        block = workspace[: (stop - start) * in_features].view(stop - start, in_features)
        _dequantize_into(block, weight, start)
        yield slice(start, stop), block


def _dequantize_into(out: Tensor, weight: NF4Weight, first_row: int) -> None:
    torch.ops.qlora_kernels.dequantize_nf4(
        weight.packed,
        weight.absmax,
        weight.nested_absmax,
        weight.nested_code,
        weight.offset,
        first_row * weight.shape[1],
        weight.block_size,
        weight.nested_block_size,
        out,
    )


def _quantize_on_cpu() -> Callable[..., None]:
    from qlora_kernels import nf4_cpu

    return nf4_cpu.quantizer()


def _dequantize_on_cpu() -> Callable[..., None]:
    from qlora_kernels import nf4_cpu

    return nf4_cpu.dequantizer()


define(
    "quantize_nf4(Tensor values, Tensor(a!) packed, Tensor(b!) maxima) -> ()",
    quantize_torch,
    lambda *arguments: None,
    cpu=_quantize_on_cpu,
)
define(
    "dequantize_nf4(Tensor packed, Tensor absmax, Tensor nested_absmax, Tensor nested_code, Tensor offset,"
    " SymInt start, int block_size, int nested_block_size, Tensor(a!) out) -> ()",
    dequantize_torch,
    lambda *arguments: None,
    cpu=_dequantize_on_cpu,
    cuda=from_triton("nf4_triton", "dequantize_triton"),
)
