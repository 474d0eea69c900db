"""Define the formulas of an adapter, pure, each once: training's scaling, the weight delta, and the fold of a merge.

LoRA: W' = W + s B A with s = alpha / R (Hu et al. 2021, arXiv:2106.09685), or s = alpha / sqrt(R) for rsLoRA
(Kalajdzievski 2023, arXiv:2312.03732).
DoRA: W' = m / ||W + s B A|| (W + s B A), by rows (Liu et al. 2024, arXiv:2402.09353).

Some rows of a fused layer may have a B of their own (fused_parts.py); its B is then in blocks, zero elsewhere.

Legend: O out features, I in features, R rank, P parts of a fused layer, S rows of these parts together.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def lora_scaling(rank: int, alpha: float, use_rslora: bool) -> float:
    """Compute the factor s of the adapter's output.

    Args:
        rank: R.
        alpha: of the adapter.
        use_rslora: divide by the root of the rank.

    Returns:
        s.
    """
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def lora_delta(
    lora_A: Tensor,  # (R, I)
    lora_B: Tensor,  # (O, R)
    scaling: float,
) -> Tensor:  # (O, I) fp32
    """Compute what the adapter adds to the weight.

    Args:
        lora_A: any floating dtype.
        lora_B: any floating dtype.
        scaling: s.

    Returns:
        s B A.
    """
    return (lora_B.float() @ lora_A.float()).mul_(scaling)


def fold_lora(
    weight: Tensor,  # (O, I) fp32
    lora_A: Tensor,  # (R, I)
    lora_B: Tensor,  # (O, R)
    scaling: float,
) -> Tensor:  # (O, I) fp32
    """Fold the adapter into the weight, in fp32: cast the result once, not the parts.

    Args:
        weight: of the base.
        lora_A: any floating dtype.
        lora_B: any floating dtype.
        scaling: s.

    Returns:
        W + s B A.
    """
    assert weight.dtype == torch.float32
    return lora_delta(lora_A, lora_B, scaling).add_(weight)


def dora_factors(
    magnitude: Tensor,  # (O,)
    norms: Tensor,  # (O,) fp32
) -> Tensor:  # (O,) fp32
    """Compute what DoRA multiplies a layer's output by.

    Args:
        magnitude: that trains, any floating dtype.
        norms: ||W + s B A|| of each row, a constant for the gradient.

    Returns:
        m / ||W + s B A||; 0 where a row is 0, whose direction nothing can give a length.
    """
    return torch.where(norms > 0, magnitude.float() / norms.clamp_min(torch.finfo(torch.float32).tiny), 0.0)


def with_zero_blocks(
    lora_B: Tensor,  # (S, R), the parts' B's below each other
    parts: Sequence[slice],  # of the O rows
    out_features: int,
) -> Tensor:  # (O, P * R)
    """Make B as one adapter of the summed rank has it: each part's block in its rows and its columns, zero elsewhere.

    Args:
        lora_B: of the parts.
        parts: their rows.
        out_features: O.

    Returns:
        The whole B.
    """
    rank = lora_B.shape[1]
    whole = lora_B.new_zeros(out_features, rank * len(parts))
    blocks = lora_B.split([part.stop - part.start for part in parts])
    for index, (part, block) in enumerate(zip(parts, blocks, strict=True)):
        whole[part, index * rank : (index + 1) * rank] = block
    return whole


def without_zero_blocks(
    whole: Tensor,  # (O, P * R)
    parts: Sequence[slice],  # of the O rows
) -> Tensor | None:  # (S, R)
    """Take the parts' blocks out of a whole B: the inverse of `with_zero_blocks`.

    Args:
        whole: of one adapter of the summed rank.
        parts: their rows.

    Returns:
        B of the parts; None where a value outside of the blocks is not zero.
    """
    columns = whole.split(whole.shape[1] // len(parts), dim=1)
    blocks = torch.cat([column[part] for column, part in zip(columns, parts, strict=True)])
    return blocks if torch.equal(with_zero_blocks(blocks, parts, len(whole)), whole) else None
