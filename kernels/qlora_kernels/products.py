"""Products of dense matrices: torch's own, but of fp32 on a CPU by the library that uses the processor whole.

torch multiplies fp32 matrices on x86 with MKL. On an AVX-512 processor that Intel did not make, oneDNN, which torch
carries for other dtypes, can be twice as fast at the same precision: on two cores of an EPYC of Zen 5 about 430 GFLOP/s
beside 190 (`python -m benchmarks.cpu_kernels`). Both round each sum to fp32; its order differs. The choice goes by the
processor's maker and never by a measurement, so that the same machine computes the same bits again.
"""

import platform
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kernels.registry import UnavailableError, define

FEWEST_ROWS = 4
"""Fewer are a matter of reading the weight, which MKL does as well."""


def linear(
    x: Tensor,  # (N, I)
    weight: Tensor,  # (O, I) of x's dtype, in any layout: of a transpose, linear(x, w.T) is x @ w
    bias: Tensor | None = None,  # (O,) of x's dtype
) -> Tensor:  # (N, O), a new tensor
    """x W^T + bias, without gradients."""
    return torch.ops.qlora_kernels.linear(x, weight, bias)


def maker_of_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The vendor's id, such as AuthenticAMD; None where the system does not tell."""
    if not cpuinfo.is_file():
        return None
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), None)


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` by oneDNN, for what it is faster at."""
    if x.dtype != torch.float32 or len(x) < FEWEST_ROWS or not weight.numel():
        return F.linear(x, weight, bias)
    try:
        # The op that torch's compiler puts in the place of F.linear.
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    except RuntimeError:
        # It makes code for each new shape. Where memory has run out for that it says no more than that it could not;
        # torch's own product needs less, and tells what fails.
        return F.linear(x, weight, bias)


def fastest_on_cpu() -> Callable[..., Tensor]:
    """What multiplies on this processor; UnavailableError where torch lacks it."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    is_wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    if not (is_x86 and is_wide and torch.backends.mkl.is_available()):
        return F.linear
    if maker_of_processor() in (None, "GenuineIntel"):
        return F.linear
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        raise UnavailableError("this torch has no oneDNN, which is twice as fast here: install torch from pytorch.org")
    return by_onednn


define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    F.linear,
    lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
    cpu=fastest_on_cpu,
)
