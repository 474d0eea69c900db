"""Triton's interpreter, made true to a GPU, for tests on a machine without one.

It is chosen by TRITON_INTERPRET=1 before triton is imported, and cannot share a process with compiling.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def repair_bfloat16_in_the_interpreter() -> None:
    """Casts to nearest even and products of bf16 as a GPU has them; any other arithmetic in bf16 is refused.

    Triton 3.9's interpreter holds bf16 as integers of 16 bits: it cuts low bits off where it casts, and multiplies and
    adds the integers. Our kernels compute in fp32 and only load, store, cast and multiply matrices in bf16.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    original_cast, original_dot = builder.cast_impl, builder.create_dot

    def is_bfloat16(operand: Any) -> bool:
        return operand.dtype.scalar == tl.bfloat16

    def wide(operand: Any) -> Any:
        if not is_bfloat16(operand):
            return operand
        values = torch.from_numpy(operand.data.view("int16")).view(torch.bfloat16).float().numpy()
        return handle(values, tl.float32)

    def cast(self: Any, source: Any, target: Any, *rounding: Any) -> Any:
        source = wide(source)
        if target.scalar == tl.bfloat16:
            values = torch.from_numpy(source.data.astype("float32")).to(torch.bfloat16)
            return handle(values.view(torch.int16).numpy().view("uint16"), tl.bfloat16)
        return original_cast(self, source, target)

    def dot(self: Any, left: Any, right: Any, total: Any, *others: Any) -> Any:
        return original_dot(self, wide(left), wide(right), total, *others)

    def refusing(original: Callable[..., Any]) -> Callable[..., Any]:
        def checked(self: Any, first: Any, *others: Any) -> Any:
            assert not is_bfloat16(first), "arithmetic in bf16: cast to fp32 first"
            return original(self, first, *others)

        return checked

    for name in ("cast_impl", "create_fp_trunc", "create_fp_ext", "create_fp_to_fp"):
        setattr(builder, name, cast)
    builder.create_dot = dot
    for name in ("binary_op", "unary_op"):
        setattr(builder, name, refusing(getattr(builder, name)))


def between_guards(tensor: Tensor) -> Tensor:
    """The same values inside a larger buffer of absurd ones, which a read out of bounds would bring in."""
    guard = 200 if tensor.dtype == torch.uint8 else 3e4
    buffer = torch.full((tensor.numel() + 128,), guard, dtype=tensor.dtype)
    inner = buffer[64 : 64 + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)
