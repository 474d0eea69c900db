"""Compute activation(gate) * up on CUDA, and its gradients: every value is read once and written once.

The contract is gated.py's; between, values are fp32. Where plain torch rounds the activated gate to 16 bits this does
not, so it errs less. Gate and up may be the halves of one tensor, so rows may lie apart. Left out: fp64, which goes to
plain torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels import gated
from qlora_kernels.gated import ACTIVATION_NAMES, Name

BLOCK = 1024
GATED_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # fewer roundings


@triton.jit
def activation_and_slope(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Compute activation(x) and its slope in fp32."""  # noqa: DOC101, DOC103, DOC107, DOC201
    # 0 silu, 1 gelu, 2 gelu by tanh (Hendrycks & Gimpel 2016)
    if ACTIVATION == 0:
        share = tl.sigmoid(x)
        slope = share * (1.0 + x * (1.0 - share))
    elif ACTIVATION == 1:
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:  # 0.5 * (1 + tanh(z)) is sigmoid(2 z)
        twice = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        share = tl.sigmoid(twice)  # and 1 - share, which would lose its digits near 1, is the other side's
        slope = share + x * share * tl.sigmoid(-twice) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return x * share, slope


@triton.jit
def product_kernel(  # type: ignore[no-untyped-def]
    gate_ptr, up_ptr, out_ptr, width, gate_stride, up_stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """Write activation(gate) * up."""  # noqa: DOC101, DOC103, DOC107
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    activated, _ = activation_and_slope(gate, ACTIVATION)
    tl.store(out_ptr + row * width + column, (activated * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gradients_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # read, then written
    gate_ptr,
    up_ptr,
    grad_up_ptr,
    width,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradients of gate, over that of the product, and of up."""  # noqa: DOC101, DOC103, DOC107
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    grad = tl.load(grad_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    activated, slope = activation_and_slope(gate, ACTIVATION)
    tl.store(grad_up_ptr + row * width + column, (grad * activated).to(grad_up_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_ptr + row * width + column, (grad * up * slope).to(grad_ptr.dtype.element_ty), mask=inside)


def product_triton(gate: Tensor, up: Tensor, activation: Name) -> Tensor:
    """Compute `gated.product_torch` in one pass.

    Args:
        gate: (..., W).
        up: (..., W).
        activation: by name.

    Returns:
        A new tensor (..., W).
    """
    if gate.dtype == torch.float64:
        return gated.product_torch(gate, up, activation)
    gates, ups = _rows(gate), _rows(up)
    out = gate.new_empty(gate.shape)
    if out.numel():
        with torch.cuda.device_of(gate):  # Triton launches on the current device
            product_kernel[_grid(gates)](
                gates,
                ups,
                out,
                gates.shape[1],
                gates.stride(0),
                ups.stride(0),
                **_constants(activation),
                **GATED_OPTIONS,
            )
    return out


def gradients_triton(grad: Tensor, gate: Tensor, up: Tensor, activation: Name) -> Tensor:
    """Compute `gated.gradients_torch` in one pass.

    Args:
        grad: (..., W), overwritten by gate's gradient.
        gate: (..., W).
        up: (..., W).
        activation: by name.

    Returns:
        The gradient of up (..., W).
    """
    if gate.dtype == torch.float64 or not grad.is_contiguous():
        return gated.gradients_torch(grad, gate, up, activation)
    gates, ups = _rows(gate), _rows(up)
    grad_up = gate.new_empty(gate.shape)
    if grad_up.numel():
        with torch.cuda.device_of(gate):
            gradients_kernel[_grid(gates)](
                grad,
                gates,
                ups,
                grad_up,
                gates.shape[1],
                gates.stride(0),
                ups.stride(0),
                **_constants(activation),
                **GATED_OPTIONS,
            )
    return grad_up


def _rows(x: Tensor) -> Tensor:
    """Return (N, W): rows that may lie apart, each in one piece."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _grid(rows: Tensor) -> tuple[int, int]:
    return rows.shape[0], triton.cdiv(rows.shape[1], BLOCK)


def _constants(activation: Name) -> dict[str, int]:
    return {"ACTIVATION": ACTIVATION_NAMES.index(activation), "BLOCK": BLOCK}
