"""Make dropout's mask from a seed, so that backward makes it again instead of keeping it; and noise from one."""

import torch
from torch import Tensor

from qlora_kernels.registry import define
from qlora_kernels.side_by_side import cpu_generator


def draw_seed() -> Tensor:  # () int64, on the CPU
    """Draw a seed from this thread's CPU generator, so that restoring the generator's state repeats it.

    It is a tensor and not an int so that nothing is read from it on fake tensors.

    Returns:
        The seed.
    """
    return torch.randint(2**63 - 1, (), device="cpu", generator=cpu_generator())


def keep_mask(
    like: Tensor,  # (N, any)
    in_features: int,
    dropout: float,  # a probability below 1, rounded to a multiple of 1/65,536
    seed: Tensor | None,  # () int64 on the CPU
) -> Tensor:  # (N, I), dtype and device of `like`: 1 where kept, 0 where dropped
    """Make dropout's mask, not scaled: the same seed, N and I give the same mask, in every dtype.

    Args:
        like: gives N, dtype and device.
        in_features: I.
        dropout: the share that is dropped.
        seed: as `draw_seed` gives it.

    Returns:
        The mask.
    """
    return torch.ops.qlora_kernels.keep_mask(like.detach(), in_features, dropout, seed)


def uniform_noise(
    like: Tensor,  # any shape
    seed: Tensor,  # () int64 on the CPU
) -> Tensor:  # shape, dtype and device of `like`
    """Draw numbers from [-1, 1), each as likely.

    Args:
        like: gives shape, dtype and device.
        seed: as `draw_seed` gives it.

    Returns:
        The numbers.
    """
    return torch.ops.qlora_kernels.uniform_noise(like.detach(), seed)


def _uniform_noise(like: Tensor, seed: Tensor) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(int(seed))
    return torch.empty_like(like, memory_format=torch.contiguous_format).uniform_(-1.0, 1.0, generator=generator)


def _keep_mask(like: Tensor, in_features: int, dropout: float, seed: Tensor) -> Tensor:
    """Take four elements from each 64-bit draw: on a CPU several times faster than a draw each, as in bernoulli_."""
    elements = like.shape[0] * in_features
    generator = torch.Generator(like.device).manual_seed(int(seed))
    draws = torch.empty(-(elements // -4), dtype=torch.int64, device=like.device)
    lanes = draws.random_(-(2**63), None, generator=generator).view(torch.int16)[:elements]
    threshold = min(round(dropout * 65536), 65535) - 32768
    return (lanes >= threshold).view(like.shape[0], in_features).to(like.dtype)


def _keep_mask_fake(like: Tensor, in_features: int, dropout: float, seed: Tensor) -> Tensor:
    return like.new_empty((like.shape[0], in_features))


# Ops, so that on fake tensors, whose seed cannot be read, nothing is drawn.
define("keep_mask(Tensor like, SymInt in_features, float dropout, Tensor seed) -> Tensor", _keep_mask, _keep_mask_fake)
define(
    "uniform_noise(Tensor like, Tensor seed) -> Tensor",
    _uniform_noise,
    lambda like, seed: torch.empty_like(like, memory_format=torch.contiguous_format),
)
