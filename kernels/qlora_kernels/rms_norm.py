"""Normalize by the root mean square (Zhang & Sennrich 2019, arXiv:1910.07467), keeping little for backward.

Written in plain torch operations, autograd keeps two or three fp32 tensors of the input's size for each norm; here the
input alone is kept, which the residual keeps anyway, with one number a row, and the rest is made again; so may be the
output, by the layers over it (made_again.py). Three forms are in use, `Form` names them: they differ in where they
round, and in what the weight is. It is frozen and gets no gradient.

Forward and backward are operations of the register: in plain torch, rows a chunk at a time, so that fp32 values of a
long input never exist whole; on CUDA one kernel each (rms_norm_triton.py), which reads and writes 16-bit values once.

Legend: N rows, H features.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.made_again import note_making
from qlora_kernels.registry import define, from_triton
from qlora_kernels.saved_tensors import fetch, keep, saves_tensors, visible

Form = Literal["scale_after_cast", "scale_before_cast", "weight_before_cast"]
"""weight * x_hat.to(dtype), as Llama has it; (x_hat * (1 + weight.float())).to(dtype), as Gemma has it; or
(x_hat * weight.float()).to(dtype), as OLMo 2 has it."""

NORM_CHUNK_ELEMENTS = 1 << 22  # but of a long input no more than NORM_MOST_CHUNKS chunks
NORM_MOST_CHUNKS = 16


def rms_norm(
    x: Tensor,  # (..., H)
    weight: Tensor,  # (H,), frozen, of x's dtype
    eps: float,
    form: Form,
) -> Tensor:  # (..., H)
    """Compute x_hat = x / sqrt(mean(x^2) + eps) in fp32 (fp64 for fp64 input), scaled by the weight as the form says.

    Args:
        x: the input.
        weight: the scale.
        eps: added to the mean square.
        form: where to round, and what the weight is.

    Returns:
        The output, in x's dtype.
    """
    assert not weight.requires_grad, "rms_norm gives its weight no gradient: freeze it"
    assert weight.dtype == x.dtype, "rms_norm takes a weight of its input's dtype"
    output = _RMSNorm.apply(*visible(x), weight, eps, form)
    if output.requires_grad and saves_tensors():
        note_making(output, x, partial(_normalized, weight, eps, form))
    return output


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, form: Form) -> Tensor:
        output, inverse = torch.ops.qlora_kernels.rms_norm(x, weight, eps, form)
        if ctx.needs_input_grad[0]:
            keep(ctx, x, inverse)
        ctx.weight, ctx.form = weight, form
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # grad: (..., H)
        x, inverse = fetch(ctx)
        return torch.ops.qlora_kernels.rms_norm_backward(grad, x, inverse, ctx.weight, ctx.form), None, None, None


def _normalized(weight: Tensor, eps: float, form: Form, x: Tensor) -> Tensor:
    """Make the output of `rms_norm` again, without gradients."""
    return torch.ops.qlora_kernels.rms_norm(x, weight, eps, form)[0]


def normalize_torch(
    x: Tensor,  # (..., H), of N rows
    weight: Tensor,  # (H,)
    eps: float,
    form: Form,
) -> tuple[Tensor, Tensor]:  # (..., H), and (N, 1): one over each row's root mean square, fp32 or wider
    """Define the forward pass in plain torch.

    Args:
        x: the input.
        weight: the scale.
        eps: added to the mean square.
        form: where to round.

    Returns:
        The output, and one over each row's root mean square.
    """
    output, rows = x.new_empty(x.shape), x.reshape(-1, x.shape[-1])
    output_rows, inverse = output.view(rows.shape), rows.new_empty(len(rows), 1, dtype=_wide(x))
    for part in _chunks(*rows.shape):
        inverse[part] = torch.rsqrt(rows[part].to(inverse.dtype).pow(2).mean(-1, keepdim=True) + eps)
        output_rows[part] = _scaled(rows[part] * inverse[part], weight, form)
    return output, inverse


def backward_torch(
    grad: Tensor,  # (..., H) of the output
    x: Tensor,  # (..., H), of N rows
    inverse: Tensor,  # (N, 1)
    weight: Tensor,  # (H,)
    form: Form,
) -> Tensor:  # (..., H)
    """Define the backward pass in plain torch.

    Args:
        grad: of the output.
        x: the input.
        inverse: as forward gives it.
        weight: the scale.
        form: where to round.

    Returns:
        The gradient of the input.
    """
    grad_x, rows = x.new_empty(x.shape), x.reshape(-1, x.shape[-1])
    grad_rows, grads = grad_x.view(rows.shape), grad.reshape(rows.shape)
    for part in _chunks(*rows.shape):
        x_hat = rows[part] * inverse[part]
        grad_hat = _scaled_gradient(grads[part], weight, form)
        along = (grad_hat * x_hat).mean(-1, keepdim=True)
        grad_rows[part] = (grad_hat - x_hat.mul_(along)).mul_(inverse[part])
    return grad_x


def norm_workspace_bytes(x: Tensor, *, backward: bool) -> int:
    """Compute what plain torch uses inside and frees again: two fp32 tensors of a chunk of rows, in backward three.

    Args:
        x: (..., H), the input.
        backward: count backward instead of forward.

    Returns:
        Bytes, beyond inputs and results.
    """
    features = x.shape[-1]
    rows = x.numel() // features
    chunk = max((part.stop - part.start for part in _chunks(rows, features)), default=0)
    return (3 if backward else 2) * min(chunk, rows) * features * _wide(x).itemsize


def _scaled(x_hat: Tensor, weight: Tensor, form: Form) -> Tensor:
    """Multiply x_hat, fp32 or wider, by the weight."""
    if form == "scale_after_cast":
        return weight * x_hat.to(weight.dtype)
    factor = weight.to(x_hat.dtype)
    return x_hat * (factor if form == "weight_before_cast" else 1.0 + factor)


def _scaled_gradient(grad: Tensor, weight: Tensor, form: Form) -> Tensor:
    """Compute the gradient of x_hat, fp32 or wider, from that of the output."""
    if form == "scale_after_cast":
        return (grad * weight).to(_wide(grad))
    factor = weight.to(_wide(grad))
    return grad * (factor if form == "weight_before_cast" else 1.0 + factor)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(rows: int, features: int) -> list[slice]:
    size = max(NORM_CHUNK_ELEMENTS // features, -(-rows // NORM_MOST_CHUNKS), 1)
    return [slice(start, start + size) for start in range(0, rows, size)]


def _normalize_fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], 1, dtype=_wide(x))


define(
    "rms_norm(Tensor x, Tensor weight, float eps, str form) -> (Tensor, Tensor)",
    normalize_torch,
    _normalize_fake,
    cuda=from_triton("rms_norm_triton", "normalize_triton"),
)
define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor inverse, Tensor weight, str form) -> Tensor",
    backward_torch,
    lambda grad, x, *others: x.new_empty(x.shape),
    cuda=from_triton("rms_norm_triton", "backward_triton"),
)
