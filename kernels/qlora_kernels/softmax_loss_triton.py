"""Compute the loss of tokens on CUDA, and the gradient of their logits in their place, by one program for each token.

The contract is softmax_loss.py's. A program goes over its row twice: first it sums exponentials next to the largest
logit so far, each lane for itself (Milakov & Gimelshein 2018, arXiv:1805.02867); then it writes the gradient over the
logits. So each logit is read twice and written once. Between, values are fp32, logits of 16 bits too, and the gradient
is rounded once. Left out: fp64, which goes to plain torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels import softmax_loss

LOGITS_PER_TURN = 4096
SOFTMAX_LOSS_OPTIONS = {"num_warps": 16, "enable_fp_fusion": True}  # fewer roundings
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32: next to -inf it is a number, and their difference -inf


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """Compute tanh in fp32, to about an ulp."""  # noqa: DOC101, DOC103, DOC106, DOC107, DOC201
    # As Cephes' tanhf: a polynomial near zero, where the other form loses digits.
    square = x * x
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    size = tl.abs(x)
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * size))
    return tl.where(size < 0.625, x + x * square * near, tl.where(x < 0.0, -far, far))


@triton.jit
def finished(logit, bias, softcap, logit_scale, HAS_CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Make the logit that the loss is of from the product with the head."""  # noqa: DOC101, DOC103, DOC107, DOC201
    z = (logit.to(tl.float32) + bias) * logit_scale
    if HAS_CAP:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def softmax_loss_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # (C, V), rows `stride` apart; overwritten by the gradient
    targets_ptr,  # (C,)
    bias_ptr,  # (V,); not read without HAS_BIAS
    losses_ptr,  # (C,)
    columns,  # V
    stride,
    softcap,
    logit_scale,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute one token's loss, and the gradient of its logits."""  # noqa: DOC101, DOC103, DOC107
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    is_there = (target >= 0) & (target < columns)
    # A label outside the vocabulary has no logit: its loss is NaN.
    target_logit = tl.load(logits_ptr + target, mask=is_there, other=float("nan"))
    target_bias = tl.load(bias_ptr + target, mask=is_there, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    target_logit = finished(target_logit, target_bias, softcap, logit_scale, HAS_CAP)

    largest = tl.full((BLOCK,), LOWEST, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        logit = tl.load(logits_ptr + column, mask=inside, other=0.0)
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
        z = tl.where(inside, finished(logit, bias, softcap, logit_scale, HAS_CAP), float("-inf"))
        larger = tl.maximum(largest, z)
        sums = sums * tl.exp(largest - larger) + tl.exp(z - larger)  # NaN stays: z is in the second term
        largest = larger
    top = tl.max(largest, axis=0)
    total = tl.sum(sums * tl.exp(largest - top), axis=0)
    tl.store(losses_ptr + row, tl.log(total) + top - target_logit)

    if WITH_GRADIENT:
        inverse = 1.0 / total
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < columns
            logit = tl.load(logits_ptr + column, mask=inside, other=0.0)
            bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
            z = finished(logit, bias, softcap, logit_scale, HAS_CAP)
            gradient = tl.exp(z - top) * inverse
            gradient = tl.where(column == target, gradient - 1.0, gradient)
            if HAS_CAP:
                share = z / softcap
                gradient *= 1.0 - share * share
            gradient *= logit_scale
            tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


def softmax_loss_triton(
    logits: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float, with_gradient: bool
) -> Tensor:
    """Compute `softmax_loss.softmax_loss_torch` by one kernel.

    Args:
        logits: (C, V), overwritten; rows may lie apart.
        targets: (C, 1).
        bias: (V,) or None.
        softcap: or None.
        logit_scale: a factor.
        with_gradient: make the gradient.

    Returns:
        The losses (C, 1).
    """
    if logits.dtype == torch.float64 or logits.stride(1) != 1:
        return softmax_loss.softmax_loss_torch(logits, targets, bias, softcap, logit_scale, with_gradient)
    losses = logits.new_empty(targets.shape, dtype=torch.float32)
    if len(logits):
        with torch.cuda.device_of(logits):  # Triton launches on the current device
            softmax_loss_kernel[(len(logits),)](
                logits,
                targets.contiguous(),
                logits if bias is None else bias.contiguous(),
                losses,
                logits.shape[1],
                logits.stride(0),
                1.0 if softcap is None else softcap,
                logit_scale,
                HAS_BIAS=bias is not None,
                HAS_CAP=softcap is not None,
                WITH_GRADIENT=with_gradient,
                BLOCK=LOGITS_PER_TURN,
                **SOFTMAX_LOSS_OPTIONS,
            )
    return losses
