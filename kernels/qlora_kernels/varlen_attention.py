"""Compute causal attention over documents laid end to end, each seeing only itself, without a mask over all tokens.

Packing puts many rows into one sequence without padding. A mask that keeps them apart would cost tokens x tokens; here
each document is attended to by itself, so the cost is the sum of the squares of the lengths, and nothing can leak from
one document into another. On CUDA in 16-bit, torch's variable-length flash attention does the same in one call; on a
CPU its fused attention takes each document, and the output is kept once (cpu_attention.py). Where no fused attention
can do it without a matrix of scores or a mask (a window, a soft cap, dropout on a CPU), it goes by blocks of queries
(blockwise_attention.py), so a long document costs no square in memory either. Left out: attention that is not causal,
and key/value caches (generation goes through transformers' own attention).

Legend: Hq query heads, Hkv key heads, T tokens of all documents, L of one, D head size, N documents.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kernels.blockwise_attention import blockwise_attention
from qlora_kernels.card import card_of
from qlora_kernels.cpu_attention import attend_to_documents, takes_documents
from qlora_kernels.flash_attention import flash_attention
from qlora_kernels.torch_features import has_flash_attention, varlen_attention_arguments
from qlora_kernels.torch_internals import efficient_attention

MOST_BACKWARD_BYTES = 2**28
"""Of memory inside flash attention's backward: where all heads at once would take more, they go a few at a time."""


def varlen_attention(
    query: Tensor,  # (1, Hq, T, D)
    key: Tensor,  # (1, Hkv, T, D)
    value: Tensor,  # (1, Hkv, T, D)
    cu_seqlens: Tensor | Sequence[int],  # (N+1,): 0, the end of document 1, ..., T
    bounds_on_device: Tensor | None = None,  # (N+1,) int32
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:  # (1, T, Hq, D)
    """Compute softmax(scale * q @ k.T) @ v within each document, causal; Hq is a multiple of Hkv (grouped queries).

    Args:
        query: of all documents.
        key: of all documents.
        value: of all documents.
        cu_seqlens: the documents' bounds. Pass a list where there is one: a CUDA tensor is copied to the host at each
            call.
        bounds_on_device: the same on the query's device. Pass them where they are known, as all layers take the same:
            else flash attention has them copied there at each call, and the host waits for that.
        scale: what products of queries and keys are multiplied by.
        window: token i sees tokens j with i - window < j <= i; None: all before it.
        softcap: scores become softcap * tanh(score / softcap); None: they stay.
        dropout: the share of attention weights dropped.

    Returns:
        The output, heads after tokens.
    """
    bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    lengths = [stop - start for start, stop in pairwise(bounds)]
    covers = bounds[0] == 0 and bounds[-1] == query.shape[2] and min(lengths) > 0
    assert covers, "cu_seqlens must rise from 0 to the number of tokens"
    card = card_of(query)
    is_plain = softcap is None and dropout == 0.0
    sees_all = window is None or max(lengths) <= window
    if card is None and is_plain and sees_all and takes_documents(query, key, value):
        return attend_to_documents(query, key, value, lengths, scale)
    takes_flash = card is not None and is_plain and card.flash_refusal(query.dtype, query.shape[3]) is None
    processors = card.processors_summed_over(query.dtype) if card else 0
    if takes_flash and bounds_on_device is None:
        bounds_on_device = torch.tensor(bounds, dtype=torch.int32, device=query.device)
    count = key_heads_at_a_time(query, key, len(lengths) if takes_flash else 1, processors)
    if count < key.shape[1]:
        query_heads = count * query.shape[1] // key.shape[1]
        groups = zip(query.split(query_heads, 1), key.split(count, 1), value.split(count, 1), strict=True)
        settings: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "dropout": dropout}
        return torch.cat([varlen_attention(*group, bounds, bounds_on_device, **settings) for group in groups], dim=2)
    if takes_flash:
        assert bounds_on_device is not None
        return _flash_varlen(query, key, value, bounds_on_device, max(lengths), scale, window)

    # split, not slices: its backward is one concatenation, where each slice's would fill a zero tensor of all tokens.
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    documents = [_attend(q, k, v, scale, window, softcap, dropout, is_on_card=card is not None) for q, k, v in parts]
    return documents[0] if len(documents) == 1 else torch.cat(documents, dim=1)


def key_heads_at_a_time(
    query: Tensor,  # (1, Hq, T, D)
    key: Tensor,  # (1, Hkv, T, D)
    documents: int = 1,
    processors: int = 0,
) -> int:
    """Choose how many key heads, with the query heads they serve, attention takes at once.

    Args:
        query: of all documents.
        key: of all documents.
        documents: their number.
        processors: those with sums of their own, as Card.processors_summed_over gives them.

    Returns:
        The most whose backward keeps to MOST_BACKWARD_BYTES inside. Where not even one does, one; or, where sums are
        kept apart for `processors` and fewer heads have more such sums each, the number that takes least.
    """
    _, heads, tokens, head_dim = query.shape
    key_heads, size = key.shape[1], query.element_size()

    def inside(count: int) -> int:
        group = count * heads // key_heads
        return flash_backward_bytes(tokens, group, count, head_dim, size, documents, processors)

    counts = range(key_heads, 0, -1)
    fitting = next((count for count in counts if inside(count) <= MOST_BACKWARD_BYTES), None)
    return fitting or min(counts, key=inside)


def flash_backward_bytes(
    tokens: int,  # of all documents
    query_heads: int,
    key_heads: int,
    head_dim: int,
    element_size: int,  # bytes
    documents: int = 1,
    processors: int = 0,  # those with sums of their own, as Card.processors_summed_over gives them
) -> int:
    """Compute what CUDA's flash attention allocates inside its backward (flash_api.cpp, mha_varlen_bwd).

    That is the gradient of the queries in fp32 and one number a query, over tokens padded by 128 a document; in a
    deterministic backward that gradient as often as there are processors for each head of each document; for grouped
    queries also the keys' and values' gradients of every query head.

    Args:
        tokens: of all documents.
        query_heads: Hq.
        key_heads: Hkv.
        head_dim: D.
        element_size: bytes of an element.
        documents: N.
        processors: those with sums of their own, as Card.processors_summed_over gives them.

    Returns:
        Bytes.
    """
    rounding = 32 if head_dim <= 128 else 64
    rounded_dim = -(-head_dim // rounding) * rounding
    sums = max(-(-processors // (documents * query_heads)), 1)
    inside = 4 * query_heads * (tokens + 128 * documents) * (rounded_dim * sums + 1)
    if key_heads != query_heads:
        inside += 2 * tokens * query_heads * head_dim * element_size
    return inside


def _attend(
    query: Tensor,  # (1, Hq, L, D)
    key: Tensor,  # (1, Hkv, L, D)
    value: Tensor,  # (1, Hkv, L, D)
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
    *,
    is_on_card: bool,  # these tensors, or those they represent
) -> Tensor:  # (1, L, Hq, D)
    """Compute causal attention in one document, by torch's fused one where that makes no scores over all pairs."""
    _, heads, length, _ = query.shape
    is_windowed = window is not None and length > window
    if is_windowed or softcap is not None or (dropout and not is_on_card):
        return blockwise_attention(query, key, value, scale=scale, window=window, softcap=softcap, dropout=dropout)
    group = heads // key.shape[1]
    if is_on_card and group > 1:  # there only flash attention takes grouped heads, and it was left aside above
        key, value, group = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), 1
    if is_on_card and not query.is_cuda:  # what torch takes there; it would choose by where these tensors are
        for_backward = any(tensor.requires_grad for tensor in (query, key, value))
        output = efficient_attention(query, key, value, scale=scale, dropout=dropout, for_backward=for_backward)
        return output.transpose(1, 2)
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, dropout_p=dropout, scale=scale, enable_gqa=group > 1
    ).transpose(1, 2)


def _flash_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,  # (N+1,)
    longest: int,
    scale: float,
    window: int | None,
) -> Tensor:  # (1, T, Hq, D)
    if has_flash_attention():
        return flash_attention(query, key, value, bounds, longest, scale, window)
    from torch.nn.attention.varlen import varlen_attn

    grouping: dict[str, Any] = (
        {"enable_gqa": query.shape[1] != key.shape[1]} if "enable_gqa" in varlen_attention_arguments() else {}
    )
    output = varlen_attn(
        query.squeeze(0).transpose(0, 1),  # (T, Hq, D)
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        bounds,
        bounds,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),  # tokens to the left, the query's own not counted
        **grouping,
    )
    assert isinstance(output, Tensor)  # it returns a pair only where the normalizers are asked for
    return output.unsqueeze(0)
