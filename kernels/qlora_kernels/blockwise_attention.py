"""Compute causal attention in one document, a block of queries at a time, forward and again in backward.

Fused attention has no soft cap, on a CPU no dropout, and takes a window as a mask over all pairs of tokens. Here a
block of queries meets only the keys it can see, so the scores that exist at once are one block's: with a window, time
and memory grow with L x window, and without one memory still grows with L alone. Nothing is kept for backward but
queries, keys and values; each block's scores are made again there (as FlashAttention does, Dao et al. 2022,
arXiv:2205.14135, section 3.1), and dropout's mask is made again from a seed.

It is plain torch, so it runs on every device. It is one operation to torch, so that a plan on fake tensors meets one
operation instead of thousands, and adds what that uses inside by `blockwise_workspace_bytes`. Left out: attention that
is not causal, and gradients of gradients.

Legend: Hq query heads, Hkv key heads, G = Hq / Hkv, L tokens, D head size; of a block: N queries, S keys they see.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.dropout import draw_seed, keep_mask
from qlora_kernels.registry import define
from qlora_kernels.saved_tensors import visible

BLOCK_BYTES = 8 * 2**20
"""Of a block's scores in fp32, as far as FEWEST_QUERIES and MOST_QUERIES allow; backward holds up to five such."""

FEWEST_QUERIES, MOST_QUERIES = 16, 128

CUDA_FACTOR = 4
"""Blocks are so much larger there, where small ones would wait for launches; a CPU's caches like them small."""


def blockwise_attention(
    query: Tensor,  # (1, Hq, L, D)
    key: Tensor,  # (1, Hkv, L, D)
    value: Tensor,  # (1, Hkv, L, D)
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:  # (1, L, Hq, D)
    """Compute dropout(softmax(softcap * tanh(scale * q @ k.T / softcap))) @ v, causal.

    Products are in the query's dtype, all between them in fp32 (fp64 for fp64), and so are sums over blocks.

    Args:
        query: of one document.
        key: of the same dtype.
        value: of the same dtype.
        scale: what products of queries and keys are multiplied by.
        window: tokens that a token sees, its own among them; None: all before it.
        softcap: bound of the scores; None: none.
        dropout: share of the attention weights that are dropped.

    Returns:
        The output, heads last.
    """
    seed = draw_seed() if dropout else None
    return _Blockwise.apply(*visible(query, key, value), seed, scale, window, softcap, dropout)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, seed: Tensor | None, *settings: Any) -> Tensor:
        if any(ctx.needs_input_grad[:3]):
            ctx.save_for_backward(query, key, value)
        ctx.seed, ctx.settings = seed, settings
        return torch.ops.qlora_kernels.blockwise_attention(query, key, value, seed, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # grad: (1, L, Hq, D)
        grads = torch.ops.qlora_kernels.blockwise_attention_backward(grad, *ctx.saved_tensors, ctx.seed, *ctx.settings)
        return (*grads, *[None] * 5)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seed: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:  # (1, L, Hq, D)
    output = _attend_fake(query, key, value)
    by_key_head = output[0].transpose(0, 1).unflatten(0, (key.shape[1], -1))  # (Hkv, G, L, D)
    for block in _blocks(query, key, seed, scale, window, softcap, dropout):
        weights = block.weights
        if block.kept is not None:
            weights.mul_(block.kept)
        result = torch.bmm(weights.to(value.dtype), value[0, :, block.keys])
        by_key_head[:, :, block.queries] = result.unflatten(1, (by_key_head.shape[1], -1))
        del block, weights  # or they would still be there when the next block's are made
    return output


def _backward(
    grad: Tensor,  # (1, L, Hq, D)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seed: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # shaped as query, key and value
    dtype = torch.promote_types(query.dtype, torch.float32)
    grad_query = torch.empty_like(query)
    grad_key, grad_value = torch.zeros_like(key, dtype=dtype), torch.zeros_like(value, dtype=dtype)
    by_key_head = grad[0].transpose(0, 1).unflatten(0, (key.shape[1], -1))  # (Hkv, G, L, D)
    query_grads = grad_query[0].unflatten(0, (key.shape[1], -1))
    for block in _blocks(query, key, seed, scale, window, softcap, dropout, with_slope=True):
        weights, rows = block.weights, by_key_head[:, :, block.queries].flatten(1, 2)  # (Hkv, G N, S), (..., D)
        dropped = weights if block.kept is None else weights * block.kept
        grad_value[0, :, block.keys] += torch.bmm(dropped.to(rows.dtype).mT, rows)
        del dropped
        inner = torch.bmm(rows, value[0, :, block.keys].mT).to(dtype)  # the gradient of weights, then of scores
        if block.kept is not None:
            inner.mul_(block.kept)
        inner.sub_((inner * weights).sum(-1, keepdim=True)).mul_(weights)
        if block.slope is not None:
            inner.mul_(block.slope)
        scores_grad = inner.to(query.dtype)
        result = torch.bmm(scores_grad, key[0, :, block.keys]).mul_(scale)
        query_grads[:, :, block.queries] = result.unflatten(1, (query_grads.shape[1], -1))
        grad_key[0, :, block.keys] += torch.bmm(scores_grad.mT, block.scaled_query)
        del block, weights, inner, scores_grad
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


@dataclass
class _Block:
    """Hold what forward and backward both need of one block; the rows of a key head's G heads follow one another."""

    queries: slice
    keys: slice
    scaled_query: Tensor  # (Hkv, G N, D)
    weights: Tensor  # (Hkv, G N, S) softmax, before dropout
    slope: Tensor | None  # (Hkv, G N, S) of the soft cap
    kept: Tensor | None  # (Hkv, G N, S) 0 where dropped, else 1 / (1 - dropout)


def _blocks(
    query: Tensor,
    key: Tensor,
    seed: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
    with_slope: bool = False,
) -> Iterator[_Block]:
    _, heads, length, _ = query.shape
    by_key_head = query[0].unflatten(0, (key.shape[1], -1))  # (Hkv, G, L, D)
    count = queries_of_a_block(heads, min(length, window or length), query.is_cuda)
    for number, start in enumerate(range(0, length, count)):
        queries = slice(start, min(start + count, length))
        keys = slice(0 if window is None else max(0, start - window + 1), queries.stop)
        # Scaled before the product, which in fp16 could overflow.
        scaled = by_key_head[:, :, queries].flatten(1, 2) * scale
        weights = torch.bmm(scaled, key[0, :, keys].mT).to(torch.promote_types(query.dtype, torch.float32))
        slope = None
        if softcap is not None:
            weights.div_(softcap).tanh_()
            slope = weights.square().neg_().add_(1.0) if with_slope else None
            weights.mul_(softcap)
        hidden = _hidden(queries, keys, window, query.device)
        weights.unflatten(1, (-1, hidden.shape[0])).masked_fill_(hidden, float("-inf"))
        del hidden
        weights.sub_(weights.amax(-1, keepdim=True)).exp_()
        weights.div_(weights.sum(-1, keepdim=True))
        kept = None
        if seed is not None:
            like = weights.flatten(0, 1)
            kept = keep_mask(like, like.shape[1], dropout, seed + number).view_as(weights)
            kept.div_(1.0 - dropout)
        yield _Block(queries, keys, scaled, weights, slope, kept)
        del scaled, weights, slope, kept


def queries_of_a_block(heads: int, reach: int, on_cuda: bool) -> int:
    """Choose how many queries form a block: a multiple of 16, so that its scores have about BLOCK_BYTES.

    Args:
        heads: query heads.
        reach: keys that a query sees at most.
        on_cuda: blocks have CUDA_FACTOR times as many bytes there.

    Returns:
        The number of queries.
    """
    factor = CUDA_FACTOR if on_cuda else 1
    fitting = factor * BLOCK_BYTES // (4 * heads * reach) // FEWEST_QUERIES * FEWEST_QUERIES
    return max(min(fitting, factor * MOST_QUERIES), FEWEST_QUERIES)


def blockwise_workspace_bytes(
    query: Tensor,  # (1, Hq, L, D)
    key: Tensor,  # (1, Hkv, L, D)
    window: int | None,
    softcap: float | None,
    dropout: float,
    *,
    backward: bool,
    on_cuda: bool,
) -> int:
    """Compute what the operation uses inside and frees again: a few blocks of scores, and in backward sums in fp32.

    Args:
        query: as given to `blockwise_attention`.
        key: as given to `blockwise_attention`.
        window: as given to `blockwise_attention`.
        softcap: as given to `blockwise_attention`.
        dropout: as given to `blockwise_attention`.
        backward: count backward instead of forward.
        on_cuda: count blocks as large as on a CUDA device.

    Returns:
        Bytes, beyond inputs and results.
    """
    _, heads, length, head_dim = query.shape
    is_half = query.element_size() == 2
    count = min(queries_of_a_block(heads, min(length, window or length), on_cuda), length)
    pairs = count * (length if window is None else min(length, window - 1 + count))
    block = heads * pairs * (4 if is_half else query.element_size())
    rows = heads * count * head_dim * query.element_size()
    if not backward:
        # Besides the weights: what the mask over pairs is made of, then their cast, or what dropout's mask is made of.
        extra = max(6 * pairs, block // 2 if is_half else 0, block * 7 // 4 if dropout else 0)
        return block + extra + 2 * rows
    blocks = block * (3 + (softcap is not None) + (dropout > 0)) + 3 * rows
    sums, grads = (2 * 4 * key.numel(), 2 * 2 * key.numel()) if is_half else (0, 0)
    return max(sums, sums - grads + blocks)  # the gradients, which are no workspace, are made when the blocks are gone


def _hidden(queries: slice, keys: slice, window: int | None, device: torch.device) -> Tensor:
    """Mark the keys that a query does not see, (N, S) bool: those after it and those before its window."""
    rows = torch.arange(queries.start, queries.stop, dtype=torch.int32, device=device)[:, None]
    ages = rows - torch.arange(keys.start, keys.stop, dtype=torch.int32, device=device)
    return ages < 0 if window is None else (ages < 0) | (ages >= window)


def _attend_fake(query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def _backward_fake(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? seed, float scale, SymInt? window, float? softcap, float dropout"
)
define(f"blockwise_attention({_INPUTS}) -> Tensor", _attend, _attend_fake)
define(f"blockwise_attention_backward(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor)", _backward, _backward_fake)
