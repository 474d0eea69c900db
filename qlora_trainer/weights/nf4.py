"""Quantize one weight to NF4 with double quantization (QLoRA, Dettmers et al. 2023), and import bitsandbytes.

On every device qlora_kernels gives the codes that bitsandbytes gives on a CPU. bitsandbytes is imported here and in
training/memory/paged_trial.py only, so that what it prints and registers at import is handled in one place.

Legend: O out features, I in features.
"""

import functools
import logging
import sys
from typing import Any

import torch
from torch import Tensor

from qlora_kernels.nf4 import NF4Weight, quantize_nf4
from qlora_kernels.nf4_reference import BLOCK_SIZE, NESTED_BLOCK_SIZE
from qlora_trainer.common.errors import QuantizationError
from qlora_trainer.common.units import counted


@functools.cache
def load_bitsandbytes() -> Any:
    """Import bitsandbytes at the first call: it takes a second of processor time, which reading rows need not wait for.

    It is not let download CPU kernels through the package `kernels`, if that is installed.

    Returns:
        The module.
    """
    missing = object()
    previous = sys.modules.get("kernels", missing)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # makes `import kernels` raise ImportError
    try:
        import bitsandbytes
    finally:
        if previous is missing:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = previous  # type: ignore[assignment]
    return bitsandbytes


WEIGHT_TENSORS = ("packed", "absmax", "nested_absmax", "nested_code", "offset")  # of an NF4Weight


def quantize_weight(
    weight: Tensor,  # (O, I), any float dtype
    name: str = "the weight",
) -> NF4Weight:
    """Quantize to NF4 with block size 64 and double-quantized block maxima, on the weight's device.

    The codes are the same on every device.

    Args:
        weight: not changed.
        name: for error messages.

    Returns:
        The quantized weight.

    Raises:
        QuantizationError: a value is not finite; one of them would turn the whole tensor into NaN.
    """
    quantized = quantize_nf4(weight)
    if not torch.isfinite(quantized.offset):  # the mean of all block maxima, so not finite if one value is not
        bad = int((~torch.isfinite(weight)).sum())
        reported = (
            counted(bad, "value that is not finite", "values that are not finite")
            if bad
            else "values so large that their scales overflow"
        )
        raise QuantizationError(
            f"{name} holds {reported}, and cannot be quantized. The checkpoint is damaged: fetch it again, or choose "
            "another base."
        )
    return quantized


def all_finite(*tensors: Tensor) -> bool:
    """Return True if no value is infinite or NaN.

    Args:
        *tensors: of any shape; only those of floats are checked.

    Returns:
        True if all values are finite.
    """
    # One pass without a temporary tensor: a NaN anywhere is both the least and the greatest value.
    floats = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return all(torch.isfinite(extreme) for tensor in floats for extreme in torch.aminmax(tensor))


def empty_weight(out_features: int, in_features: int, device: str = "cpu") -> NF4Weight:
    """Make the tensors of a quantized (O, I) weight, uninitialized.

    Args:
        out_features: O.
        in_features: I.
        device: of the tensors.

    Returns:
        The weight: uint8 codes, two a byte; uint8 block maxima; their fp32 maxima, code and offset.
    """
    elements = out_features * in_features
    blocks = -(-elements // BLOCK_SIZE)
    return NF4Weight(
        packed=torch.empty(-(-elements // 2), dtype=torch.uint8, device=device),
        absmax=torch.empty(blocks, dtype=torch.uint8, device=device),
        nested_absmax=torch.empty(-(-blocks // NESTED_BLOCK_SIZE), dtype=torch.float32, device=device),
        nested_code=torch.empty(256, dtype=torch.float32, device=device),
        offset=torch.empty((), dtype=torch.float32, device=device),
        shape=(out_features, in_features),
        block_size=BLOCK_SIZE,
        nested_block_size=NESTED_BLOCK_SIZE,
    )
