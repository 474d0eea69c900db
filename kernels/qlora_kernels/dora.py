"""Compute the norms of an adapted weight's rows, which DoRA divides its magnitudes by.

DoRA (Liu et al. 2024, arXiv:2402.09353) trains the norm of each output feature's row apart from its direction:
y = m / ||W + s B A|| * (x W^T + s x A^T B^T). The norm is a constant for the gradient, as in the paper's section 4.3,
so nothing here has one. W + s B A is never made, nor any tensor of its size in fp32:

    ||W + s B A||^2 = ||W||^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B      each . over the ranks of a row

||W||^2 does not change while W is frozen. W A^T (O, R) is made from blocks of W's rows, in fp32; A A^T (R, R) and all
that is added up are fp64. The three parts are nearly equal and opposite where s B A is nearly -W; then what is left is
of the size of their errors, and the square, which is never negative, errs by up to some 1e-6 of the square of
S = ||W|| + s (|B[., 1]| ||A[1]|| + ... + |B[., R]| ||A[R]||). So a norm above S / 2 errs by less than 4e-6 of itself,
one of 3 % of S by less than 1e-3, and one of 0.1 % of S may be any number up to that.

Left out: the magnitudes, and what is computed with the norms (lora_linear.py scales a layer's output).

Legend: I in features, O out features, R rank.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from qlora_kernels.nf4 import NF4Weight, dequantized_blocks
from qlora_kernels.products import linear

CAST_AT_ONCE = 1 << 22
"""Elements of a weight that are there in fp32 at once: 16 MiB."""


def squared_row_norms(
    weight: NF4Weight | Tensor,  # (O, I)
    dtype: torch.dtype,
) -> Tensor:  # (O,) fp32
    """Compute the squared norm of each row of a frozen weight, once for `dora_norms`, without gradients.

    Args:
        weight: quantized, with or without a workspace, or dense.
        dtype: of the layer's products, to which values are rounded before they are squared, in fp32.

    Returns:
        The squares.
    """
    with torch.no_grad():
        return torch.cat([block.square().sum(1) for block in _blocks(weight, dtype)])


def dora_norms(
    weight: NF4Weight | Tensor,  # (O, I)
    squared_norms: Tensor,  # (O,) fp32
    lora_A: Tensor,  # (R, I)
    lora_B: Tensor,  # (O, R)
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:  # (O,) fp32
    """Compute the norm of each row of weight + scaling * lora_B lora_A, without gradients.

    A and B are taken as they are, in fp32 as they train, and not as the layer's products round them.

    Args:
        weight: quantized, with or without a workspace, or dense.
        squared_norms: of the weight, from `squared_row_norms` with the same dtype.
        lora_A: of the adapter, any float dtype.
        lora_B: of the adapter, any float dtype.
        scaling: of the adapter.
        dtype: of the layer's products, to which the weight's values are rounded.

    Returns:
        The norms; 0 where a row is canceled to within the errors.
    """
    with torch.no_grad():
        A, B = lora_A.float(), lora_B.double()
        crossed = torch.cat([linear(block, A) for block in _blocks(weight, dtype)])  # (O, R)
        gram = A.double() @ A.double().T
        mixed = crossed.double().mul_(2.0 * scaling).add_(B @ gram, alpha=scaling**2)
        return (squared_norms.double() + mixed.mul_(B).sum(1)).clamp_(min=0.0).sqrt_().float()


def _blocks(weight: NF4Weight | Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the rows, first to last, in fp32 as `dtype` rounds them, each block to be used at once: (rows, I)."""
    whole = ((slice(None), weight.detach()),) if isinstance(weight, Tensor) else dequantized_blocks(weight, dtype)
    for _, values in whole:
        rows = max(CAST_AT_ONCE // max(values.shape[1], 1), 1)
        for start in range(0, len(values), rows):
            yield values[start : start + rows].to(dtype).float()
