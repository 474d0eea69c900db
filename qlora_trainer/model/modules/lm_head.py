"""Hold the LM head in 4 or 8 bits while training.

With a large vocabulary the dense head is a fifth of an 8B model's memory in training. Here it is NF4, as the linear
layers are, or int8 with a scale for each row, and is dequantized a block of rows at a time, for logits and loss alike.
This is an approximation in training only: the merged model has the original head, and merging verifies with that one.

A head that shares its weight with the input embedding gets a weight of its own, and the embedding does not change. So
with such a model memory is saved only if the embedding is kept in host memory (cpu_embedding.py).

Legend: H hidden size, V vocabulary.
"""

from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from qlora_kernels.head_rows import HeadRows, TrainedRows, head_logits
from qlora_kernels.int8 import Int8Weight, dequantize_int8, quantize_int8
from qlora_kernels.nf4 import NF4Weight, dequantize_nf4
from qlora_trainer.common.errors import ModelError
from qlora_trainer.weights.nf4 import empty_weight, quantize_weight

HeadKind = Literal["auto", "dense", "8bit", "4bit"]  # auto: dense, where no plan has chosen another


@runtime_checkable
class PartlyTrained(Protocol):
    """Describe an LM head of which some rows train."""

    @property
    def trained_rows(self) -> TrainedRows:
        """Return its matrix.

        Returns:
            The frozen rows, and those that train.
        """
        ...


class QuantizedHead(nn.Module):
    """Run a frozen LM head, logits = hidden W^T + b, with W (V, H) quantized; it implements HeadRows.

    Args:
        weight: W.
        bias: b, or None.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: NF4Weight | Int8Weight,  # (V, H)
        bias: nn.Parameter | None,  # (V,)
    ) -> None:
        super().__init__()
        self._shape = weight.shape
        self._make = _nf4_weight if isinstance(weight, NF4Weight) else _int8_weight
        for name, value in _tensors(weight).items():
            self.register_buffer(name, value, persistent=False)
        self.bias = bias

    def take(
        self,
        weight: Tensor,  # (V, H), finite
    ) -> None:
        """Replace the weight by another one, quantized to the same format.

        Args:
            weight: of any float dtype, finite.
        """
        kind: HeadKind = "4bit" if self._make is _nf4_weight else "8bit"
        for name, value in _tensors(_quantized(weight, kind)).items():
            setattr(self, name, value)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (V, H)."""
        return self._shape

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:  # (stop - start, H)
        """Dequantize rows of the weight.

        Args:
            start: the first row.
            stop: the row after the last.
            dtype: of the result.

        Returns:
            The rows.
        """
        weight = self._make(self)
        if isinstance(weight, NF4Weight):
            return dequantize_nf4(weight, dtype, rows=slice(start, stop))
        return dequantize_int8(weight, dtype, rows=slice(start, stop))

    def forward(
        self,
        hidden: Tensor,  # (..., H)
    ) -> Tensor:  # (..., V), dtype of hidden
        """Compute logits.

        Args:
            hidden: (..., H).

        Returns:
            Logits, (..., V), in the dtype of `hidden`.
        """
        logits = head_logits(hidden, self)
        return logits if self.bias is None else logits + self.bias.to(hidden.dtype)

    def extra_repr(self) -> str:
        """Describe the head, as `print(model)` shows it.

        Returns:
            Its sizes.
        """
        return f"vocabulary={self.shape[0]}, hidden_size={self.shape[1]}, bias={self.bias is not None}"


def quantize_head(model: Any, kind: HeadKind) -> None:
    """Replace the model's LM head by a QuantizedHead on its device; do nothing for "dense" and "auto".

    ModelError is raised if the head is no linear layer, QuantizationError if its weight is not finite.

    Args:
        model: of transformers, changed in place.
        kind: the format.
    """
    if kind in ("8bit", "4bit"):
        path, head = _find_head(model, kind)
        model.set_submodule(path, QuantizedHead(_quantized(head.weight.detach(), kind), head.bias))


def empty_head(model: Any, kind: HeadKind, device: str = "cpu") -> None:
    """Replace the LM head as `quantize_head` does, with uninitialized tensors: to be filled, or fake ones for planning.

    Args:
        model: of transformers, changed in place.
        kind: the format.
        device: of the quantized tensors.
    """
    if kind in ("8bit", "4bit"):
        path, head = _find_head(model, kind)
        vocabulary, hidden_size = head.weight.shape
        int8 = Int8Weight(
            codes=torch.empty(vocabulary, hidden_size, dtype=torch.int8, device=device),
            scale=torch.empty(vocabulary, dtype=torch.float32, device=device),
        )
        quantized = empty_weight(vocabulary, hidden_size, device) if kind == "4bit" else int8
        model.set_submodule(path, QuantizedHead(quantized, head.bias))


def head_weight(head: Any) -> Tensor | HeadRows:
    """Return an LM head's weight in the form that the loss takes.

    Args:
        head: a linear layer, a HeadRows, or a head of which some rows train.

    Returns:
        The matrix (V, H), or what makes it by rows.
    """
    if isinstance(head, PartlyTrained):
        return head.trained_rows
    return head if isinstance(head, HeadRows) else head.weight


def _find_head(model: Any, kind: HeadKind) -> tuple[str, nn.Linear]:
    """Return the LM head's path and the head; ModelError if it is no linear layer."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"The LM head of {type(model).__name__} is no plain linear layer, and cannot be held in {kind}. Set "
            "model.lm_head=dense."
        )
    return next(path for path, module in model.named_modules() if module is head), head


def _quantized(weight: Tensor, kind: HeadKind) -> NF4Weight | Int8Weight:
    return quantize_weight(weight, "the LM head") if kind == "4bit" else quantize_int8(weight)


def _tensors(weight: NF4Weight | Int8Weight) -> dict[str, Tensor]:
    """Return the tensors of a weight by name; its other fields are constants of its format."""
    return {name: value for name, value in vars(weight).items() if isinstance(value, Tensor)}


def _nf4_weight(head: Any) -> NF4Weight:
    return NF4Weight(head.packed, head.absmax, head.nested_absmax, head.nested_code, head.offset, head.shape)


def _int8_weight(head: Any) -> Int8Weight:
    return Int8Weight(head.codes, head.scale)
