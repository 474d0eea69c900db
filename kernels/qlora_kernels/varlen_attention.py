"""Causal attention over documents laid end to end, each seeing only itself, without a mask over all tokens.

Packing puts many rows into one sequence without padding. A mask that keeps them apart would cost tokens x tokens; here
each document is attended to by itself, so the cost is the sum of the squares of the lengths, and nothing can leak from
one document into another. On CUDA in 16-bit, torch's variable-length flash attention does the same in one call. Left
out: attention that is not causal, and key/value caches (generation goes through transformers' own attention).
"""

import functools
import inspect
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kernels import kernel_choice


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
    if softcap is None and dropout == 0.0 and _flash_varlen_fits(query):
        return _flash_varlen(query, key, value, tuple(bounds), max(lengths), scale, window)

    # split, not slices: its backward is one concatenation, where each slice's would fill a zero tensor of all tokens.
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    documents = [_attend(q, k, v, scale, window, softcap, dropout).transpose(1, 2) for q, k, v in parts]
    return documents[0] if len(documents) == 1 else torch.cat(documents, dim=1)


def _attend(
    query: Tensor,  # (1, Hq, L, D)
    key: Tensor,  # (1, Hkv, L, D)
    value: Tensor,  # (1, Hkv, L, D)
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:  # (1, Hq, L, D)
    """Causal attention in one document. A mask exists only where the document is longer than the window."""
    if softcap is not None:
        return _attend_with_softcap(query, key, value, scale, window, softcap, dropout)
    length = query.shape[2]
    windowed = window is not None and length > window
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=_visible(length, window, query.device) if windowed else None,
        is_causal=not windowed,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _attend_with_softcap(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float,
    dropout: float,
) -> Tensor:
    """Written out, since torch's fused attention has no soft cap. Softmax in fp32 or wider."""
    _, heads, length, head_dim = query.shape
    query = query.reshape(1, key.shape[1], -1, length, head_dim)  # (1, Hkv, group, L, D)
    scores = (query @ key.unsqueeze(2).mT).to(torch.promote_types(query.dtype, torch.float32)) * scale
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_visible(length, window, query.device), float("-inf"))
    weights = F.dropout(scores.softmax(-1), dropout).to(value.dtype)  # (1, Hkv, group, L, L)
    return (weights @ value.unsqueeze(2)).reshape(1, heads, length, head_dim)


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """(L, L) bool: may token i (row) see token j (column)?"""
    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return visible if window is None else visible.triu(1 - window)


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
        and _has_windowed_varlen_attn()
        and kernel_choice() != "torch"
    )


@functools.cache
def _has_windowed_varlen_attn() -> bool:
    """Earlier versions of torch.nn.attention.varlen have other arguments; those take the loop."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"scale", "window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()


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
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)  # it returns a pair only where the normalisers are asked for
    return output.unsqueeze(0)


@functools.lru_cache(maxsize=4)
def _bounds_on_device(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """Copied once for all layers of a forward and backward, which ask for the same bounds."""
    return torch.tensor(bounds, dtype=torch.int32, device=device)
