"""Compute cross entropy straight from the hidden states, without ever holding the logits of all tokens.

For a large vocabulary the logits (tokens x vocabulary, fp32, and their gradient) are the peak of a training step. Here
only tokens with a label take part, a chunk of them at a time, and each chunk's gradient is made in forward, while its
probabilities exist: softmax - one_hot, times the head. All of it happens in place, in one fp32 tensor of the chunk's
logits, products of lower precision too (head_rows.py). What is kept for backward is a tensor of the hidden states'
size. The head is frozen, as everything in QLoRA but the adapters; it gets no gradient.

Legend: T tokens, C tokens of a chunk, H hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.head_rows import FEWEST_BLOCKS, DenseRows, HeadRows, multiply_by_head, multiply_by_head_transposed_
from qlora_kernels.registry import define

IGNORED = -100
"""The label of a token that is not trained, as in torch's cross_entropy and transformers."""

CHUNK_BYTES = 32 * 2**20
"""Of a chunk's logits in fp32, as far as FEWEST_TOKENS and MOST_TOKENS allow."""

FEWEST_TOKENS, MOST_TOKENS = 64, 1024

MOST_CHUNKS = 64
"""Of one call: a long context takes larger chunks, which are little to it, and reads the head no more often."""


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
    hidden's dtype, all else in fp32 (fp64 for fp64 input). The gradient goes to hidden only, in its dtype; rows without
    a label get zero and never enter the arithmetic. Backward can be called once. Memory beyond the hidden states and
    their gradient: one (C, V) in fp32, and where the head or its products are not used as they are, a block of them.

    Args:
        hidden: of any number of documents.
        head: frozen.
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
    settings = (label_rows, softcap, logit_scale, chunk_tokens or tokens_of_a_chunk(rows.shape[0], hidden.shape[0]))
    if not torch.is_grad_enabled():
        return _loss_and_gradient(hidden, rows, labels, bias, *settings, with_gradient=False)[0]
    frozen = not any(tensor.requires_grad for tensor in (head, bias) if isinstance(tensor, Tensor))
    assert frozen, "linear_cross_entropy gives the head and its bias no gradient: freeze them (requires_grad_(False))"
    return _LinearCrossEntropy.apply(hidden, rows, labels, bias, *settings)


def tokens_of_a_chunk(vocabulary: int, tokens: int) -> int:
    """Choose how many tokens form a chunk, a multiple of FEWEST_TOKENS.

    Args:
        vocabulary: V.
        tokens: T.

    Returns:
        The number whose logits have about CHUNK_BYTES, or a MOST_CHUNKS-th of all tokens, whichever is more.
    """
    fitting = CHUNK_BYTES // (4 * vocabulary) // FEWEST_TOKENS * FEWEST_TOKENS
    share = -(-tokens // (MOST_CHUNKS * FEWEST_TOKENS)) * FEWEST_TOKENS
    return max(min(max(fitting, FEWEST_TOKENS), MOST_TOKENS), share)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *arguments: Any) -> Tensor:
        loss, ctx.gradient = _loss_and_gradient(hidden, *arguments, with_gradient=ctx.needs_input_grad[0])
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        assert gradient is not None, "linear_cross_entropy gives its gradient away in backward: it can be called once"
        return (gradient.mul_(grad_loss), *([None] * 7))


def _loss_and_gradient(
    hidden: Tensor,
    head: HeadRows,
    labels: Tensor,
    bias: Tensor | None,
    label_rows: Tensor,
    softcap: float | None,
    logit_scale: float,
    chunk_tokens: int,
    *,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:  # () and (T, H)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    loss = torch.zeros((), dtype=dtype, device=hidden.device)
    gradient = torch.zeros_like(hidden) if with_gradient else None
    for rows in label_rows.split(chunk_tokens):
        targets = labels.index_select(0, rows).unsqueeze(1)  # (C, 1)
        chunk = hidden.index_select(0, rows)  # (C, H)
        logits = multiply_by_head(chunk, head, dtype)  # (C, V)
        del chunk
        if bias is not None:
            logits += bias
        if logit_scale != 1.0:
            logits *= logit_scale
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        target_logits = logits.gather(1, targets)  # (C, 1)
        largest = logits.amax(dim=1, keepdim=True)
        sums = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
        log_normalizer = sums.log() + largest
        loss += (log_normalizer - target_logits).sum()
        if gradient is not None:
            probabilities = logits.div_(sums)
            if softcap is None:
                probabilities.scatter_add_(1, targets, torch.full_like(sums, -1.0))
            else:
                _through_softcap_(probabilities, log_normalizer, targets, target_logits, softcap)
            if logit_scale != 1.0:
                probabilities *= logit_scale
            gradient.index_copy_(0, rows, multiply_by_head_transposed_(probabilities, head, hidden.dtype))
            del probabilities
        del logits  # or they would still be there when the next chunk's are made
    return loss, gradient


def _through_softcap_(
    probabilities: Tensor,  # (C, V); becomes the gradient of the logits before the cap
    log_normalizer: Tensor,  # (C, 1)
    targets: Tensor,  # (C, 1)
    target_logits: Tensor,  # (C, 1), capped
    softcap: float,
) -> None:
    """Multiply (probabilities - one_hot) by the slope of softcap * tanh(z / softcap), 1 - (capped / softcap)^2.

    The capped logits are read back from the probabilities, a few columns at a time, instead of being kept: where a
    probability is too small for that, so is its product. The target's own is exact.
    """
    for part in probabilities.tensor_split(FEWEST_BLOCKS, dim=1):
        capped = part.log().add_(log_normalizer).clamp_(-softcap, softcap)
        part.mul_(capped.div_(softcap).square_().neg_().add_(1.0))
        del capped
    probabilities.scatter_add_(1, targets, (target_logits / softcap).square_().sub_(1.0))


def _label_rows(labels: Tensor) -> Tensor:
    """Return the rows that have a label, (K,) int64."""
    return (labels != IGNORED).nonzero().squeeze(1)


def _label_rows_fake(labels: Tensor) -> Tensor:
    # On fake tensors the number is unknown: plan for the most, a label on every row.
    return labels.new_empty(labels.shape, dtype=torch.int64)


define("label_rows(Tensor labels) -> Tensor", _label_rows, _label_rows_fake)
