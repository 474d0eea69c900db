"""The formulas of an adapter, pure, each once: training's scaling, the weight delta, and the fold of a merge.

LoRA: W' = W + s B A with s = alpha / R (Hu et al. 2021, arXiv:2106.09685), or s = alpha / sqrt(R) for rsLoRA
(Kalajdzievski 2023, arXiv:2312.03732).

Legend: O out features, I in features, R rank.
"""

import math

import torch
from torch import Tensor


def lora_scaling(rank: int, alpha: float, use_rslora: bool) -> float:
    """The factor s of the adapter's output."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def lora_delta(
    lora_A: Tensor,  # (R, I)
    lora_B: Tensor,  # (O, R)
    scaling: float,
) -> Tensor:  # (O, I) fp32
    """What the adapter adds to the weight."""
    return (lora_B.float() @ lora_A.float()).mul_(scaling)


def fold_lora(
    weight: Tensor,  # (O, I) fp32
    lora_A: Tensor,  # (R, I)
    lora_B: Tensor,  # (O, R)
    scaling: float,
) -> Tensor:  # (O, I) fp32
    """The weight with the adapter folded in, in fp32: cast the result once, not the parts."""
    assert weight.dtype == torch.float32
    return lora_delta(lora_A, lora_B, scaling).add_(weight)
