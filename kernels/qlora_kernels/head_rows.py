"""The output head as rows of the vocabulary, a block of them at a time.

A head that is held in 4 or 8 bits is never whole in the dtype of computation: products with it, and with its transpose,
go over blocks of at most BLOCK_ELEMENTS elements. A dense head takes the same way where that saves a cast of its own,
or of the product.

Legend: N tokens, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 1 << 24
"""Elements of the head made at once: 32 MiB in 16 bits."""


class HeadRows(Protocol):
    """A frozen matrix (V, H), whatever it is held in."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:  # (stop - start, H)
        """Rows of the matrix in `dtype`; a view where they are held so."""
        ...


@dataclass(frozen=True, eq=False)
class DenseRows:
    """HeadRows of a plain tensor."""

    weight: Tensor  # (V, H)

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self.weight[start:stop].to(dtype)


def blocks(head: HeadRows, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of the vocabulary that cover it; one, where the head is dense in a `dtype` of 32 bits or more."""
    vocabulary, hidden_size = head.shape
    is_ready = isinstance(head, DenseRows) and head.weight.dtype == dtype and dtype.itemsize >= 4
    rows = vocabulary if is_ready else max(BLOCK_ELEMENTS // hidden_size, 1)
    for start in range(0, vocabulary, rows):
        yield slice(start, min(start + rows, vocabulary))


def multiply_into(
    out: Tensor,  # (N, V), of any floating dtype
    hidden: Tensor,  # (N, H)
    head: HeadRows,
) -> None:
    """out = hidden @ head.T, multiplied in hidden's dtype; of that dtype a block of the product exists, if any."""
    for block in blocks(head, hidden.dtype):
        rows = head.rows(block.start, block.stop, hidden.dtype)
        if out.dtype == hidden.dtype:
            torch.mm(hidden, rows.T, out=out[:, block])
        else:
            out[:, block] = hidden @ rows.T
        del rows  # or the next block's would be made beside them


class _HeadLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: HeadRows) -> Tensor:
        ctx.head = head
        logits = hidden.new_empty((hidden.shape[0], head.shape[0]))
        multiply_into(logits, hidden, head)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.new_zeros((grad.shape[0], ctx.head.shape[1]), dtype=torch.promote_types(grad.dtype, torch.float32))
        for block in blocks(ctx.head, grad.dtype):
            total += grad[:, block] @ ctx.head.rows(block.start, block.stop, grad.dtype)
        return total.to(grad.dtype), None


def head_logits(
    hidden: Tensor,  # (..., H)
    head: HeadRows,
) -> Tensor:  # (..., V)
    """hidden @ head.T in hidden's dtype; the gradient goes to hidden, and nothing is kept for it."""
    logits = _HeadLogits.apply(hidden.reshape(-1, hidden.shape[-1]), head)
    return logits.view(*hidden.shape[:-1], head.shape[0])
