"""Add LoRA where each row of a batch has an adapter of its own: y += s (x A^T) B^T, by segments of rows.

Rows next to each other that take the same adapter are a segment. The layer's own product is one for all rows, and is
made before; what is added costs the same numbers as one adapter for all rows. A's of several adapters, of any ranks,
lie below each other in one matrix, and so do their B's, transposed: so a GPU has two launches for all of them
(`lora_rows_triton`), as in Punica (Chen et al. 2023, arXiv:2310.18547) and S-LoRA (Sheng et al. 2023,
arXiv:2311.03285), but neither are ranks filled up with zeros nor rows sorted.

A vector may scale a row's output or input too (`RowAdapter`): DoRA and IA3 are such. Left out: gradients.

Legend: B rows, T tokens of a row, I in features, O out features, R rank, K ranks of all adapters together.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kernels.products import FEW_STEP, linear
from qlora_kernels.registry import define, from_triton

FEW_OF_SEGMENT = 4
"""Tokens of a segment, on average, below which all adapters are multiplied at once on a CPU."""


@dataclass(frozen=True, eq=False)
class RowAdapter:
    """Hold what an adapter does to the rows that take it: output_scale * (x' W^T + scaling x' A^T B^T) + bias.

    x' is input_scale * x. What is None changes nothing.
    """

    lora_A: Tensor | None = None  # (R, I)
    lora_B: Tensor | None = None  # (O, R)
    scaling: float = 1.0
    output_scale: Tensor | None = None  # (O,), any float dtype
    scales_bias: bool = False  # the output scale holds for the bias too
    input_scale: Tensor | None = None  # (I,), any float dtype

    @property
    def rank(self) -> int:
        """Return R; 0 without LoRA."""
        return 0 if self.lora_A is None else self.lora_A.shape[0]


@dataclass(frozen=True)
class RowSegments:
    """Hold which rows of a batch take which adapter, from the first row to the last."""

    rows: tuple[int, ...]  # of each segment
    adapters: tuple[int, ...]  # of each segment: the place of its adapter; -1 for none

    @classmethod
    def of(cls, adapters: Sequence[int]) -> "RowSegments":
        """Put rows next to each other that take the same adapter into one segment.

        Args:
            adapters: by row the place of its adapter; -1 for none.

        Returns:
            The segments.
        """
        found = [(place, len(list(group))) for place, group in itertools.groupby(adapters)]
        return cls(tuple(count for _, count in found), tuple(place for place, _ in found))

    @functools.cached_property
    def batch(self) -> int:
        """Count the rows.

        Returns:
            B.
        """
        return sum(self.rows)

    @functools.cached_property
    def slices(self) -> list[tuple[slice, int]]:
        """List the segments.

        Returns:
            (rows, place of the adapter or -1) of each.
        """
        ends = itertools.accumulate(self.rows)
        pairs = zip(self.rows, ends, self.adapters, strict=True)
        return [(slice(end - count, end), place) for count, end, place in pairs]


class LoraStack(NamedTuple):
    """Hold the LoRA of several adapters on one layer, below each other, in the dtype of the products."""

    A: Tensor  # (K, I)
    B: Tensor  # (K, O): the transposes of the adapters' B
    ranks: tuple[int, ...]  # of each adapter; 0 for one without LoRA on this layer
    scalings: tuple[float, ...]

    @classmethod
    def of(cls, adapters: Sequence[RowAdapter | None], dtype: torch.dtype) -> "LoraStack | None":
        """Copy the adapters' matrices into one.

        Args:
            adapters: by place; None for one that does not adapt this layer.
            dtype: of the products.

        Returns:
            The stack; None where no adapter has LoRA.
        """
        factors_A = [one.lora_A for one in adapters if one is not None and one.lora_A is not None]
        factors_B = [one.lora_B for one in adapters if one is not None and one.lora_B is not None]
        if not factors_A:
            return None
        return cls(
            torch.cat([A.detach().to(dtype) for A in factors_A]),
            torch.cat([B.detach().T.to(dtype) for B in factors_B]),
            tuple(0 if one is None else one.rank for one in adapters),
            tuple(1.0 if one is None else one.scaling for one in adapters),
        )


def add_lora_rows_(
    output: Tensor,  # (B, T, O), contiguous
    x: Tensor,  # (B, T, I), of the same dtype
    stack: LoraStack,
    segments: RowSegments,
) -> Tensor:  # (B, T, O)
    """Add to each row the output of its adapter, scaling * x A^T B^T, in place and without gradients.

    Args:
        output: of the layer without adapters.
        x: the layer's input.
        stack: of the adapters, in x's dtype.
        segments: of the rows.

    Returns:
        `output`.
    """
    assert output.is_contiguous(), "rows are changed in place"
    assert segments.batch == len(x), "each row is in one segment"
    torch.ops.qlora_kernels.add_lora_rows(
        output, x, stack.A, stack.B, segments.rows, segments.adapters, stack.ranks, stack.scalings
    )
    return output


def add_lora_rows_torch(
    output: Tensor,  # (B, T, O), contiguous
    x: Tensor,  # (B, T, I)
    A: Tensor,  # (K, I)
    B: Tensor,  # (K, O)
    rows: Sequence[int],
    adapters: Sequence[int],
    ranks: Sequence[int],
    scalings: Sequence[float],
) -> None:
    """Define `add_lora_rows_` in plain torch: a segment after the other.

    Args:
        output: is added to.
        x: the input.
        A: of all adapters.
        B: of all adapters.
        rows: of each segment.
        adapters: of each segment, -1 for none.
        ranks: of each adapter.
        scalings: of each adapter.
    """
    counts = [count * x.shape[1] for count in rows]
    tokens, outputs = x.flatten(0, 1).split(counts), output.view(-1, output.shape[2]).split(counts)
    of_A, of_B = A.split(list(ranks)), B.split(list(ranks))
    for some, onto, place in zip(tokens, outputs, adapters, strict=True):
        if place >= 0 and ranks[place]:
            # Of so few tokens both give the same bits, and the first has no call of an operation of ours to pay.
            multiply = F.linear if len(some) < FEW_STEP else linear
            onto.addmm_(multiply(some, of_A[place]), of_B[place], alpha=scalings[place])


def add_lora_rows_cpu(
    output: Tensor,  # (B, T, O), contiguous
    x: Tensor,  # (B, T, I)
    A: Tensor,  # (K, I)
    B: Tensor,  # (K, O)
    rows: Sequence[int],
    adapters: Sequence[int],
    ranks: Sequence[int],
    scalings: Sequence[float],
) -> None:
    """Compute `add_lora_rows_torch`; where segments have few tokens, by two products for all of them.

    Each token is multiplied with the ranks of all adapters, and what others have of it becomes zero. That is more
    numbers and fewer calls, whose threads wait for each other at the end of each.

    Args:
        output: is added to.
        x: the input.
        A: of all adapters.
        B: of all adapters.
        rows: of each segment.
        adapters: of each segment, -1 for none.
        ranks: of each adapter.
        scalings: of each adapter.
    """
    used = sum(ranks[place] for place in {*adapters} if place >= 0)
    are_few = len(x) * x.shape[1] < FEW_OF_SEGMENT * len(rows) and len(rows) > 2
    if not are_few or sum(ranks) > 2 * used or x.dtype not in (torch.float32, torch.float64):
        add_lora_rows_torch(output, x, A, B, rows, adapters, ranks, scalings)
        return
    factors = _factors(tuple(rows), tuple(adapters), tuple(ranks), tuple(scalings), x.shape[1], x.dtype)
    low_rank = linear(x.flatten(0, 1), A)
    low_rank.mul_(factors).masked_fill_(factors == 0.0, 0.0)  # what is not finite elsewhere is not multiplied away
    output.view(-1, output.shape[2]).addmm_(low_rank, B)


@functools.lru_cache(64)
def _factors(
    rows: tuple[int, ...],
    adapters: tuple[int, ...],
    ranks: tuple[int, ...],
    scalings: tuple[float, ...],
    row_tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return by token and rank the scaling of the token's own adapter, and zero of all others, (N, K)."""
    ends = list(itertools.accumulate(ranks, initial=0))
    factors = torch.zeros(sum(rows) * row_tokens, ends[-1], dtype=dtype)
    for some, place in RowSegments(rows, adapters).slices:
        if place >= 0:
            factors[some.start * row_tokens : some.stop * row_tokens, ends[place] : ends[place + 1]] = scalings[place]
    return factors


class RowTile(NamedTuple):
    """Hold tokens next to each other that take one adapter, as many as a program takes."""

    token: int  # the first
    tokens: int
    rank: int  # the first of the adapter, among those of all
    ranks: int
    scaling: float


def row_tiles(
    rows: Sequence[int],
    adapters: Sequence[int],
    ranks: Sequence[int],
    scalings: Sequence[float],
    row_tokens: int,
    tile_tokens: int,
) -> list[RowTile]:
    """Divide the segments that have LoRA into tiles.

    Args:
        rows: of each segment.
        adapters: of each segment, -1 for none.
        ranks: of each adapter.
        scalings: of each adapter.
        row_tokens: T.
        tile_tokens: most tokens of a tile.

    Returns:
        The tiles, in order of their tokens.
    """
    ends = list(itertools.accumulate(ranks, initial=0))
    tiles = []
    for some, place in RowSegments(tuple(rows), tuple(adapters)).slices:
        if place >= 0 and ranks[place]:
            stop = some.stop * row_tokens
            for token in range(some.start * row_tokens, stop, tile_tokens):
                tokens = min(tile_tokens, stop - token)
                tiles.append(RowTile(token, tokens, ends[place], ranks[place], scalings[place]))
    return tiles


define(
    "add_lora_rows(Tensor(a!) output, Tensor x, Tensor A, Tensor B, int[] rows, int[] adapters, int[] ranks,"
    " float[] scalings) -> ()",
    add_lora_rows_torch,
    lambda *arguments: None,
    cpu=lambda: add_lora_rows_cpu,
    cuda=from_triton("lora_rows_triton", "add_lora_rows_triton"),
)
