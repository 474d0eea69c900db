"""Multiply with the LM head and with its transpose, a block of rows of the vocabulary at a time.

A head that is held in 4 or 8 bits is never whole in the dtype of computation: products with it go over blocks of at
most BLOCK_ELEMENTS elements. A dense head in the dtype of computation is used as it is.

Where fp32 logits of 16-bit products are wanted, as on a CPU, they are widened in place, and their gradients narrowed in
place, so that no second tensor of their size exists.

Legend: N tokens, H hidden size, V vocabulary, R rows that train.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.products import linear
from qlora_kernels.softmax_loss import FEWEST_PARTS

BLOCK_ELEMENTS = 1 << 24
"""Elements of the head made at once: 32 MiB in 16 bits."""

_READ_PAST = 64  # columns


@runtime_checkable
class HeadRows(Protocol):
    """Describe a frozen matrix (V, H), in whatever form it is held."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return (V, H).

        Returns:
            Rows and columns of the matrix.
        """
        ...

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:  # (stop - start, H)
        """Return rows of the matrix, a view where they are held in `dtype`.

        Args:
            start: the first row.
            stop: the row after the last.
            dtype: of the result.

        Returns:
            The rows.
        """
        ...


@dataclass(frozen=True, eq=False)
class DenseRows:
    """Give the rows of a plain tensor."""

    weight: Tensor  # (V, H)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (V, H).

        Returns:
            Rows and columns of the matrix.
        """
        return self.weight.shape[0], self.weight.shape[1]

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows of the matrix, a view if it has `dtype`.

        Args:
            start: the first row.
            stop: the row after the last.
            dtype: of the result.

        Returns:
            The rows, (stop - start, H).
        """
        return self.weight[start:stop].to(dtype)


@dataclass(frozen=True, eq=False)
class TrainedRows:
    """Give the rows of a frozen matrix, with rows that train in the place of some and after its last."""

    frozen: HeadRows  # (V, H)
    values: Tensor  # (R, H), any floating dtype
    ids: Tensor  # (R,) int64: which rows they are, ascending; V and all above are among them, without a gap
    height: int  # rows of the whole, at least V

    @property
    def shape(self) -> tuple[int, int]:
        """Return (height, H).

        Returns:
            Rows and columns of the matrix.
        """
        return self.height, self.frozen.shape[1]

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows of the matrix, copied.

        Args:
            start: the first row.
            stop: the row after the last.
            dtype: of the result.

        Returns:
            The rows, (stop - start, H).
        """
        known = max(min(stop, self.frozen.shape[0]), start)
        out = self.values.new_empty((stop - start, self.shape[1]), dtype=dtype)
        if known > start:
            out[: known - start] = self.frozen.rows(start, known, dtype)
        inside = ((self.ids >= start) & (self.ids < stop)).nonzero()[:, 0]
        return out.index_copy_(0, self.ids[inside] - start, self.values[inside].to(dtype))


def multiply_by_head(
    hidden: Tensor,  # (N, H)
    head: HeadRows,
    dtype: torch.dtype,  # hidden's, or fp32 where that has 16 bits
    row_multiple: int = 1,
    columns: int = 0,
) -> Tensor:  # (N, V), or (N, columns), in `dtype`
    """Compute hidden @ head.T, multiplied in hidden's dtype, without a second tensor of the result's size.

    Args:
        hidden: in the dtype of computation.
        head: the matrix.
        dtype: of the result; hidden's, if rows are to begin at multiples.
        row_multiple: rows of the result begin at multiples of so many numbers; what lies between two is not set.
        columns: of the result, of which those from V on are not set; at least V.

    Returns:
        The logits.
    """
    vocabulary, _ = head.shape
    width = max(columns, vocabulary)
    step = -(width // -row_multiple) * row_multiple
    if _is_ready(head, hidden.dtype) and dtype == hidden.dtype and step == vocabulary:
        return linear(hidden, head.rows(0, vocabulary, dtype))
    whole = hidden.new_empty((hidden.shape[0], step), dtype=dtype)[:, :width]
    _multiply_into(whole[:, :vocabulary], hidden, head)
    return whole


def _multiply_into(out: Tensor, hidden: Tensor, head: HeadRows) -> None:
    """Compute hidden @ head.T into columns of a tensor."""
    dtype, vocabulary = out.dtype, head.shape[0]
    if _is_ready(head, hidden.dtype) and dtype == hidden.dtype:
        torch.mm(hidden, head.rows(0, vocabulary, dtype).T, out=out)
    elif _is_ready(head, hidden.dtype):
        product = out.view(hidden.dtype)[:, :vocabulary]
        torch.mm(hidden, head.rows(0, vocabulary, hidden.dtype).T, out=product)
        # What is written over has been read: the right half by blocks before, and a block itself is copied aside.
        for block in reversed(_cut(vocabulary)):
            out[:, block] = product[:, block].clone()
    else:
        for block in _cut(*head.shape):
            rows = head.rows(block.start, block.stop, hidden.dtype)
            if dtype == hidden.dtype:
                torch.mm(hidden, rows.T, out=out[:, block])
            else:
                out[:, block] = hidden @ rows.T
            del rows  # or they would still be there when the next block's are made


def multiply_by_head_transposed_(
    grad: Tensor,  # (N, V) or wider, of which the first V columns count; its contents are lost
    head: HeadRows,
    dtype: torch.dtype,  # grad's, or one of 16 bits where that is fp32
) -> Tensor:  # (N, H) in `dtype`
    """Compute grad @ head, multiplied in `dtype`, without a second tensor of grad's size.

    Products of blocks are summed in fp32, or in fp64.

    Args:
        grad: of the logits; rows may lie apart where it has `dtype`.
        head: the matrix.
        dtype: of the result.

    Returns:
        The gradient of the hidden states.
    """
    vocabulary, hidden_size = head.shape
    if _is_ready(head, dtype):
        low = grad.view(dtype)[:, :vocabulary]
        if dtype != grad.dtype:
            for block in _cut(vocabulary):  # as above, from the left
                low[:, block] = grad[:, block].to(dtype)
            # Some processors' products of 16 bits read past an odd number of columns, and multiply that by zero: bits
            # of old gradients may be NaN there.
            grad.view(dtype)[:, vocabulary : vocabulary + _READ_PAST] = 0
        return linear(low, head.rows(0, vocabulary, dtype).T)
    total = grad.new_zeros((grad.shape[0], hidden_size), dtype=torch.promote_types(grad.dtype, torch.float32))
    for block in _cut(*head.shape):
        total += grad[:, block].to(dtype) @ head.rows(block.start, block.stop, dtype)
    return total.to(dtype)


def _is_ready(head: HeadRows, dtype: torch.dtype) -> bool:
    return isinstance(head, DenseRows) and head.weight.dtype == dtype


def _cut(vocabulary: int, hidden_size: int = 1) -> list[slice]:
    """Cut the vocabulary into blocks."""
    rows = max(min(BLOCK_ELEMENTS // hidden_size, -(vocabulary // -FEWEST_PARTS)), 1)
    return [slice(start, min(start + rows, vocabulary)) for start in range(0, vocabulary, rows)]


class _HeadLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: HeadRows) -> Tensor:
        ctx.head = head
        return multiply_by_head(hidden, head, hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Summed in fp32: this is for models whose own logits are trained on.
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        return multiply_by_head_transposed_(wide, ctx.head, grad.dtype), None


def head_logits(
    hidden: Tensor,  # (..., H)
    head: HeadRows,
) -> Tensor:  # (..., V)
    """Compute hidden @ head.T in hidden's dtype; the gradient goes to hidden, and nothing is kept for it.

    Args:
        hidden: any number of tokens.
        head: the matrix.

    Returns:
        The logits.
    """
    logits = _HeadLogits.apply(hidden.reshape(-1, hidden.shape[-1]), head)
    return logits.view(*hidden.shape[:-1], head.shape[0])
