"""Hold a LoRA adapter as the kernels take it, and say what autograd sees of it.

Left out: what is computed with it (lora_linear.py, gated_linear.py).

Legend: N tokens, I in features, O out features, R rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_kernels.dropout import keep_mask


@dataclass(frozen=True, eq=False)
class Adapter:
    """Hold LoRA on a linear layer: scaling * dropout(x) A^T B^T."""

    lora_A: Tensor  # (R, I)
    lora_B: Tensor  # (O, R)
    scaling: float
    dropout: float = 0.0  # a probability below 1, of the adapter's input
    dropout_seed: Tensor | None = None  # () int64 on the CPU, as `draw_seed` gives it; needed where dropout is not 0
    casts: tuple[Tensor, Tensor, Tensor] | None = None  # A, B and B^T in the dtype of x, where somebody has cast them
    grads: tuple[Tensor, Tensor] | None = None  # of A and B: backward adds to these, and gives autograd none

    def __post_init__(self) -> None:
        assert not self.dropout or self.dropout_seed is not None, "dropout needs a seed"

    def A_in(self, dtype: torch.dtype) -> Tensor:  # (R, I)
        """Return A in a dtype, from `casts` where they are of that one.

        Args:
            dtype: of the product.

        Returns:
            A.
        """
        cast = self._cast_to(dtype)
        return self.lora_A.to(dtype) if cast is None else cast[0]

    def B_in(self, dtype: torch.dtype) -> Tensor:  # (O, R)
        """Return B in a dtype, from `casts` where they are of that one.

        Args:
            dtype: of the product.

        Returns:
            B.
        """
        cast = self._cast_to(dtype)
        return self.lora_B.to(dtype) if cast is None else cast[1]

    def transposed_B_in(self, dtype: torch.dtype) -> Tensor:  # (R, O)
        """Return the transpose of `B_in`.

        Args:
            dtype: of the product.

        Returns:
            A view of B.
        """
        cast = self._cast_to(dtype)
        return self.lora_B.to(dtype).T if cast is None else cast[2]

    def _cast_to(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor] | None:
        return self.casts if self.casts is not None and self.casts[0].dtype == dtype else None

    @property
    def factor(self) -> float:
        """Return the scaling and dropout's own factor together, to be applied where the tensor is small.

        Returns:
            scaling / (1 - dropout).
        """
        return self.scaling / (1.0 - self.dropout)

    def keep_mask(self, like: Tensor) -> Tensor | None:  # (N, I), or None without dropout
        """Make dropout's mask for tokens.

        Args:
            like: (N, any), gives N, dtype and device.

        Returns:
            The mask; None without dropout.
        """
        return keep_mask(like, self.lora_A.shape[1], self.dropout, self.dropout_seed) if self.dropout else None


def shown_to_autograd(adapter: Adapter | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the inputs by which autograd knows that an adapter trains.

    Args:
        adapter: on the layer, or None.

    Returns:
        A and B; of an adapter with `grads`, A alone, which is enough to be called back.
    """
    if adapter is None:
        return None, None
    return adapter.lora_A, None if adapter.grads is not None else adapter.lora_B


def trains_B(adapter: Adapter | None, needs_A: bool, needs_B: bool) -> bool:
    """Say whether backward computes a gradient of B.

    Args:
        adapter: on the layer, or None.
        needs_A: whether autograd asks for A's.
        needs_B: whether autograd asks for B's.

    Returns:
        True if it does.
    """
    return needs_A if adapter is not None and adapter.grads is not None else needs_B
