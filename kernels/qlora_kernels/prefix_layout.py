"""Lay keys and values out so that each of the documents of a row begins with the same trained ones.

A document of L tokens with a prefix of P keys becomes one of P + L tokens, so attention over documents
(varlen_attention.py) takes it as it takes any other, on every device, with windows that count the prefix. The prefix
has no queries: that of the document's first token is in their places, and what it gives there is dropped, with
its gradient. That costs attention P more rows a document; keys and queries of other numbers would need another
alignment of every fused kernel. Left out: what the trained keys and values are.

Everything is gathered, forward and backward, so sums have one order.

Legend: Hq query heads, Hkv key heads, T tokens of all documents, D head size, N documents, P keys of the prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class PrefixLayout:
    """Say where everything is in a row whose N documents have P keys before them: T + N P places."""

    prefix: int  # P
    bounds: list[int]  # (N + 1,) of the documents with their prefixes
    bounds_on_device: Tensor  # (N + 1,) int32
    tokens: Tensor  # (T,) int64, the place of each token
    prefixes: Tensor  # (N P,) int64, the places of the prefixes
    keys: Tensor  # (T + N P,) int64, what is in each place: of [prefix, tokens]
    queries: Tensor  # (T + N P,) int64, the token whose query is in each place


def prefix_layout(
    prefix: int,
    bounds: Sequence[int],
    device: torch.device,
    bounds_on_device: Tensor | None = None,  # (N + 1,) int32
) -> PrefixLayout:
    """Find the places of documents that each have a prefix before them.

    Args:
        prefix: P.
        bounds: the documents' bounds without prefixes: 0, the end of document 1, ..., T.
        device: of the tokens.
        bounds_on_device: the same on that device, where they are known: else they are copied there.

    Returns:
        The layout.
    """
    if bounds_on_device is None:
        bounds_on_device = torch.tensor(bounds, dtype=torch.int32, device=device)
    shifted = [bound + prefix * number for number, bound in enumerate(bounds)]
    starts = bounds_on_device.long()
    shifted_starts = starts + prefix * torch.arange(len(bounds), device=device)
    tokens = torch.arange(bounds[-1], device=device)
    places = torch.arange(shifted[-1], device=device)
    number = torch.searchsorted(shifted_starts, places, right=True)  # of each place's document, from 1
    inside = places - shifted_starts[number - 1]
    token = places - prefix * number
    return PrefixLayout(
        prefix=prefix,
        bounds=shifted,
        bounds_on_device=shifted_starts.int(),
        tokens=tokens + prefix * torch.searchsorted(starts, tokens, right=True),
        prefixes=(shifted_starts[:-1, None] + torch.arange(prefix, device=device)).flatten(),
        keys=torch.where(inside < prefix, inside, token + prefix),
        queries=torch.where(inside < prefix, starts[number - 1], token),
    )


def with_prefixes(
    prefix: Tensor,  # (Hkv, P, D)
    tokens: Tensor,  # (1, Hkv, T, D)
    layout: PrefixLayout,
) -> Tensor:  # (1, Hkv, T + N P, D)
    """Put the prefix before the keys, or values, of each document, in their dtype.

    The prefix's gradient is summed over documents in fp32, or in fp64 for fp64.

    Args:
        prefix: trained, of any dtype.
        tokens: of all documents.
        layout: of the documents.

    Returns:
        All of them.
    """
    return _WithPrefixes.apply(prefix, tokens, layout)


def queries_in_places(query: Tensor, layout: PrefixLayout) -> Tensor:  # (1, Hq, T, D) -> (1, Hq, T + N P, D)
    """Put queries where their tokens are, and that of each document's first token in the places of its prefix.

    Args:
        query: (1, Hq, T, D), of all documents.
        layout: of the documents.

    Returns:
        All of them.
    """
    return _Queries.apply(query, layout)


def outputs_of_tokens(output: Tensor, layout: PrefixLayout) -> Tensor:  # (1, T + N P, Hq, D) -> (1, T, Hq, D)
    """Take what attention gives for tokens.

    Args:
        output: (1, T + N P, Hq, D), of attention over the documents with their prefixes.
        layout: of the documents.

    Returns:
        That of the tokens.
    """
    return _Outputs.apply(output, layout)


class _WithPrefixes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prefix: Tensor, tokens: Tensor, layout: PrefixLayout) -> Tensor:
        ctx.layout, ctx.dtype = layout, prefix.dtype
        return torch.cat([prefix.to(tokens.dtype).unsqueeze(0), tokens], dim=2).index_select(2, layout.keys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # grad: (1, Hkv, T + N P, D)
        layout: PrefixLayout = ctx.layout
        of_prefix = of_tokens = None
        if ctx.needs_input_grad[0]:
            by_document = grad[0].index_select(1, layout.prefixes).unflatten(1, (-1, layout.prefix))  # (Hkv, N, P, D)
            of_prefix = by_document.sum(1, dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            of_tokens = grad.index_select(2, layout.tokens)
        return of_prefix, of_tokens, None


class _Queries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, layout: PrefixLayout) -> Tensor:
        ctx.layout = layout
        return query.index_select(2, layout.queries)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # grad: (1, Hq, T + N P, D)
        return grad.index_select(2, ctx.layout.tokens), None


class _Outputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, layout: PrefixLayout) -> Tensor:
        ctx.layout = layout
        return output.index_select(1, layout.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # grad: (1, T, Hq, D)
        layout: PrefixLayout = ctx.layout
        return grad.index_select(1, layout.queries).index_fill_(1, layout.prefixes, 0), None
