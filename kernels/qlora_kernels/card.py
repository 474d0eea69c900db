"""Describe the CUDA card that is computed on, or planned for, and say what attention takes there.

A plan has a card without having one: tensors without memory are then treated as if they were on it.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Self

import torch
from torch import Tensor

from qlora_kernels.registry import kernel_choice
from qlora_kernels.torch_features import varlen_attention_arguments

HALVES = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Card:
    """Hold what decides how attention is computed on a CUDA card, and what it takes there."""

    capability: tuple[int, int]  # compute capability: major, minor
    processors: int  # streaming multiprocessors
    has_cuda: bool = True  # torch is built for CUDA, not for ROCm
    is_deterministic: bool = False  # torch is asked for deterministic algorithms, by an error where there are none

    @classmethod
    def of(cls, device: torch.device) -> Self:
        """Describe the card that a device is, under torch's present settings.

        Args:
            device: a CUDA device.

        Returns:
            The card.
        """
        return cls(
            torch.cuda.get_device_capability(device),
            torch.cuda.get_device_properties(device).multi_processor_count,
            torch.version.cuda is not None,
            torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled(),
        )

    def flash_refusal(self, dtype: torch.dtype, head_dim: int) -> str | None:
        """Say why flash attention is not taken on this card, under this torch and choice of kernels; None: it is.

        Args:
            dtype: of queries, keys and values.
            head_dim: numbers of a head.

        Returns:
            The reason, as `flash_refusal` gives it.
        """
        offered, choice = varlen_attention_arguments(), kernel_choice()
        return flash_refusal(self.capability, dtype, head_dim, offered, choice, has_cuda=self.has_cuda)

    def processors_summed_over(self, dtype: torch.dtype) -> int:
        """Count the multiprocessors for which flash attention's backward keeps sums apart, to add them up in order.

        Args:
            dtype: of queries, keys and values.

        Returns:
            Their number; 0 where backward is not deterministic or not by flash attention.
        """
        return self.processors if self.is_deterministic and self.capability >= (8, 0) and dtype in HALVES else 0


def flash_refusal(
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    offered: frozenset[str],  # arguments of torch's variable-length attention
    choice: str,  # of kernels, as QLORA_KERNELS says it
    *,
    has_cuda: bool = True,
) -> str | None:
    """Say why packed documents do not go through flash attention, and what would change that; None: they do.

    Its limits on card, dtype and head size hold for its backward too.

    Args:
        capability: compute capability of the card: major, minor.
        dtype: of queries, keys and values.
        head_dim: numbers of a head.
        offered: arguments of torch's variable-length attention.
        choice: of kernels, as in QLORA_KERNELS.
        has_cuda: torch is built for CUDA, not for ROCm.

    Returns:
        The reason.
    """
    if choice == "reference":
        return "QLORA_KERNELS=reference asks for plain torch; unset it"
    if not has_cuda:
        return "this torch is not built for CUDA"
    if not offered >= {"scale", "window_size"}:
        return "this torch's variable-length attention takes no scale and no window; install a newer torch"
    if capability < (8, 0):
        major, minor = capability
        return f"it needs a card of compute capability 8.0 (Ampere) or higher, and this one has {major}.{minor}"
    if dtype not in HALVES:
        return f"it computes in 16 bits, and this is {str(dtype).removeprefix('torch.')}; take bfloat16"
    if head_dim % 8 or (head_dim > 192 and head_dim != 256):
        return f"it takes heads of 256 numbers or a multiple of 8 up to 192, and these have {head_dim}"
    return None


def attention_in_words(
    card: Card | None,  # None: a CPU
    dtype: torch.dtype,
    head_dim: int,
    *,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> str:
    """Say how attention over packed documents is computed, and why not by flash attention.

    Args:
        card: that it is computed on; None: a CPU.
        dtype: of queries, keys and values.
        head_dim: numbers of a head.
        softcap: bound of the scores; None: none.
        dropout: share of the attention weights that are dropped.

    Returns:
        The sentence.
    """
    if softcap is not None:
        return "by blocks of queries: no fused attention has this model's soft cap"
    if card is None:
        return "one document after another, with a window by blocks of queries"
    refusal = "it has no dropout" if dropout else card.flash_refusal(dtype, head_dim)
    if refusal is None:
        return "flash attention over packed documents"
    return f"one document after another, with a window by blocks of queries; no flash attention over packs: {refusal}"


_PLANNED_FOR: ContextVar[Card | None] = ContextVar("planned_for", default=None)


@contextmanager
def planned_for(card: Card | None) -> Iterator[None]:
    """Make attention and loss in the block treat tensors that are on no card, those of a plan, as they would on `card`.

    Args:
        card: to plan for; None: a CPU.
    """
    token = _PLANNED_FOR.set(card)
    try:
        yield
    finally:
        _PLANNED_FOR.reset(token)


def card_of(tensor: Tensor) -> Card | None:
    """Return the card that a tensor is on, or for a plan's tensors the card planned for; None: a CPU.

    Args:
        tensor: of any shape, on any device.

    Returns:
        The card.
    """
    return Card.of(tensor.device) if tensor.is_cuda else _PLANNED_FOR.get()
