"""Hold a layer and its LoRA adapter as the kernels take them, and say what autograd sees of them.

Adapters over the same input whose A's lie below each other in memory are a stack: x A^T of all is one product, and so
is the gradient of their A's.

A vector may scale a layer's output (DoRA's magnitudes over its norms, Liu et al. 2024, arXiv:2402.09353; IA3's vectors
on keys and values, Liu et al. 2022, arXiv:2205.05638) or its input (IA3's in the MLP), with or without LoRA.

Left out: what is computed with them (lora_linear.py, adapter_gradients.py, scale_gradients.py, gated_linear.py).

Legend: N tokens, I in features, O out features, R rank, S ranks of a stack together.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_kernels.dropout import keep_mask
from qlora_kernels.nf4 import NF4Weight


@dataclass(frozen=True, eq=False)
class StackedA:
    """Hold the A's of several adapters without dropout, below each other, and their gradients."""

    count: int  # of the adapters, in the order of their layers
    A: Tensor  # (S, I), in the dtype of x
    grad: Tensor  # (S, I), in the dtype of the A's: backward adds to it


@dataclass(frozen=True, eq=False)
class Adapter:
    """Hold LoRA on a linear layer: scaling * dropout(x) A^T B^T."""

    lora_A: Tensor  # (R, I)
    lora_B: Tensor  # (O, R)
    scaling: float
    dropout: float = 0.0  # a probability below 1, of the adapter's input
    dropout_seed: Tensor | None = None  # () int64 on the CPU, as `draw_seed` gives it; needed where dropout is not 0
    casts: tuple[Tensor, Tensor, Tensor] | None = None  # A, B and B^T in the dtype of x, where somebody has cast them
    grads: tuple[Tensor, Tensor] | None = None  # of A and B^T: backward adds to these, and gives autograd none
    stacked: StackedA | None = None  # with those of adapters over the same input; only with `grads`

    def __post_init__(self) -> None:
        assert not self.dropout or self.dropout_seed is not None, "dropout needs a seed"

    def A_in(self, dtype: torch.dtype) -> Tensor:  # (R, I)
        """Return A in a dtype, from `casts` where they are of that one.

        Args:
            dtype: of the product.

        Returns:
            A.
        """
        cast = self.casts
        return cast[0] if cast is not None and cast[0].dtype == dtype else self.lora_A.to(dtype)

    def B_in(self, dtype: torch.dtype) -> Tensor:  # (O, R)
        """Return B in a dtype, from `casts` where they are of that one.

        Args:
            dtype: of the product.

        Returns:
            B.
        """
        cast = self.casts
        return cast[1] if cast is not None and cast[0].dtype == dtype else self.lora_B.to(dtype)

    def transposed_B_in(self, dtype: torch.dtype) -> Tensor:  # (R, O)
        """Return the transpose of `B_in`.

        Args:
            dtype: of the product.

        Returns:
            A view of B.
        """
        cast = self.casts
        return cast[2] if cast is not None and cast[0].dtype == dtype else self.lora_B.to(dtype).T

    @functools.cached_property
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


@dataclass(frozen=True, eq=False)
class OutputScale:
    """Hold what a layer's output, with its adapter's but without the bias, is multiplied by: a number for each feature.

    Its gradient needs the output as it was before. Kept, that is a tensor of the output's size from forward to
    backward: for layers that are recomputed, of which one has such tensors at a time. Otherwise backward multiplies
    once more by the weight, which it has dequantized for the input's gradient, and the input is kept.
    """

    values: Tensor  # (O,), any float dtype, multiplied in the wider of that and x's
    keeps_output: bool = False


class Projection(NamedTuple):
    """Hold a layer over an input, output_scale * (x W^T + adapter) + bias, of input_scale * x in the place of x."""

    weight: NF4Weight  # (O, I), frozen
    bias: Tensor | None = None  # (O,)
    adapter: Adapter | None = None
    output_scale: OutputScale | None = None
    input_scale: Tensor | None = None  # (I,), any float dtype; only of a layer that is alone over its input


class Stack:
    """Hold adapters over the same input as one; an adapter alone is a stack too.

    Args:
        members: with their places among the layers over this input; what scales one scales all, all train or none
            does, and of several none has dropout.
        A: (S, I), in the dtype of x.
        grad: (S, I), in the dtype of the A's: backward adds to it; None: autograd is given one.
    """

    def __init__(self, members: Sequence[tuple[int, Adapter]], A: Tensor, grad: Tensor | None) -> None:
        self.members, self.A, self.grad = members, A, grad
        self.place, self.first = members[0]

    def split(self, low_rank: Tensor, dim: int) -> Sequence[Tensor]:
        """Cut a tensor into the members' parts.

        Args:
            low_rank: (N, S), or (S, N).
            dim: of the members: 1, or 0.

        Returns:
            A view for each member.
        """
        if len(self.members) == 1:
            return (low_rank,)
        return low_rank.split_with_sizes([adapter.lora_A.shape[0] for _, adapter in self.members], dim)


def stacks_of(projections: Sequence[Projection], dtype: torch.dtype) -> list[Stack]:
    """Make one stack of the adapters of layers over one input where their A's are in one matrix, else one each.

    Args:
        projections: the layers.
        dtype: of the products.

    Returns:
        The stacks.
    """
    members = [(place, p.adapter) for place, p in enumerate(projections) if p.adapter is not None]
    stacked = members[0][1].stacked if members else None
    if stacked is not None and stacked.A.dtype == dtype and stacked.count == len(members):
        for _, adapter in members:
            if adapter.stacked is not stacked or adapter.dropout:
                break
        else:
            return [Stack(members, stacked.A, stacked.grad)]
    return [Stack((m,), m[1].A_in(dtype), None if m[1].grads is None else m[1].grads[0]) for m in members]


class Shown:
    """Hold what autograd sees of layers, but for their input: the parameters that it is to give gradients.

    Adapters with `grads` are none of them, but for one where nothing else makes autograd call the function back.

    Args:
        projections: the layers.
        is_called_back: their input needs a gradient.
    """

    def __init__(self, projections: Sequence[Projection], *, is_called_back: bool) -> None:
        self.tensors: list[Tensor] = []
        self.names: list[tuple[str, int]] = []  # "bias" or a key of `gradients`, and the place of the layer
        self.trains_A: set[int] = set()  # places of layers
        self.trains_B: set[int] = set()
        # Places of layers whose output scale trains: the output before it is kept, or is computed again.
        self.kept: list[int] = []
        self.remade: list[int] = []
        self.has_output_scale = False
        self.trains_input_scale = False
        self.needs_input = False  # by backward
        if not torch.is_grad_enabled():
            return
        for place, (_, bias, adapter, output_scale, input_scale) in enumerate(projections):
            if bias is not None and bias.requires_grad:
                self._show("bias", place, bias)
            if adapter is not None and adapter.grads is not None:
                self.trains_A.add(place)
                self.trains_B.add(place)
            elif adapter is not None:
                if adapter.lora_A.requires_grad:
                    self.trains_A.add(place)
                    self._show("A", place, adapter.lora_A)
                if adapter.lora_B.requires_grad:
                    self.trains_B.add(place)
                    self._show("B", place, adapter.lora_B)
            if output_scale is not None:
                self.has_output_scale = True
                if output_scale.values.requires_grad:
                    (self.kept if output_scale.keeps_output else self.remade).append(place)
                    self._show("output_scale", place, output_scale.values)
            if input_scale is not None and input_scale.requires_grad:
                self.trains_input_scale = True
                self._show("input_scale", place, input_scale)
        self.needs_input = bool(self.trains_A or self.remade or self.trains_input_scale)
        if self.trains_A and not self.tensors and not is_called_back:
            place = min(self.trains_A)
            adapter = projections[place].adapter
            assert adapter is not None
            self._show("A", place, adapter.lora_A)

    def _show(self, name: str, place: int, tensor: Tensor) -> None:
        self.tensors.append(tensor)
        self.names.append((name, place))

    def needed_low_ranks(self, stacks: Sequence[Stack], low_ranks: Sequence[Tensor]) -> list[Tensor | None]:
        """Return what backward needs of x A^T.

        Args:
            stacks: on the layers.
            low_ranks: x A^T (N, S) of each.

        Returns:
            Of each stack x A^T, or None where neither B nor an output that is computed again needs it.
        """
        needed: list[Tensor | None] = []
        for stack, low_rank in zip(stacks, low_ranks, strict=True):
            is_needed = stack.place in self.trains_B
            if self.remade and not is_needed:
                is_needed = any(place in self.remade for place, _ in stack.members)
            needed.append(low_rank if is_needed else None)
        return needed

    def gradients(self, grads: Sequence[Tensor], by_name: Mapping[str, Mapping[int, Tensor]]) -> list[Tensor | None]:
        """Return the gradients of what was shown, a bias' computed here.

        Args:
            grads: (N, O), of each layer's output.
            by_name: of "A", "B", "output_scale" and "input_scale" by the layer's place, scales' in any dtype.

        Returns:
            In the order of `tensors`.
        """
        found: list[Tensor | None] = []
        for (name, place), tensor in zip(self.names, self.tensors, strict=True):
            if name == "bias":
                found.append(grads[place].sum(0, dtype=tensor.dtype))
            else:
                grad = by_name[name].get(place)
                found.append(grad if grad is None else grad.to(tensor.dtype))
        return found
