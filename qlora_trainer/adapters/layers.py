"""Put a LoRA adapter on a linear layer: y = base(x) + s (dropout(x) A^T) B^T.

The base is frozen (NF4Linear, or a plain layer that stayed 16-bit) and knows nothing of the adapter. Over an NF4Linear
both are one autograd function, which keeps the input and a rank-sized product for backward; over a plain layer it is
the formula in plain torch. A and B are fp32 parameters; they are cast to the activations' dtype where they are
multiplied, so their gradients and updates are fp32. lora_B starts at zero: before the first step the layer gives the
base's own output, bit for bit.

Of a fused layer some parts may be adapted alone, each with an A and a B of rank R: the A's are stacked, so are the B's,
and B's zero blocks, which make it one adapter of the summed rank, are put between them at each use.

Legend: O out features, I in features, R rank, P parts of a fused layer, S rows of these parts together.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_kernels.adapter import Adapter, Projection
from qlora_kernels.dropout import draw_seed
from qlora_kernels.lora_linear import add_lora, nf4_linears
from qlora_kernels.lora_rows import RowAdapter
from qlora_kernels.side_by_side import worker_number
from qlora_trainer.adapters.folds import LoraFold
from qlora_trainer.adapters.formulas import lora_scaling, with_zero_blocks, without_zero_blocks
from qlora_trainer.adapters.trainable import AdaptedLinear, Switch
from qlora_trainer.model.modules.nf4_linear import NF4Linear


class LoRALinear(AdaptedLinear):
    """Add an adapter's output to that of a linear layer.

    The adapter is on the base's device, on the CPU for a meta base.

    Args:
        base: as `is_linear` finds it.
        rank: R.
        alpha: of the scaling.
        dropout: probability, of the adapter's input.
        use_rslora: divide alpha by the root of the rank.
        parts: the rows to adapt, of each part of a fused layer; none: all, as one.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        parts: Sequence[slice] = (),  # the rows to adapt, of each part of a fused layer; none: all, as one
    ) -> None:
        super().__init__()
        in_features, self.out_features, device = linear_facts(base)
        self.base = base
        self.parts = tuple(parts)
        self.scaling = lora_scaling(rank, alpha, use_rslora)
        self.dropout = dropout  # a probability, of the adapter's input
        adapted_rows = sum(part.stop - part.start for part in parts) if parts else self.out_features
        self.lora_A = _uninitialized(in_features, rank * (len(parts) or 1), device)  # weight (R, I), or (P * R, I)
        self.lora_B = _uninitialized(rank, adapted_rows, device)  # weight (O, R), or (S, R)
        # By worker, to be taken while the switch is on:
        self.prepared: tuple[Switch, Sequence[Adapter]] = (Switch(), ())
        self.joint: tuple[LoRALinear, ...] = ()  # itself and others that always have the same input; see joint.py

    @classmethod
    def from_base(
        cls,
        base: nn.Module,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        use_rslora: bool,
        generator: torch.Generator,
        parts: Sequence[slice] = (),
        is_gaussian: bool = False,
    ) -> Self:
        """Wrap `base`, with A drawn as PEFT draws it (Kaiming-uniform, or Gaussian of deviation 1 / R), and B zero.

        Args:
            base: as `is_linear` finds it.
            rank: R.
            alpha: of the scaling.
            dropout: probability, of the adapter's input.
            use_rslora: divide alpha by the root of the rank.
            generator: of the CPU; A is drawn from it.
            parts: the rows to adapt, of each part of a fused layer; none: all, as one.
            is_gaussian: draw A from a normal distribution.

        Returns:
            The layer.
        """
        layer = cls(base, rank, alpha, dropout, use_rslora, parts)
        drawn = torch.empty(layer.lora_A.weight.shape)
        if is_gaussian:
            drawn.normal_(0.0, 1.0 / rank, generator=generator)
        else:
            bound = math.sqrt(1.0 / layer.lora_A.in_features)  # kaiming_uniform with a = sqrt(5)
            drawn.uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            layer.lora_A.weight.copy_(drawn)
            layer.lora_B.weight.zero_()
        return layer

    def forward(
        self,
        x: Tensor,  # (..., I)
    ) -> Tensor:  # (..., O)
        """Compute the layer's output with its adapter's.

        Args:
            x: input, (..., I).

        Returns:
            Output, (..., O).
        """
        base = self.base
        if isinstance(base, NF4Linear):
            return nf4_linears(x, (self.projection(),))[0]
        dropped = F.dropout(x, self.dropout, self.training)
        return add_lora(base(x), dropped, self.lora_A.weight, self.whole_B(self.lora_B.weight), self.scaling)

    @property
    def runs_at_once(self) -> bool:  # type: ignore[override]
        """Return True where the adapter's gradients are added by the kernels, for each thread apart."""
        return not self.parts

    @property
    def may_join(self) -> bool:  # type: ignore[override]
        """Return True where the layer is adapted whole, and so can be computed with others over its input."""
        return not self.parts

    def projection(self) -> Projection:
        """Return the layer as the kernels take it, for one call; its base is an NF4Linear.

        Returns:
            Weight, bias and adapter.
        """
        base = self.base
        assert isinstance(base, NF4Linear), "the kernels take 4-bit layers"
        return Projection(base.nf4_weight, base.bias, self.adapter())

    def whole_B(
        self,
        lora_B: Tensor,  # (S, R) where parts are adapted
    ) -> Tensor:  # (O, R), or (O, P * R)
        """Return B as one adapter of the layer has it; itself, where the layer is adapted whole.

        Args:
            lora_B: of the parts.

        Returns:
            The whole B.
        """
        return with_zero_blocks(lora_B, self.parts, self.out_features) if self.parts else lora_B

    def stored(self, name: str, values: Tensor) -> Tensor:
        """Return a factor in the shape of PEFT's file: B whole, where parts are adapted alone.

        Args:
            name: of lora_A's or lora_B's weight.
            values: of any shape, the parameter's.

        Returns:
            The factor.
        """
        return self.whole_B(values) if name.startswith("lora_B.") else values

    def unstored(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return a factor in its parameter's shape: the inverse of `stored`.

        Args:
            name: of lora_A's or lora_B's weight.
            tensor: of any shape that `stored` gives.

        Returns:
            The factor; None where a value outside of the parts' blocks is not zero.
        """
        return without_zero_blocks(tensor, self.parts) if self.parts and name.startswith("lora_B.") else tensor

    def row_adapter(self) -> RowAdapter:
        """Say what the adapter, as it is now, does to rows of a batch whose other rows take others.

        Returns:
            That.
        """
        return RowAdapter(self.lora_A.weight, self.whole_B(self.lora_B.weight), self.scaling)

    def fold(self) -> LoraFold:
        """Say what becomes of the layer's weight in a merge.

        Returns:
            The fold, of the adapter as it is now.
        """
        return LoraFold(self.lora_A.weight, self.whole_B(self.lora_B.weight), self.scaling)

    def adapter(self) -> Adapter:
        """Return the adapter as the kernels take it, for one call: with dropout on, it draws the seed of that call.

        Returns:
            The adapter.
        """
        switch, by_worker = self.prepared
        prepared = (
            by_worker[worker_number()]
            if switch.is_on
            else Adapter(self.lora_A.weight, self.lora_B.weight, self.scaling)
        )
        if self.parts:
            casts = prepared.casts
            if casts is not None:
                whole = self.whole_B(casts[1])
                casts = casts[0], whole, whole.T
            prepared = dataclasses.replace(prepared, lora_B=self.whole_B(prepared.lora_B), casts=casts, grads=None)
        if self.dropout and self.training:
            prepared = dataclasses.replace(prepared, dropout=self.dropout, dropout_seed=draw_seed())
        return prepared

    def extra_repr(self) -> str:
        """Describe the adapter, as `print(model)` shows it.

        Returns:
            Rank, scaling and dropout.
        """
        return f"rank={self.lora_B.in_features}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def projection_of(layer: NF4Linear | AdaptedLinear) -> Projection:
    """Return a layer as the kernels take it, for one call.

    Args:
        layer: 4-bit, adapted or not.

    Returns:
        Weight, bias and what trains.
    """
    return layer.projection() if isinstance(layer, AdaptedLinear) else Projection(layer.nf4_weight, layer.bias)


def linear_facts(base: nn.Module) -> tuple[int, int, torch.device]:
    """Return the sizes of a linear layer, and where its adapter goes.

    Args:
        base: as `is_linear` finds it.

    Returns:
        (I, O, device of the adapter).
    """
    if isinstance(base, NF4Linear):
        return base.in_features, base.out_features, base.packed.device
    weight = base.get_parameter("weight")
    out_features, in_features = weight.shape if isinstance(base, nn.Linear) else weight.shape[::-1]
    return in_features, out_features, torch.device("cpu") if weight.is_meta else weight.device


def _uninitialized(in_features: int, out_features: int, device: torch.device) -> nn.Linear:
    """Make an fp32 Linear without bias that draws no random numbers; torch's skip_init cannot make fake tensors."""
    layer = nn.Linear(in_features, out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.float32, device=device))
    return layer
