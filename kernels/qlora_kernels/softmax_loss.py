"""Compute the loss of each token from its logits, and put their gradient, softmax - one_hot, in their place.

A bias, a scale and a soft cap are applied on the way. On CUDA one kernel does all of it (softmax_loss_triton.py). Plain
torch works in fp32, in place, and is what a CPU takes: logits of 16 bits it widens a few tokens at a time.

Legend: C tokens, V vocabulary.
"""

import torch
from torch import Tensor

from qlora_kernels.registry import define, from_triton

FEWEST_PARTS = 16
"""Into which tokens or columns are cut where plain torch needs a second tensor."""


def softmax_loss_(
    logits: Tensor,  # (C, V), each row in one piece; its contents are lost
    targets: Tensor,  # (C, 1) int64
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_gradient: bool = True,
) -> Tensor:  # (C, 1) fp32, or fp64
    """Compute the cross entropy of each token; `logits` becomes its gradient.

    The loss is of z = (logits + bias) * logit_scale, then softcap * tanh(z / softcap) where given. All is computed in
    fp32 (fp64 for fp64 logits), and the gradient rounded once to the dtype of `logits`. The loss of a row in which a z
    is NaN or positive infinity is not finite.

    Args:
        logits: overwritten.
        targets: the labels.
        bias: of the head.
        softcap: bound of the logits.
        logit_scale: what the logits are multiplied by.
        with_gradient: False: what is left in `logits` means nothing.

    Returns:
        The losses.
    """
    return torch.ops.qlora_kernels.softmax_loss(logits, targets, bias, softcap, logit_scale, with_gradient)


def softmax_loss_torch(
    logits: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float, with_gradient: bool
) -> Tensor:
    """Define `softmax_loss_` in plain torch.

    Args:
        logits: (C, V), overwritten.
        targets: (C, 1).
        bias: (V,) or None.
        softcap: or None.
        logit_scale: a factor.
        with_gradient: make the gradient.

    Returns:
        The losses (C, 1).
    """
    settings = (bias, softcap, logit_scale, with_gradient)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if logits.dtype == dtype:
        return _in_place(logits, targets, *settings)
    losses = logits.new_empty(targets.shape, dtype=dtype)
    for rows in _row_parts(len(logits)):
        wide = logits[rows].to(dtype)
        losses[rows] = _in_place(wide, targets[rows], *settings)
        if with_gradient:
            logits[rows] = wide
        del wide  # or it would still be there when the next part is made
    return losses


def softmax_loss_workspace_bytes(logits: Tensor, softcap: float | None, with_gradient: bool) -> int:  # (C, V)
    """Compute what plain torch uses inside and frees again: copies of parts of the logits, and numbers of each token.

    Args:
        logits: (C, V), as given to it.
        softcap: as given to it.
        with_gradient: as given to it.

    Returns:
        Bytes, beyond arguments and results.
    """
    tokens, vocabulary = logits.shape
    size = torch.promote_types(logits.dtype, torch.float32).itemsize
    inside = 0
    if logits.element_size() < size:
        tokens = -(tokens // -FEWEST_PARTS)
        inside += tokens * vocabulary * size
    if softcap is not None and with_gradient:
        inside += tokens * -(vocabulary // -FEWEST_PARTS) * size
    return inside + 4 * tokens * size


def _in_place(
    logits: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float, with_gradient: bool
) -> Tensor:
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
    if with_gradient:
        probabilities = logits.div_(sums)
        if softcap is None:
            probabilities.scatter_add_(1, targets, torch.full_like(sums, -1.0))
        else:
            _through_softcap_(probabilities, log_normalizer, targets, target_logits, softcap)
        if logit_scale != 1.0:
            probabilities *= logit_scale
    return log_normalizer - target_logits


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
    for part in probabilities.tensor_split(FEWEST_PARTS, dim=1):
        capped = part.log().add_(log_normalizer).clamp_(-softcap, softcap)
        part.mul_(capped.div_(softcap).square_().neg_().add_(1.0))
        del capped
    probabilities.scatter_add_(1, targets, (target_logits / softcap).square_().sub_(1.0))


def _row_parts(tokens: int) -> list[slice]:
    rows = max(-(tokens // -FEWEST_PARTS), 1)
    return [slice(start, start + rows) for start in range(0, tokens, rows)]


define(
    "softmax_loss(Tensor(a!) logits, Tensor targets, Tensor? bias, float? softcap, float logit_scale,"
    " bool with_gradient) -> Tensor",
    softmax_loss_torch,
    lambda logits, targets, *others: logits.new_empty(
        targets.shape, dtype=torch.promote_types(logits.dtype, torch.float32)
    ),
    cuda=from_triton("softmax_loss_triton", "softmax_loss_triton"),
)
