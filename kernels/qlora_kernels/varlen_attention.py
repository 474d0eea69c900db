"""Causal attention over documents laid end to end, each seeing only itself, without a mask over all tokens.

Packing puts many rows into one sequence without padding. A mask that keeps them apart would cost tokens x tokens; here
each document is attended to by itself, so the cost is the sum of the squares of the lengths, and nothing can leak from
one document into another. On CUDA in 16-bit, torch's variable-length flash attention does the same in one call. Where
no fused attention can do it without a matrix of scores or a mask (a window, a soft cap, dropout on a CPU), it goes by
blocks of queries (blockwise_attention.py), so a long document costs no square in memory either. Left out: attention
that is not causal, and key/value caches (generation goes through transformers' own attention).
"""

import functools
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kernels.blockwise_attention import blockwise_attention
from qlora_kernels.registry import kernel_choice
from qlora_kernels.torch_features import varlen_attention_arguments

MOST_BACKWARD_BYTES = 2**28
"""Of memory inside flash attention's backward: where all heads at once would take more, they go a few at a time."""


def varlen_attention(
    query: Tensor,  # (1, Hq, T, D)
    key: Tensor,  # (1, Hkv, T, D)
    value: Tensor,  # (1, Hkv, T, D)
    cu_seqlens: Tensor | Sequence[int],  # (N+1,): 0, the end of document 1, ..., T
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:  # (1, T, Hq, D)
    """softmax(scale * q @ k.T) @ v within each document, causal; Hq is a multiple of Hkv (grouped queries).

    `window`: token i sees tokens j with i - window < j <= i. `softcap`: scores become softcap * tanh(score / softcap).
    `dropout`: the share of attention weights dropped. Pass cu_seqlens as a list where the caller has one: a CUDA tensor
    is copied to the host at each call.
    """
    bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    lengths = [stop - start for start, stop in pairwise(bounds)]
    covers = bounds[0] == 0 and bounds[-1] == query.shape[2] and min(lengths) > 0
    assert covers, "cu_seqlens must rise from 0 to the number of tokens"
    if (count := key_heads_at_a_time(query, key)) < key.shape[1]:
        query_heads = count * query.shape[1] // key.shape[1]
        groups = zip(query.split(query_heads, 1), key.split(count, 1), value.split(count, 1), strict=True)
        outputs = [
            varlen_attention(*group, bounds, scale=scale, window=window, softcap=softcap, dropout=dropout)
            for group in groups
        ]
        return torch.cat(outputs, dim=2)
    if softcap is None and dropout == 0.0 and _flash_varlen_fits(query):
        return _flash_varlen(query, key, value, tuple(bounds), max(lengths), scale, window)

    # split, not slices: its backward is one concatenation, where each slice's would fill a zero tensor of all tokens.
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    documents = [_attend(q, k, v, scale, window, softcap, dropout) for q, k, v in parts]
    return documents[0] if len(documents) == 1 else torch.cat(documents, dim=1)


def key_heads_at_a_time(query: Tensor, key: Tensor) -> int:
    """How many key heads, with the query heads they serve, attention takes at once: all, but of a long context."""
    share = MOST_BACKWARD_BYTES / flash_backward_bytes(query, key)
    return max(int(share * key.shape[1]), 1) if share < 1 else key.shape[1]


def flash_backward_bytes(query: Tensor, key: Tensor) -> int:  # (B, Hq, T, D), (B, Hkv, T, D)
    """What CUDA's variable-length flash attention allocates inside its backward (flash_api.cpp, mha_varlen_bwd).

    The gradient of the queries in fp32 and one number a query, over tokens padded by 128; for grouped queries also
    the keys' and values' gradients of every query head.
    """
    batch, heads, tokens, head_dim = query.shape
    rounding = 32 if head_dim <= 128 else 64
    padded, rounded_dim = batch * (tokens + 128), -(-head_dim // rounding) * rounding
    inside = 4 * heads * padded * (rounded_dim + 1)
    if key.shape[1] != heads:
        inside += 2 * batch * key.shape[2] * heads * head_dim * query.element_size()
    return inside


def _attend(
    query: Tensor,  # (1, Hq, L, D)
    key: Tensor,  # (1, Hkv, L, D)
    value: Tensor,  # (1, Hkv, L, D)
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:  # (1, L, Hq, D)
    """Causal attention in one document: torch's fused one where that makes no scores over all pairs of tokens."""
    _, heads, length, _ = query.shape
    is_windowed = window is not None and length > window
    if is_windowed or softcap is not None or (dropout and not query.is_cuda):
        return blockwise_attention(query, key, value, scale=scale, window=window, softcap=softcap, dropout=dropout)
    group = heads // key.shape[1]
    if query.is_cuda and group > 1:  # there only flash attention takes grouped heads, and it was left aside above
        key, value, group = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), 1
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, dropout_p=dropout, scale=scale, enable_gqa=group > 1
    ).transpose(1, 2)


def _flash_varlen_fits(query: Tensor) -> bool:
    """Whether torch's flash attention takes this: its limits on device, dtype and head size, backward included."""
    head_dim = query.shape[3]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and (head_dim <= 192 or head_dim == 256)
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and varlen_attention_arguments() >= {"scale", "window_size"}
        and kernel_choice() != "reference"
    )


def _flash_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[int, ...],
    longest: int,
    scale: float,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu_seqlens = _bounds_on_device(bounds, query.device)
    grouping = {"enable_gqa": query.shape[1] != key.shape[1]} if "enable_gqa" in varlen_attention_arguments() else {}
    output = varlen_attn(
        query.squeeze(0).transpose(0, 1),  # (T, Hq, D)
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),  # tokens to the left, the query's own not counted
        **grouping,
    )
    assert isinstance(output, Tensor)  # it returns a pair only where the normalisers are asked for
    return output.unsqueeze(0)


@functools.lru_cache(maxsize=4)
def _bounds_on_device(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """Copied once for all layers of a forward and backward, which ask for the same bounds."""
    return torch.tensor(bounds, dtype=torch.int32, device=device)
