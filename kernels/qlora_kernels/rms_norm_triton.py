"""Normalize by the root mean square on CUDA: forward and backward each read their rows once and write them once.

The contract is rms_norm.py's: fp32 within a row, rounded where the form says. Plain torch makes half a dozen fp32
tensors of the rows' size instead. Sums run in another order, so the last bits may differ; the weight is frozen, so
backward has no second sum over the rows. Left out: rows of more than MOST_FEATURES, and fp64, which go to plain torch.

Legend: N rows, H features.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels import rms_norm
from qlora_kernels.rms_norm import Form

_ELEMENTS_PER_PROGRAM = 4096  # rows of few features, such as those of an attention head, go several at a time
MOST_FEATURES = 16384
RMS_NORM_OPTIONS = {"enable_fp_fusion": True}  # fewer roundings


@triton.jit
def normalize_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (N, H), rows `stride` apart
    weight_ptr,  # (H,)
    out_ptr,  # (N, H)
    inverse_ptr,  # (N,)
    eps,
    rows,
    features,
    stride,
    CAST_FIRST: tl.constexpr,  # the form is scale_after_cast
    SHIFT: tl.constexpr,  # added to the weight: 1 where the form is scale_before_cast, else 0
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Normalize some rows, and keep the inverse of each row's root mean square."""  # noqa: DOC101, DOC103, DOC107
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    feature = tl.arange(0, FEATURES)
    inside = (row < rows)[:, None] & (feature < features)[None, :]
    x = tl.load(x_ptr + row[:, None] * stride + feature[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + feature, mask=feature < features, other=0.0).to(tl.float32)[None, :]
    inverse = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / features + eps)
    x_hat = x * inverse[:, None]
    # The product of two 16-bit values is exact in fp32: rounded once more, as plain torch has it.
    y = x_hat.to(out_ptr.dtype.element_ty).to(tl.float32) * weight if CAST_FIRST else x_hat * (SHIFT + weight)
    tl.store(out_ptr + row[:, None] * features + feature[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(inverse_ptr + row, inverse, mask=row < rows)


@triton.jit
def backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # (N, H), rows `grad_stride` apart
    x_ptr,  # (N, H), rows `stride` apart
    inverse_ptr,  # (N,)
    weight_ptr,  # (H,)
    out_ptr,  # (N, H)
    rows,
    features,
    grad_stride,
    stride,
    CAST_FIRST: tl.constexpr,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Compute the gradient of some rows."""  # noqa: DOC101, DOC103, DOC107
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    feature = tl.arange(0, FEATURES)
    inside = (row < rows)[:, None] & (feature < features)[None, :]
    grad = tl.load(grad_ptr + row[:, None] * grad_stride + feature[None, :], mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row[:, None] * stride + feature[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + feature, mask=feature < features, other=0.0).to(tl.float32)[None, :]
    inverse = tl.load(inverse_ptr + row, mask=row < rows, other=0.0)[:, None]
    x_hat = x * inverse
    grad_hat = grad * weight if CAST_FIRST else grad * (SHIFT + weight)
    along = tl.sum(grad_hat * x_hat, axis=1)[:, None] / features
    grad_x = (grad_hat - x_hat * along) * inverse
    tl.store(out_ptr + row[:, None] * features + feature[None, :], grad_x.to(out_ptr.dtype.element_ty), mask=inside)


def tile(features: int) -> dict[str, Any]:
    """Choose how rows of so many features are launched.

    Args:
        features: H.

    Returns:
        The kernels' constants ROWS and FEATURES, and num_warps.
    """
    padded = triton.next_power_of_2(features)
    rows = max(_ELEMENTS_PER_PROGRAM // padded, 1)
    return {"ROWS": rows, "FEATURES": padded, "num_warps": max(padded * rows // 1024, 4)}


def normalize_triton(x: Tensor, weight: Tensor, eps: float, form: Form) -> tuple[Tensor, Tensor]:
    """Compute `rms_norm.normalize_torch` in one pass.

    Args:
        x: (..., H), of N rows.
        weight: (H,).
        eps: added to the mean square.
        form: where to round.

    Returns:
        The output (..., H), and one over each row's root mean square (N, 1), fp32.
    """
    features = x.shape[-1]
    count = x.numel() // features
    if features > MOST_FEATURES or x.dtype == torch.float64:
        return rms_norm.normalize_torch(x, weight, eps, form)
    output, inverse = x.new_empty(x.shape), x.new_empty(count, 1, dtype=torch.float32)
    if count:
        launch, (rows, stride) = tile(features), _rows(x)
        with torch.cuda.device_of(rows):  # Triton launches on the current device
            normalize_kernel[(triton.cdiv(count, launch["ROWS"]),)](
                rows,
                weight.contiguous(),
                output,
                inverse,
                eps,
                count,
                features,
                stride,
                CAST_FIRST=form == "scale_after_cast",
                SHIFT=float(form == "scale_before_cast"),
                **launch,
                **RMS_NORM_OPTIONS,
            )
    return output, inverse


def backward_triton(grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, form: Form) -> Tensor:
    """Compute `rms_norm.backward_torch` in one pass.

    Args:
        grad: (..., H).
        x: (..., H), of N rows.
        inverse: (N, 1).
        weight: (H,).
        form: where to round.

    Returns:
        The gradient of the input (..., H).
    """
    features = x.shape[-1]
    count = x.numel() // features
    if features > MOST_FEATURES or x.dtype == torch.float64:
        return rms_norm.backward_torch(grad, x, inverse, weight, form)
    grad_x = x.new_empty(x.shape)
    if count:
        launch, (grads, grad_stride), (rows, stride) = tile(features), _rows(grad), _rows(x)
        with torch.cuda.device_of(rows):
            backward_kernel[(triton.cdiv(count, launch["ROWS"]),)](
                grads,
                rows,
                inverse,
                weight.contiguous(),
                grad_x,
                count,
                features,
                grad_stride,
                stride,
                CAST_FIRST=form == "scale_after_cast",
                SHIFT=float(form == "scale_before_cast"),
                **launch,
                **RMS_NORM_OPTIONS,
            )
    return grad_x


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """Return a tensor whose rows, each in one piece, are at equal distances in memory, and the distance."""
    if x.is_contiguous():
        return x, x.shape[-1]  # as it is: a view of it as a matrix would be an operation
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    return rows, rows.stride(0)
