"""Queries, keys and values of five packed documents."""

from collections.abc import Iterable

import torch
from random_tensors import normal64
from torch import Tensor

BOUNDS = [0, 1, 8, 9, 29, 41]  # lengths 1, 7, 1, 20, 12
TOKENS = BOUNDS[-1]


def heads(
    query_heads: int = 4, key_heads: int = 2, head_dim: int = 16, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [(1, count, TOKENS, head_dim) for count in (query_heads, key_heads, key_heads)]
    query, key, value = (normal64(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))
    return query, key, value


def three(tensors: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = tensors
    return query, key, value
