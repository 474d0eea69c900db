"""Split a weight into the product that an adapter starts as, and the rest, which becomes the 4-bit base.

    W = s B A + rest

PiSSA (Meng et al. 2024, arXiv:2404.02948) takes out the largest singular values, so that training changes what the
weight does most. OLoRA (Büyükakyüz 2024, arXiv:2406.01775) takes out an orthonormal basis of the first R columns, times
its products with all columns. Both quantize what is left (QPiSSA). LoftQ (Li et al. 2023, arXiv:2310.08659) chooses
both together, so that the 4-bit rest and the product are near the weight: it quantizes what the product leaves, and
takes the largest singular values of what the quantization leaves, in turns.

Factors and scalings are PEFT's: PiSSA's are divided by the scaling, and OLoRA's are not, so that s B A is taken out.
PEFT forgets the scaling in LoftQ, which is divided by here.

Legend: O out features, I in features, R rank.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_kernels.nf4 import NF4Weight, dequantize_nf4
from qlora_trainer.adapters.arithmetic.low_rank import balanced_factors, largest_singular
from qlora_trainer.adapters.formulas import lora_delta
from qlora_trainer.weights.nf4 import quantize_weight

LOFTQ_STEPS = 5  # as in the paper; the nearest of them is taken


@dataclass(frozen=True, eq=False)
class SplitWeight:
    """Hold both parts of a weight, and how far they are from it together."""

    lora_A: Tensor  # (R, I) fp32
    lora_B: Tensor  # (O, R) fp32
    rest: NF4Weight  # (O, I)
    squared_error: float  # of s B A and the rest together


Start = Callable[[Tensor, int, float, torch.Generator, str], SplitWeight]


def split_olora(
    weight: Tensor,  # (O, I) fp32
    rank: int,
    scaling: float,
    generator: torch.Generator,
    name: str,
) -> SplitWeight:
    """Take out the orthonormal basis of the first R columns, times its products with all columns.

    A weight that is not finite raises QuantizationError.

    Args:
        weight: finite; not changed.
        rank: R, no more than either size.
        scaling: s.
        generator: not used.
        name: of the weight, for messages.

    Returns:
        The parts: B is the basis, A the products.
    """
    basis = torch.linalg.qr(weight[:, :rank]).Q  # of the whole weight's QR, too: it goes column by column
    return _split(weight, basis.T @ weight, basis, scaling, name)


def split_pissa(
    weight: Tensor,  # (O, I) fp32
    rank: int,
    scaling: float,
    generator: torch.Generator,
    name: str,
) -> SplitWeight:
    """Take out the largest singular values.

    A weight that is not finite raises QuantizationError.

    Args:
        weight: finite; not changed.
        rank: R, no more than either size.
        scaling: s.
        generator: of the CPU, for large weights.
        name: of the weight, for messages.

    Returns:
        The parts.
    """
    return _split(weight, *_nearest(weight, rank, scaling, generator), scaling, name)


def split_loftq(
    weight: Tensor,  # (O, I) fp32
    rank: int,
    scaling: float,
    generator: torch.Generator,
    name: str,
) -> SplitWeight:
    """Quantize, take the largest singular values of the error, quantize what they leave, and so on.

    A weight that is not finite raises QuantizationError.

    Args:
        weight: finite; not changed.
        rank: R, no more than either size.
        scaling: s.
        generator: of the CPU, for large weights.
        name: of the weight, for messages.

    Returns:
        The parts that are nearest to the weight.
    """
    best: SplitWeight | None = None
    left = weight
    for _ in range(LOFTQ_STEPS):
        rest = quantize_weight(left, name)
        error = dequantize_nf4(rest, torch.float32).neg_().add_(weight)
        lora_A, lora_B = _nearest(error, rank, scaling, generator)
        product = lora_delta(lora_A, lora_B, scaling)
        squared = float(torch.linalg.vector_norm(error.sub_(product))) ** 2
        if best is None or squared < best.squared_error:
            best = SplitWeight(lora_A, lora_B, rest, squared)
        left = torch.sub(weight, product, out=product)
    assert best is not None
    return best


STARTS: dict[str, Start] = {"olora": split_olora, "pissa": split_pissa, "loftq": split_loftq}
"""Functions that take a start out of a weight, by the value of adapter.init."""


def _nearest(matrix: Tensor, rank: int, scaling: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return A and B of which s B A is the nearest product of its rank."""
    U, s, Vh = largest_singular(matrix, rank, generator)
    return balanced_factors(U, s / scaling, Vh)


def _split(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, name: str) -> SplitWeight:
    """Quantize what a product leaves of a weight."""
    left = lora_delta(lora_A, lora_B, scaling).neg_().add_(weight)
    rest = quantize_weight(left, name)
    squared = float(torch.linalg.vector_norm(left.sub_(dequantize_nf4(rest, torch.float32)))) ** 2
    return SplitWeight(lora_A.contiguous(), lora_B.contiguous(), rest, squared)
