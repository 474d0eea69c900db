"""Fold what trains next to a linear layer into the layer's weight, some rows at a time.

A fold is the one description of what a kind of adapter makes of a weight. A merge applies it to rows as it writes them;
the check of a merge asks it which change of the base's weight a rounded merged weight is.

Left out: the formulas (formulas.py), and which kinds fold (kinds/).

Legend: O out features, I in features, R rank, N rows of the O.
"""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from qlora_trainer.adapters.formulas import fold_lora


class Fold(Protocol):
    """Turn rows of a base's weight into those of the merged weight."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return (O, I) of the weight that it fits."""
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

    @property
    def shape(self) -> tuple[int, int]:
        """Return (O, I) of the weight that it fits."""
        return self.lora_B.shape[0], self.lora_A.shape[1]

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
