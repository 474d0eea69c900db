"""Fold what trains next to a linear layer into the layer's weight, some rows at a time.

A fold is the one description of what a kind of adapter makes of a weight. A merge applies it to rows as it writes them;
the check of a merge asks it which change of the base's weight a rounded merged weight is.

Left out: the formulas (formulas.py), and which kinds fold (kinds/).

Legend: O out features, I in features, R rank, N rows of the O.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from qlora_trainer.adapters.formulas import dora_factors, fold_lora


class Fold(Protocol):
    """Turn rows of a base's weight into those of the merged weight."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return True for a weight that can be folded.

        Args:
            shape: of the weight, (O, I), or (O,) of a bias.

        Returns:
            True if the adapter was made for that shape.
        """
        ...

    def to(self, device: torch.device | str) -> Self:
        """Return the fold with its tensors on a device.

        Args:
            device: of the arithmetic.

        Returns:
            The fold.
        """
        ...

    def rows(self, weight: Tensor, rows: slice) -> Tensor:  # (N, I) fp32
        """Fold rows of the weight.

        Args:
            weight: of the base, (N, I) fp32.
            rows: which of the O they are.

        Returns:
            The merged rows, (N, I) fp32.
        """
        ...

    def change_of_base(self, weight: Tensor, change: Tensor, rows: slice) -> Tensor:  # (N, I) fp32
        """Say which change of the base's rows changes the merged ones so, with what trains held as it is.

        Args:
            weight: of the base, (N, I) fp32.
            change: of the merged rows, (N, I) fp32.
            rows: which of the O they are.

        Returns:
            The change, (N, I) fp32.
        """
        ...


@dataclass(frozen=True, eq=False)
class LoraFold:
    """Add s B A to the weight."""

    lora_A: Tensor  # (R, I), any floating dtype
    lora_B: Tensor  # (O, R), any floating dtype
    scaling: float

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return True for a weight of B's rows and A's columns.

        Args:
            shape: of the weight, (O, I).

        Returns:
            True if the adapter was made for that shape.
        """
        return shape == (self.lora_B.shape[0], self.lora_A.shape[1])

    def to(self, device: torch.device | str) -> Self:
        """Return the fold with its tensors on a device.

        Args:
            device: of the arithmetic.

        Returns:
            The fold.
        """
        return replace(self, lora_A=self.lora_A.to(device), lora_B=self.lora_B.to(device))

    def rows(self, weight: Tensor, rows: slice) -> Tensor:  # (N, I) fp32
        """Fold rows of the weight, in fp32: the result is cast once, not the parts.

        Args:
            weight: of the base, (N, I) fp32.
            rows: which of the O they are.

        Returns:
            W + s B A of the rows, (N, I) fp32.
        """
        return fold_lora(weight, self.lora_A, self.lora_B[rows], self.scaling)

    def change_of_base(self, weight: Tensor, change: Tensor, rows: slice) -> Tensor:  # (N, I) fp32
        """Return the change itself, as what is added does not depend on the weight.

        Args:
            weight: of the base, (N, I) fp32.
            change: of the merged rows, (N, I) fp32.
            rows: which of the O they are.

        Returns:
            The change, (N, I) fp32.
        """
        return change


@dataclass(frozen=True, eq=False)
class DoraFold(LoraFold):
    """Add s B A to the weight, and give each row of the sum the norm that was trained."""

    magnitude: Tensor  # (O,), any floating dtype

    def to(self, device: torch.device | str) -> Self:
        """Return the fold with its tensors on a device.

        Args:
            device: of the arithmetic.

        Returns:
            The fold.
        """
        return replace(super().to(device), magnitude=self.magnitude.to(device))

    def rows(self, weight: Tensor, rows: slice) -> Tensor:  # (N, I) fp32
        """Fold rows of the weight, in fp32.

        Args:
            weight: of the base, (N, I) fp32.
            rows: which of the O they are.

        Returns:
            m / ||W + s B A|| (W + s B A) of the rows, (N, I) fp32.
        """
        sums = super().rows(weight, rows)
        return sums.mul_(self._factors(sums, rows))

    def change_of_base(self, weight: Tensor, change: Tensor, rows: slice) -> Tensor:  # (N, I) fp32
        """Say which change of the base's rows changes the merged ones so, with magnitudes and norms held.

        Args:
            weight: of the base, (N, I) fp32.
            change: of the merged rows, (N, I) fp32.
            rows: which of the O they are.

        Returns:
            The change, (N, I) fp32; none where a magnitude is 0.
        """
        return _before(change, self._factors(super().rows(weight, rows), rows))

    def _factors(self, sums: Tensor, rows: slice) -> Tensor:  # (N, 1) fp32
        return dora_factors(self.magnitude[rows], torch.linalg.vector_norm(sums, dim=1))[:, None]


@dataclass(frozen=True, eq=False)
class ScaleFold:
    """Multiply the rows of a weight, its columns, or a bias by a vector."""

    values: Tensor  # (O,) of rows or a bias, (I,) of columns; any floating dtype
    of_columns: bool = False

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return True for a weight or bias of as many rows, or columns.

        Args:
            shape: (O, I), or (O,) of a bias.

        Returns:
            True if the vector is as long.
        """
        return shape[-1 if self.of_columns else 0] == len(self.values)

    def to(self, device: torch.device | str) -> Self:
        """Return the fold with its tensor on a device.

        Args:
            device: of the arithmetic.

        Returns:
            The fold.
        """
        return replace(self, values=self.values.to(device))

    def rows(self, weight: Tensor, rows: slice) -> Tensor:  # (N, I) fp32, or (N,)
        """Scale rows of the weight, or numbers of the bias, in fp32.

        Args:
            weight: of the base, (N, I) fp32, or (N,).
            rows: which of the O they are.

        Returns:
            The products, of the same shape.
        """
        return weight * self._factors(weight, rows)

    def change_of_base(self, weight: Tensor, change: Tensor, rows: slice) -> Tensor:  # (N, I) fp32, or (N,)
        """Say which change of the base changes the merged rows so.

        Args:
            weight: of the base, (N, I) fp32, or (N,).
            change: of the merged rows, (N, I) fp32, or (N,).
            rows: which of the O they are.

        Returns:
            The change, of the same shape; none where the factor is 0.
        """
        return _before(change, self._factors(weight, rows))

    def _factors(self, weight: Tensor, rows: slice) -> Tensor:
        values = self.values.float()
        if self.of_columns:
            return values
        return values[rows] if weight.dim() == 1 else values[rows, None]


def _before(change: Tensor, factors: Tensor) -> Tensor:
    """Return the change that these factors turn into `change`; none where a factor is 0."""
    return torch.where(factors == 0, 0.0, change / factors)


@dataclass(frozen=True, eq=False)
class MergedTokens:
    """Hold rows of an embedding or LM head that a merge puts in the place of the base's, or after its last."""

    ids: tuple[int, ...]  # ascending
    values: Tensor  # (tokens, I), any floating dtype

    def height(self, rows: int) -> int:
        """Return the rows of the merged matrix.

        Args:
            rows: of the base's.

        Returns:
            The count.
        """
        return max(rows, self.ids[-1] + 1)

    def over(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Put the rows over those of the base.

        Args:
            blocks: of the base's matrix, (N, I) fp32 each, all rows in order.

        Yields:
            Blocks of the merged matrix, in order.
        """
        start = 0
        for block in blocks:
            stop = start + len(block)
            inside = [row for row, token in enumerate(self.ids) if start <= token < stop]
            if inside:
                places = torch.tensor([self.ids[row] - start for row in inside], device=block.device)
                block = block.index_copy(0, places, self.values[inside].to(block))
            yield block
            start = stop
        new = [row for row, token in enumerate(self.ids) if token >= start]
        if new:
            yield self.values[new].float()
