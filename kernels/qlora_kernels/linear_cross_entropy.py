"""Compute cross entropy straight from the hidden states, without ever holding the logits of all tokens.

For a large vocabulary the logits (tokens x vocabulary, and their gradient) are the peak of a training step. Here only
tokens with a label take part, a chunk of them at a time, and each chunk's gradient is made in forward, while its
probabilities exist: softmax - one_hot, times the head. All of it happens in place, in one tensor of the chunk's logits.
What is kept for backward is a tensor of the hidden states' size. The head is frozen, as everything in QLoRA but the
adapters; it gets no gradient. Where some of its rows train (TrainedRows), their logits are written over those of the
frozen ones, and their gradient is taken out before the frozen head is multiplied: these rows, and nothing of the head's
size, get a gradient.

On a card the logits stay in the dtype of the products, which has rounded them: one kernel computes from them in fp32
and rounds their gradient once, which the next product takes as it is. A logit is written, read twice, overwritten and
read: 5 times its size, so 10 bytes moved in 16 bits, 20 in fp32. On a CPU the logits are fp32, products of lower
precision are widened and narrowed in place (head_rows.py), and there are more passes: in 16 bits 56 bytes a logit, as
once on a card too (`python -m benchmarks.bytes_moved`).

Legend: T tokens, C tokens of a chunk, H hidden size, V vocabulary, R rows of the head that train.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.card import card_of
from qlora_kernels.head_rows import DenseRows, HeadRows, TrainedRows, multiply_by_head, multiply_by_head_transposed_
from qlora_kernels.registry import define
from qlora_kernels.softmax_loss import softmax_loss_

IGNORED = -100
"""The label of a token that is not trained, as in torch's cross_entropy and transformers."""

CHUNK_BYTES = 32 * 2**20
"""Of a chunk's logits, as far as the fewest and MOST_TOKENS allow."""

FEWEST_TOKENS, MOST_TOKENS = 64, 1024

FEWEST_ON_A_CARD = 256
"""A chunk of C tokens reads the head twice, 2 V H numbers, for 4 C V H operations: in 16 bits that is C operations for
each byte. A card that does R operations in the time in which its memory gives a byte waits for the head where C is less
than R. By the rates that a step reaches, R is 47 (RTX 3060) to 267 (L4), so 256 tokens are bound by arithmetic. More
would take memory and save little: all else that a chunk moves, LOGIT_PASSES for each logit, grows with its tokens."""

MOST_CHUNKS = 64
"""Of one call: a long context takes larger chunks, which are little to it, and reads the head no more often."""

ALIGNED = 16
"""Numbers, at multiples of which a row of logits begins on a card: else its tensor cores take slower ways."""

LOGIT_PASSES = 5
"""How often a logit is read or written on a card: by the product, twice and once by the loss, by the next product."""


def linear_cross_entropy(
    hidden: Tensor,  # (T, H)
    head: Tensor | HeadRows,  # (V, H)
    labels: Tensor,  # (T,) int64, already shifted; -100: no label
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,  # None: by the vocabulary
    label_rows: Tensor | None = None,  # (K,) int64; None: to be found
) -> Tensor:  # () fp32
    """Compute the cross entropy summed over the tokens that have a label; 0 where none has.

    Logits are z = (hidden @ head.T + bias) * logit_scale, then softcap * tanh(z / softcap) where given. Products are in
    hidden's dtype, all else in fp32 (fp64 for fp64 input). The gradient goes to hidden, in its dtype, and to the rows
    of the head that train; tokens without a label get zero and never enter the arithmetic. Backward can be called once.
    Memory beyond the hidden states and their gradient: one (C, V), on a card in hidden's dtype, else in fp32, and where
    the head or its products are not used as they are, a block of them.

    Args:
        hidden: of any number of documents.
        head: frozen, but for the values of TrainedRows.
        labels: already shifted; IGNORED where there is none.
        bias: of the head, frozen.
        softcap: bound of the logits.
        logit_scale: what the logits are multiplied by.
        chunk_tokens: C; None: chosen by the vocabulary.
        label_rows: the tokens that have a label, where somebody knows them; to find them, the host waits for a device.

    Returns:
        The sum.
    """
    rows = DenseRows(head) if isinstance(head, Tensor) else head
    if label_rows is None:
        label_rows = torch.ops.qlora_kernels.label_rows(labels)
    on_card = card_of(hidden) is not None
    if chunk_tokens is None:
        chunk_tokens = tokens_of_a_chunk(rows.shape[0], hidden.shape[0], hidden.element_size(), on_card=on_card)
    settings = (label_rows, softcap, logit_scale, chunk_tokens, on_card)
    values = rows.values if isinstance(rows, TrainedRows) else None
    if not torch.is_grad_enabled():
        return _loss_and_gradient(hidden, rows, labels, bias, *settings, with_gradient=False)[0]
    frozen = not any(tensor.requires_grad for tensor in (head, bias) if isinstance(tensor, Tensor))
    assert frozen, "linear_cross_entropy gives the head and its bias no gradient: freeze them (requires_grad_(False))"
    return _LinearCrossEntropy.apply(hidden, values, rows, labels, bias, *settings)


def tokens_of_a_chunk(vocabulary: int, tokens: int, itemsize: int, *, on_card: bool) -> int:
    """Choose how many tokens form a chunk, a multiple of the fewest: FEWEST_TOKENS, on a card FEWEST_ON_A_CARD.

    Args:
        vocabulary: V.
        tokens: T.
        itemsize: bytes of a number of the hidden states.
        on_card: hidden states are on a CUDA card, or planned for one.

    Returns:
        The number whose logits have about CHUNK_BYTES, or a MOST_CHUNKS-th of all tokens, whichever is more.
    """
    fewest = FEWEST_ON_A_CARD if on_card else FEWEST_TOKENS
    fitting = CHUNK_BYTES // ((itemsize if on_card else 4) * vocabulary) // fewest * fewest
    share = -(-tokens // (MOST_CHUNKS * fewest)) * fewest
    return max(min(max(fitting, fewest), MOST_TOKENS), share)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, values: Tensor | None, *arguments: Any) -> Tensor:
        wanted = any(ctx.needs_input_grad[:2])
        loss, ctx.gradient, ctx.of_values = _loss_and_gradient(hidden, *arguments, with_gradient=wanted)
        ctx.values_dtype = None if values is None else values.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        assert gradient is not None, "linear_cross_entropy gives its gradient away in backward: it can be called once"
        of_values, ctx.of_values = ctx.of_values, None
        if of_values is not None:
            of_values = of_values.mul_(grad_loss).to(ctx.values_dtype)
        return (gradient.mul_(grad_loss), of_values, *([None] * 8))


def _loss_and_gradient(
    hidden: Tensor,
    head: HeadRows,
    labels: Tensor,
    bias: Tensor | None,
    label_rows: Tensor,
    softcap: float | None,
    logit_scale: float,
    chunk_tokens: int,
    on_card: bool,
    *,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # (), (T, H) and (R, H)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits_dtype, row_multiple = (hidden.dtype, ALIGNED) if on_card else (dtype, 1)
    loss = torch.zeros((), dtype=dtype, device=hidden.device)
    gradient = torch.zeros_like(hidden) if with_gradient else None
    trained = head if isinstance(head, TrainedRows) else None
    frozen = head if trained is None else trained.frozen
    of_values = torch.zeros_like(trained.values, dtype=dtype) if trained is not None and with_gradient else None
    for rows in label_rows.split(chunk_tokens):
        targets = labels.index_select(0, rows).unsqueeze(1)  # (C, 1)
        chunk = hidden.index_select(0, rows)  # (C, H)
        logits = multiply_by_head(chunk, frozen, logits_dtype, row_multiple, head.shape[0])  # (C, V)
        if trained is not None:
            own = chunk @ trained.values.detach().to(chunk.dtype).T  # (C, R)
            logits.index_copy_(1, trained.ids, own.to(logits_dtype))
            del own
        del chunk
        losses = softmax_loss_(
            logits, targets, bias=bias, softcap=softcap, logit_scale=logit_scale, with_gradient=with_gradient
        )
        loss += losses.sum()
        if gradient is not None:  # the logits are their gradient now
            if trained is not None and of_values is not None:
                own = logits.index_select(1, trained.ids)  # (C, R)
                logits.index_fill_(1, trained.ids, 0)
                of_values.addmm_(own.T.to(dtype), hidden.index_select(0, rows).to(dtype))
            of_chunk = multiply_by_head_transposed_(logits, frozen, hidden.dtype)  # (C, H)
            if trained is not None:
                of_chunk.addmm_(own.to(hidden.dtype), trained.values.detach().to(hidden.dtype))
                del own
            gradient.index_copy_(0, rows, of_chunk)
            del of_chunk
        del logits  # or they would still be there when the next chunk's are made
    return loss, gradient, of_values


def _label_rows(labels: Tensor) -> Tensor:
    """Return the rows that have a label, (K,) int64."""
    return (labels != IGNORED).nonzero().squeeze(1)


def _label_rows_fake(labels: Tensor) -> Tensor:
    # On fake tensors the number is unknown: plan for the most, a label on every row.
    return labels.new_empty(labels.shape, dtype=torch.int64)


define("label_rows(Tensor labels) -> Tensor", _label_rows, _label_rows_fake)
