"""Count what operations read and write, on fake tensors: on a GPU the price of all that is no matrix product.

    python -m benchmarks.bytes_moved

prints what the loss moves for each logit, in plain torch as on a CPU, and on a card; and how often the head is read.

Each operation that torch runs is one pass, a kernel of its own: it reads every tensor it is given once and writes every
one it makes once. That is the least such a pass can move, so counts are lower bounds, for ours and for others' alike.
Those of ours that go over a tensor twice are listed. Views move nothing, and an operand that is broadcast is read as
often as it is held.

Left out: caches, which help where a tensor is small.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_kernels.card import Card, planned_for
from qlora_kernels.linear_cross_entropy import linear_cross_entropy, tokens_of_a_chunk
from qlora_kernels.softmax_loss import softmax_loss_torch
from qlora_kernels.torch_internals import FakeTensorMode, OpOverload, TorchDispatchMode, leaves, operation_schema

_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "device", "detach"}
_BY_INDEX = {"gather": 2, "scatter_add_": 3}  # numbers read or written for each of the index, and no others
_READ_TWICE = {("softmax_loss", "logits")}  # operation and argument
_CARD = Card((8, 0), 128)  # any is the same here
_IN_PLAIN_TORCH = {torch.ops.qlora_kernels.softmax_loss.default: softmax_loss_torch}


@dataclass(frozen=True)
class Moved:
    """Hold the bytes and passes of one computation."""

    bytes: int
    passes: int

    def __add__(self, other: "Moved") -> "Moved":
        return Moved(self.bytes + other.bytes, self.passes + other.passes)


class _Count(TorchDispatchMode):
    def __init__(self, plain: Mapping[OpOverload, Callable[..., Any]] | None = None) -> None:
        super().__init__()
        self.bytes = self.passes = 0
        self.plain = plain or {}  # operations that are counted as these functions, by what they run

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.plain:
            with self:
                return self.plain[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        schema = operation_schema(func)
        name = schema.name.split("::")[1]
        if func.is_view or name in _FREE:
            return out
        arguments = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | (kwargs or {})
        self.passes += 1
        if name in _BY_INDEX:
            index = arguments["index"]
            self.bytes += index.nbytes + _BY_INDEX[name] * index.numel() * args[0].element_size()
            return out
        made = [tensor for tensor in leaves(out) if isinstance(tensor, Tensor)]
        for argument in schema.arguments:
            given = arguments.get(argument.name)
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(given, Tensor) and all(given is not tensor for tensor in made):
                made.append(given)
            # What is filled, or written over, is not read.
            if argument.name != "out" and not (is_written and func is torch.ops.aten.copy_.default):
                read = sum(_held(tensor) for tensor in leaves(given) if isinstance(tensor, Tensor))
                self.bytes += 2 * read if (name, argument.name) in _READ_TWICE else read
        self.bytes += sum(map(_held, made))
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


def logit_bytes(dtype: torch.dtype, *, on_card: bool, **options: Any) -> float:
    """Count what the loss moves for each logit, products' part of it included, and the head's reading left out."""

    def of_a_chunk(tokens: int) -> int:
        with FakeTensorMode(), planned_for(_CARD if on_card else None):
            hidden = torch.empty(tokens, 1, dtype=dtype, requires_grad=True)
            head, labels = torch.empty(vocabulary, 1, dtype=dtype), torch.empty(tokens, dtype=torch.int64)
            with _Count({} if on_card else _IN_PLAIN_TORCH) as count:
                linear_cross_entropy(hidden, head, labels, chunk_tokens=tokens, **options)
        return count.bytes

    vocabulary, fewer, more = 2**17, 128, 256
    return (of_a_chunk(more) - of_a_chunk(fewer)) / (vocabulary * (more - fewer))


def main() -> None:
    print("Bytes that the loss moves for each logit (computed)\n")
    print(f"{'':28}{'in plain torch':>16}{'on a card':>12}")
    for dtype in (torch.bfloat16, torch.float32):
        for name, options in {"": {}, ", soft cap": {"softcap": 30.0}, ", scale": {"logit_scale": 0.1}}.items():
            cells = [f"{logit_bytes(dtype, on_card=on_card, **options):.1f}" for on_card in (False, True)]
            print(f"{str(dtype).removeprefix('torch.') + name:28}{cells[0]:>16}{cells[1]:>12}")
    vocabulary, hidden = 128_256, 4096
    print(f"\nLlama-3.1-8B's head, {vocabulary:,} x {hidden:,} in bfloat16, in a pass over so many tokens (computed)\n")
    print(f"{'':10}{'chunk as on a CPU: tokens, MiB':>34}{'GB read':>10}{'on a card: tokens, MiB':>26}{'GB read':>10}")
    for tokens in (2048, 16_384, 131_072):
        line = f"{tokens:<10,}"
        for on_card, width in ((False, 34), (True, 26)):
            chunk = tokens_of_a_chunk(vocabulary, tokens, 2, on_card=on_card)
            read = 2 * -(tokens // -chunk) * vocabulary * hidden * 2
            cell = f"{chunk:,}, {chunk * vocabulary * (2 if on_card else 4) / 2**20:.1f}"
            line += f"{cell:>{width}}{read / 1e9:>10.1f}"
        print(line)


if __name__ == "__main__":
    main()
