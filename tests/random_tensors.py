"""Draw tensors of normal values from a seed."""

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw normal values in fp32 and cast them."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def normal64(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw normal values in fp64, of which no dtype but fp64 holds all bits, and cast them."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
