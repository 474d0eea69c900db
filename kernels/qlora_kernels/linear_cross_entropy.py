"""Cross entropy straight from the hidden states, without ever holding the logits of all tokens.

For a large vocabulary the logits (tokens x vocabulary, fp32, and their gradient) are the peak of a training step. Here
only tokens with a label take part, a chunk of them at a time, and each chunk's gradient is made in forward, while its
probabilities exist: softmax - one_hot, times the head. What is kept for backward is one tensor of the hidden states'
size. The head is frozen, as everything in QLoRA but the adapters; it gets no gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""The label of a token that is not learned, as in torch's cross_entropy and transformers."""


def linear_cross_entropy(
    hidden: Tensor,  # (T, H)
    head: Tensor,  # (V, H)
    labels: Tensor,  # (T,) int64, already shifted; -100: no label
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int = 512,
) -> Tensor:  # () fp32
    """The cross entropy SUMMED over the tokens that have a label; 0 where none has.

    Logits are z = (hidden @ head.T + bias) * logit_scale, then softcap * tanh(z / softcap) where given. Products are in
    hidden's dtype, softmax and sum in fp32 (fp64 for fp64 input). The gradient goes to hidden only, in its dtype; rows
    without a label get zero and never enter the arithmetic. Memory: a few tensors of (chunk_tokens, V).
    """
    head, bias = head.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    settings = (softcap, logit_scale, chunk_tokens)
    if not torch.is_grad_enabled():
        return _loss_and_gradient(hidden, head, labels, bias, *settings, with_gradient=False)[0]
    frozen = not any(tensor.requires_grad for tensor in (head, bias) if tensor is not None)
    assert frozen, "linear_cross_entropy gives the head and its bias no gradient: freeze them (requires_grad_(False))"
    return _LinearCrossEntropy.apply(hidden, head, labels, bias, *settings)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *arguments: Any) -> Tensor:
        loss, gradient = _loss_and_gradient(hidden, *arguments, with_gradient=ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_loss, *([None] * 6))


def _loss_and_gradient(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    chunk_tokens: int,
    *,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:  # () and (T, H)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    loss = torch.zeros((), dtype=dtype, device=hidden.device)
    gradient = torch.zeros_like(hidden) if with_gradient else None
    for rows in torch.ops.qlora.label_rows(labels).split(chunk_tokens):
        targets = labels.index_select(0, rows).unsqueeze(1)  # (C, 1)
        logits = F.linear(hidden.index_select(0, rows), head, bias).to(dtype)  # (C, V)
        if logit_scale != 1.0:
            logits *= logit_scale
        slope = None
        if softcap is not None:
            logits = logits.div_(softcap).tanh_()
            slope = 1 - logits.square() if with_gradient else None  # of softcap * tanh(z / softcap)
            logits *= softcap
        log_normaliser = logits.logsumexp(dim=1, keepdim=True)  # (C, 1)
        loss += (log_normaliser - logits.gather(1, targets)).sum()
        if gradient is None:
            del logits  # or the next chunk's would be made beside them
            continue
        grad_logits = logits.sub_(log_normaliser).exp_()  # the probabilities
        grad_logits.scatter_add_(1, targets, torch.full_like(log_normaliser, -1.0))
        if slope is not None:
            grad_logits *= slope
        if logit_scale != 1.0:
            grad_logits *= logit_scale
        gradient.index_copy_(0, rows, grad_logits.to(hidden.dtype) @ head)
        del logits, grad_logits
    return loss, gradient


def _label_rows(labels: Tensor) -> Tensor:
    """(K,) int64: the rows that have a label."""
    return (labels != IGNORED).nonzero().squeeze(1)


def _label_rows_fake(labels: Tensor) -> Tensor:
    # On fake tensors the number is unknown: plan for the most, a label on every row.
    return labels.new_empty(labels.shape, dtype=torch.int64)


torch.library.define("qlora::label_rows", "(Tensor labels) -> Tensor")
torch.library.impl("qlora::label_rows", "CompositeExplicitAutograd", _label_rows)
torch.library.register_fake("qlora::label_rows", _label_rows_fake)
