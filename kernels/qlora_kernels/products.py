"""Multiply dense matrices: by torch, but fp32 on a CPU by the library that uses the whole processor.

torch multiplies fp32 matrices on x86 with MKL. On an AVX-512 processor that Intel did not make, oneDNN, which torch
carries for other dtypes, can be twice as fast at the same precision: on two cores of an EPYC of Zen 5 about 430 GFLOP/s
against 190 (`python -m benchmarks.cpu_kernels`). Both round each sum to fp32; its order differs. The choice goes by the
processor's maker and never by a measurement, so that the same machine computes the same bits again, as long as memory
does not run out.
"""

import platform
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kernels.processor import processor_fact
from qlora_kernels.registry import UnavailableError, define, kernel_choice
from qlora_kernels.torch_internals import has_onednn_linear, onednn_linear

STEP = 64
"""oneDNN makes code for each shape it meets, up to a megabyte, whose memory is badly used again. Tokens come in any
number, so it is given numbers in steps: of STEP, of half of it up to four of it, as ranks of layers over one input are
together, and from 2,048 on of a 32nd to a 16th of the number."""

FEW_STEP = 8
"""Fewer rows than STEP go to oneDNN where they are a multiple of this, as ranks are, and else to MKL."""


def linear(
    x: Tensor,  # (N, I)
    weight: Tensor,  # (O, I) of x's dtype, in any layout
    bias: Tensor | None = None,  # (O,) of x's dtype
) -> Tensor:  # (N, O), a new tensor
    """Compute x W^T + bias, without gradients.

    Args:
        x: the tokens.
        weight: the matrix.
        bias: or None.

    Returns:
        The product.
    """
    return torch.ops.qlora_kernels.linear(x, weight, bias)


def product(
    x: Tensor,  # (N, I)
    other: Tensor,  # (I, O) of x's dtype, in any layout
) -> Tensor:  # (N, O), a new tensor
    """Compute x @ other, without gradients, as `linear` computes it of the transpose.

    Args:
        x: the tokens.
        other: the matrix.

    Returns:
        The product.
    """
    return torch.ops.qlora_kernels.product(x, other)


def by_onednn(
    x: Tensor,  # (N, I)
    weight: Tensor,  # (O, I)
    bias: Tensor | None,  # (O,)
) -> Tensor:  # (N, O)
    """Compute `linear` by oneDNN, for what it is faster at.

    Sums over a number of terms in between two steps are made in two parts, rows in between are filled up with zeros.

    Args:
        x: the tokens.
        weight: the matrix.
        bias: or None.

    Returns:
        The product.

    Raises:
        RuntimeError: of torch's, other than that memory for oneDNN's code has run out.
    """
    rows, terms = x.shape
    suits = rows >= STEP or rows % FEW_STEP == 0
    if x.dtype != torch.float32 or not x.numel() or not weight.numel() or not suits:
        return F.linear(x, weight, bias)
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        weight = weight.contiguous()  # else it is a hundred times as slow
    # A weight's own width is always the same; the terms of a gradient are tokens.
    rest = terms % step_of(terms) if terms > STEP and not weight.is_contiguous() else 0
    whole = terms - rest
    bias = None if bias is None else bias.contiguous()  # it is read as if it were
    try:
        output = onednn_linear(_filled_up(x[:, :whole]), weight[:, :whole], bias)[:rows]
    except RuntimeError as error:
        if "could not create" not in str(error):
            raise
        # Memory has run out for its code. torch's own product needs less, and raises where that fails too.
        return F.linear(x, weight, bias)
    return output.addmm_(x[:, whole:], weight[:, whole:].T) if rest else output


def step_of(number: int) -> int:
    """Return the steps in which numbers near this one are taken.

    Args:
        number: of rows, or of terms.

    Returns:
        A multiple of STEP, or half of it.
    """
    return STEP // 2 if number < 4 * STEP else max(STEP, 1 << max(number.bit_length() - 5, 0))


def _filled_up(x: Tensor) -> Tensor:  # (N, I) -> (N to the next step, I)
    """Fill x up with rows of zeros to the next step; return x itself where its rows are few, or at a step."""
    rows, step = len(x), step_of(len(x))
    if rows < STEP or rows % step == 0:
        return x
    filled = x.new_empty(-(rows // -step) * step, x.shape[1])
    filled[:rows] = x
    filled[rows:] = 0.0
    return filled


def library() -> str:
    """Name the library that makes fp32 products on this machine's CPU: its bits are its own.

    Returns:
        "oneDNN" or "torch's own".
    """
    takes_onednn = kernel_choice() != "reference" and _LINEAR.fast_version("cpu") is by_onednn
    return "oneDNN" if takes_onednn else "torch's own"


def fastest_on_cpu() -> Callable[..., Tensor]:
    """Choose what multiplies on this processor.

    Returns:
        `F.linear` or `by_onednn`.

    Raises:
        UnavailableError: torch lacks oneDNN, where it would be the faster one.
    """
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    is_wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    if not (is_x86 and is_wide and torch.backends.mkl.is_available()):
        return F.linear
    if processor_fact("vendor_id") in (None, "GenuineIntel"):
        return F.linear
    if not has_onednn_linear():
        raise UnavailableError("this torch has no oneDNN, which is twice as fast here: install torch from pytorch.org")
    return by_onednn


def _product_on_cpu() -> Callable[..., Tensor]:
    multiply = fastest_on_cpu()
    return torch.mm if multiply is F.linear else lambda x, other: multiply(x, other.T, None)


_LINEAR = define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    F.linear,
    lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
    cpu=fastest_on_cpu,
)
define(
    "product(Tensor x, Tensor other) -> Tensor",
    torch.mm,
    lambda x, other: x.new_empty(x.shape[0], other.shape[1]),
    cpu=_product_on_cpu,
)
