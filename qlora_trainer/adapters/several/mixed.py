"""Let each row of a batch take an adapter of its own: the layer's product is one, and each row adds its adapter's.

Adapters may have other ranks, scalings and layers, and be of several kinds, as long as each is a matter of linear
layers (LoRA, DoRA, IA3). For answers and evaluation alone: there are no gradients.

Legend: B rows, T tokens of a row, I in features, O out features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kernels.lora_linear import nf4_linear
from qlora_kernels.lora_rows import LoraStack, RowAdapter, RowSegments, add_lora_rows_
from qlora_kernels.scale_gradients import scaled
from qlora_trainer.adapters.kinds.table import ADAPTER_KINDS
from qlora_trainer.adapters.several.changes import Change
from qlora_trainer.adapters.several.loaded import LoadedAdapter
from qlora_trainer.adapters.trainable import AdaptedLinear
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.common.units import counted
from qlora_trainer.model.modules.nf4_linear import NF4Linear


class RowLayout:
    """Say to many layers at once which rows of the batch take which adapter."""

    segments = RowSegments((), ())

    def check(
        self,
        x: Tensor,  # (B, ..., I)
    ) -> None:
        """Refuse another batch than the one whose rows were named, and one that needs gradients.

        Args:
            x: input of a layer.

        Raises:
            AdapterError: it is one.
        """
        if len(x) != self.segments.batch:
            raise AdapterError(
                f"A layer was given {counted(len(x), 'row')}, and rows() {counted(self.segments.batch, 'name')}. Name "
                "the adapter of each row of the batch, in order, and let nothing repeat or pack rows."
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise AdapterError(
                "A batch whose rows take different adapters has no gradients: it is for answers and evaluation. Run it "
                "under torch.no_grad(), or put on one adapter by set_adapter()."
            )


class RowsLinear(nn.Module):
    """Compute a linear layer once for all rows of a batch, and add to each row what its adapter adds.

    Args:
        base: of the adapters' layers.
        adapters: by place what each does here; None for one that leaves this layer alone.
        layout: of the batch, which other layers share.
    """

    def __init__(self, base: nn.Module, adapters: Sequence[RowAdapter | None], layout: RowLayout) -> None:
        super().__init__()
        self.base, self.adapters, self.layout = base, tuple(adapters), layout
        self._stacks: dict[torch.dtype, LoraStack | None] = {}

    def forward(
        self,
        x: Tensor,  # (B, ..., I)
    ) -> Tensor:  # (B, ..., O)
        """Compute the layer's output.

        Args:
            x: input, (B, ..., I).

        Returns:
            Output, (B, ..., O).
        """
        self.layout.check(x)
        segments = self.layout.segments
        rows = [(some, self.adapters[place] if place >= 0 else None) for some, place in segments.slices]
        tokens = x.reshape(len(x), -1, x.shape[-1])  # (B, T, I)
        if any(one is not None and one.input_scale is not None for _, one in rows):
            tokens = tokens.clone()
            for some, one in rows:
                if one is not None and one.input_scale is not None:
                    scaled(tokens[some], one.input_scale, tokens[some])
        scales = any(one is not None and one.output_scale is not None for _, one in rows)
        output, bias = self._product(tokens, bias_apart=scales)
        if bias is not None:
            for some, one in rows:
                if one is None or one.output_scale is None:
                    output[some] += bias.to(output.dtype)
        stack = self._stack(x.dtype)
        if stack is not None:
            add_lora_rows_(output, tokens, stack, segments)
        if scales:
            for some, one in rows:
                if one is not None and one.output_scale is not None:
                    _scale(output[some], one.output_scale, bias, one.scales_bias)
        return output.reshape(*x.shape[:-1], output.shape[-1])

    def extra_repr(self) -> str:
        """Describe the adapters, as `print(model)` shows them.

        Returns:
            How many rows may choose from.
        """
        return counted(sum(one is not None for one in self.adapters), "adapter")

    def _product(self, tokens: Tensor, *, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
        """Return the base's output (B, T, O), a new tensor, and the bias (O,) if it is to be added yet."""
        base = self.base
        if isinstance(base, NF4Linear):
            bias = base.bias if bias_apart else None
            output = nf4_linear(tokens, base.nf4_weight, None if bias_apart else base.bias)
        else:
            bias = getattr(base, "bias", None) if bias_apart else None
            output = base(tokens).contiguous()
            if bias is not None:
                output -= bias
        return output, bias

    def _stack(self, dtype: torch.dtype) -> LoraStack | None:
        if dtype not in self._stacks:
            self._stacks[dtype] = LoraStack.of(self.adapters, dtype)
        return self._stacks[dtype]


def _scale(output: Tensor, scale: Tensor, bias: Tensor | None, scales_bias: bool) -> None:
    """Multiply the output of some rows (b, T, O) by a scale (O,), and add the bias (O,), in place."""
    scaled(output, scale, output)
    if bias is not None:
        output += (bias * scale if scales_bias else bias).to(output.dtype)


@dataclass(frozen=True)
class MixedAdapters:
    """Hold several adapters that rows of a batch choose from."""

    places: dict[str, int]  # by name
    layout: RowLayout
    changes: list[Change]  # of the base, that put them on

    def take(self, names: Sequence[str | None]) -> None:
        """Say which adapter each row takes from now on.

        Args:
            names: by row; None for the base alone.
        """
        self.layout.segments = RowSegments.of([-1 if name is None else self.places[name] for name in names])


@torch.no_grad()
def mixed_adapters(adapters: Mapping[str, LoadedAdapter]) -> MixedAdapters:
    """Make what lets rows of a batch choose from adapters. One that cannot be mixed is refused by an AdapterError.

    Args:
        adapters: by name, of one base.

    Returns:
        The adapters, none of which is on.
    """
    layout = RowLayout()
    found: dict[tuple[int, Any], tuple[Change, list[RowAdapter | None]]] = {}
    for place, (name, adapter) in enumerate(adapters.items()):
        check_mixable(name, adapter)
        for change in adapter.changes:
            key = id(change.entries), change.name
            found.setdefault(key, (change, [None] * len(adapters)))[1][place] = change.after.row_adapter()
    changes = [
        Change(first.entries, first.name, first.before, RowsLinear(first.before, of_rows, layout).eval())
        for first, of_rows in found.values()
    ]
    return MixedAdapters({name: place for place, name in enumerate(adapters)}, layout, changes)


def has_mixed_rows(model: nn.Module) -> bool:
    """Return True while the rows of a model's batches take adapters of their own.

    Args:
        model: any.

    Returns:
        True if they do.
    """
    return any(isinstance(module, RowsLinear) for module in model.modules())


def check_mixable(name: str, adapter: LoadedAdapter) -> None:
    """Refuse an adapter that rows cannot take next to others.

    Args:
        name: of the adapter, for the message.
        adapter: in memory.

    Raises:
        AdapterError: it is of a kind that has no rows of its own, or trained what all rows share.
    """
    rest = f"Give it a batch of its own: set_adapter({name!r})."
    if not ADAPTER_KINDS[adapter.kind].mixes:
        kinds = [kind.name for kind in ADAPTER_KINDS.values() if kind.mixes]
        raise AdapterError(
            f"Rows of one batch cannot take the adapter {name!r} next to others: it is of kind {adapter.kind}, and "
            f"only {', '.join(kinds)} can share a batch. {rest}"
        )
    if not all(isinstance(layer, AdaptedLinear) and layer.base is base for _, _, base, layer in adapter.changes):
        raise AdapterError(
            f"Rows of one batch cannot take the adapter {name!r} next to others: it trained biases of the "
            f"base, or rows of tokens, which all rows share. {rest}"
        )
