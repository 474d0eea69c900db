"""Quantize to NF4 and back on a CPU by compiled code (nf4_cpu.cpp), at the speed of memory.

The contract is nf4_reference.py's, bit for bit. Plain torch makes and reads back several full-size tensors; this makes
one pass. Dtypes other than fp32, fp16 and bf16 go to plain torch.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qlora_kernels import nf4_reference
from qlora_kernels.compiled import load_library

SOURCE = Path(__file__).with_name("nf4_cpu.cpp")
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_POINTER, _COUNT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


def quantizer(*flags: str) -> Callable[..., None]:
    """Compile `nf4_reference.quantize_torch`.

    Args:
        *flags: of the compiler, after our own.

    Returns:
        The function.
    """
    function = load_library(SOURCE, flags).quantize_nf4
    function.argtypes = [_POINTER, _COUNT, _INT, *[_POINTER] * 3, _INT]
    function.restype = None

    def quantize(
        values: Tensor,  # (elements,)
        packed: Tensor,  # (ceil(elements/2),) uint8, filled
        maxima: Tensor,  # (blocks,) fp32, filled
    ) -> None:
        if values.dtype not in _DTYPES:
            return nf4_reference.quantize_torch(values, packed, maxima)
        assert (packed.dtype, maxima.dtype) == (torch.uint8, torch.float32)
        assert packed.numel() == -(values.numel() // -2)
        assert maxima.numel() == -(values.numel() // -nf4_reference.BLOCK_SIZE)
        assert packed.is_contiguous()
        assert maxima.is_contiguous()
        values = values.contiguous()
        function(
            values.data_ptr(),
            values.numel(),
            _DTYPES[values.dtype],
            nf4_reference.MIDPOINTS.data_ptr(),
            packed.data_ptr(),
            maxima.data_ptr(),
            torch.get_num_threads(),
        )
        return None

    return quantize


def dequantizer(*flags: str) -> Callable[..., None]:
    """Compile `nf4_reference.dequantize_torch`.

    Args:
        *flags: of the compiler, after our own.

    Returns:
        The function.
    """
    function = load_library(SOURCE, flags).dequantize_nf4
    function.argtypes = [*[_POINTER] * 5, *[_COUNT] * 4, *[_POINTER] * 2, _INT, _INT]
    function.restype = None

    def dequantize(
        packed: Tensor,  # (bytes,) uint8
        absmax: Tensor,  # (blocks,) uint8
        nested_absmax: Tensor,  # (nested blocks,) fp32
        nested_code: Tensor,  # (256,) fp32
        offset: Tensor,  # () fp32
        start: int,
        block_size: int,
        nested_block_size: int,
        out: Tensor,  # contiguous, filled
    ) -> None:
        assert block_size % 2 == 0, "a block must begin at a byte"
        if out.dtype not in _DTYPES:
            return nf4_reference.dequantize_torch(
                packed, absmax, nested_absmax, nested_code, offset, start, block_size, nested_block_size, out
            )
        assert out.is_contiguous()
        # The compiled code relies on these: it would read past the end of smaller tables.
        stop = start + out.numel()
        blocks = -(stop // -block_size)
        assert (packed.dtype, absmax.dtype) == (torch.uint8, torch.uint8)
        assert {table.dtype for table in (nested_absmax, nested_code, offset)} == {torch.float32}
        assert start >= 0
        assert packed.numel() >= -(stop // -2)
        assert absmax.numel() >= blocks
        assert nested_absmax.numel() >= -(blocks // -nested_block_size)
        assert (nested_code.numel(), offset.numel()) == (256, 1)
        tables = [table.contiguous() for table in (packed, absmax, nested_absmax, nested_code, offset)]
        function(
            *(table.data_ptr() for table in tables),
            start,
            out.numel(),
            block_size,
            nested_block_size,
            nf4_reference.NF4_CODE.data_ptr(),
            out.data_ptr(),
            _DTYPES[out.dtype],
            torch.get_num_threads(),
        )
        return None

    return dequantize
