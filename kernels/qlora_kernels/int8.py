"""Quantize a frozen matrix to eight bits: in each row integers from -127 to 127 times its largest magnitude over 127.

For matrices whose rows represent tokens, such as the LM head: a row has one scale, so any block of rows can be
dequantized alone. The contract is in plain torch, on every device:

    scale[o]    = max |weight[o]| / 127                         in fp32
    value[o, i] = codes[o, i] * scale[o]                        the fp32 product, cast once

Left out: products in integers. The matrix is dequantized in the dtype of computation, a block of rows at a time.

Legend: O rows, I columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 24  # converted at a time while quantizing


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """Hold a quantized matrix (O, I)."""

    codes: Tensor  # (O, I) int8
    scale: Tensor  # (O,) fp32

    @property
    def shape(self) -> tuple[int, int]:
        """Return (O, I).

        Returns:
            Rows and columns of the matrix.
        """
        return self.codes.shape[0], self.codes.shape[1]


def quantize_int8(weight: Tensor) -> Int8Weight:
    """Quantize a finite matrix to the nearest codes; a row of zeros gets scale 0.

    Args:
        weight: (O, I), any floating dtype.

    Returns:
        The codes and scales, on the same device.
    """
    assert weight.dim() == 2, "quantize_int8 takes one matrix"
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    rows = max(_CHUNK_ELEMENTS // max(weight.shape[1], 1), 1)
    for start in range(0, weight.shape[0], rows):
        values = weight.detach()[start : start + rows].float()
        part = values.abs().amax(dim=1) / 127.0
        scale[start : start + rows] = part
        # A row of zeros would give 0 / 0, and an integer of NaN is undefined.
        quotient = values / part.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        codes[start : start + rows] = quotient.round_().clamp_(-127, 127).to(torch.int8)
    return Int8Weight(codes, scale)


def dequantize_int8(weight: Int8Weight, dtype: torch.dtype, *, rows: slice | None = None) -> Tensor:
    """Dequantize the matrix, or some of its rows.

    Args:
        weight: as `quantize_int8` gives it.
        dtype: any floating one.
        rows: those wanted, with a step of 1; None: all.

    Returns:
        (O, I), or (rows, I).
    """
    start, stop, step = (rows or slice(None)).indices(weight.codes.shape[0])
    assert step == 1, "rows must be a slice with step 1"
    # A code is exact in every floating dtype of 8 significant bits, and the product of fp32 is rounded once.
    return weight.codes[start:stop].to(dtype).mul_(weight.scale[start:stop, None])
