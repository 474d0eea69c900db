"""Count what operations read and write, on fake tensors: on a GPU the price of all that is no matrix product.

Each operation that torch runs is one pass, a kernel of its own: it reads every tensor it is given once and writes every
one it makes once. That is the least such a pass can move, so counts are lower bounds, for ours and for others' alike.
Views move nothing, and an operand that is broadcast is read as often as it is held.

Left out: matrix products, whose time is arithmetic, and caches, which help where a tensor is small.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_kernels.torch_internals import FakeTensorMode, TorchDispatchMode, leaves, operation_schema

_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "device", "detach"}


@dataclass(frozen=True)
class Moved:
    """Hold the bytes and passes of one computation."""

    bytes: int
    passes: int

    def __add__(self, other: "Moved") -> "Moved":
        return Moved(self.bytes + other.bytes, self.passes + other.passes)


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.passes = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        schema = operation_schema(func)
        if func.is_view or schema.name.split("::")[1] in _FREE:
            return out
        arguments = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | (kwargs or {})
        made = [tensor for tensor in leaves(out) if isinstance(tensor, Tensor)]
        for argument in schema.arguments:
            given = arguments.get(argument.name)
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(given, Tensor) and all(given is not tensor for tensor in made):
                made.append(given)
            # What is filled, or written over, is not read.
            if argument.name != "out" and not (is_written and func is torch.ops.aten.copy_.default):
                self.bytes += sum(_held(tensor) for tensor in leaves(given) if isinstance(tensor, Tensor))
        self.bytes += sum(map(_held, made))
        self.passes += 1
        return out


def _held(tensor: Tensor) -> int:
    """Count the bytes of the elements, those of a broadcast dimension once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0 or size == 0)
    return math.prod(sizes) * tensor.element_size()


def moved(
    function: Callable[..., Any],
    *inputs: tuple[tuple[int, ...], torch.dtype],  # shape and dtype of each argument
    gradients: int = 0,
) -> Moved:
    """Count what a function of tensors moves; or its backward, where that gives the first so many inputs a gradient."""
    with FakeTensorMode():
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in inputs]
        if gradients == 0:
            with torch.no_grad(), _Count() as count:
                function(*tensors)
            return Moved(count.bytes, count.passes)
        for tensor in tensors[:gradients]:
            tensor.requires_grad_()
        outputs = [tensor for tensor in leaves(function(*tensors)) if tensor.requires_grad]
        grads = [torch.empty_like(output) for output in outputs]
        with _Count() as count:
            torch.autograd.backward(outputs, grads)
    return Moved(count.bytes, count.passes)
