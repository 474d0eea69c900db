"""Run a function so that backward keeps its input alone, and runs it again for what it needs.

Hooks for saved tensors do it, autograd's (as in torch.utils.checkpoint without reentry) and those of our own functions:
in forward each tensor that would be saved is numbered and let go; in backward the first one that is asked for has the
function run again, which stops as soon as all are there. So nothing after the last saved tensor, such as a layer's last
product, is made twice, and a function whose input needs no gradient (above a frozen embedding) keeps its parameters'
ones. torch's own does the same for nested regions and for several threads at once, in five times as many Python calls;
a layer has some twenty saved tensors. Left out: where the input waits (offload.py).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from qlora_kernels.random_state import RandomState
from qlora_kernels.saved_tensors import KeptBy, Saved
from qlora_kernels.torch_internals import version_of
from qlora_trainer.common.errors import ModelError


class _AllThereError(Exception):
    """End a recomputation that has all that backward needs."""


class Recomputation:
    """Run a function once now, and once more in backward.

    Args:
        function: of one tensor; random numbers are the same both times.
        source: the tensor.
        again: returns a tensor of the same values in backward; None: the tensor itself is kept.
    """

    def __init__(
        self, function: Callable[[Tensor], Any], source: Tensor, again: Callable[[], Tensor] | None = None
    ) -> None:
        self._function, self._again = function, again
        self._source = source.detach() if again is None else None
        self._version = version_of(source)
        self._needs_gradient = source.requires_grad
        self._random = RandomState(source)
        self._kinds: list[tuple[torch.Size, torch.dtype]] = []  # of the tensors that forward would have saved
        self._made: list[Tensor | None] = []

    def run(self, source: Tensor) -> Any:
        """Run the function.

        Args:
            source: its input, of any shape.

        Returns:
            Its result, whose graph keeps none of its tensors.
        """
        with saved_tensors_hooks(self._number, self._take), KeptBy(self._number_all, self._take_all):
            return self._function(source)

    def _number(self, tensor: Tensor) -> int:
        self._kinds.append((tensor.shape, tensor.dtype))
        return len(self._kinds) - 1

    def _number_all(self, tensors: Saved) -> list[int | None]:
        numbers: list[int | None] = []
        for tensor in tensors:
            numbers.append(None if tensor is None else len(self._kinds))
            if tensor is not None:
                self._kinds.append((tensor.shape, tensor.dtype))
        return numbers

    def _take(self, number: int) -> Tensor:
        """Give backward a tensor, and let go of it; a graph that is used again has the function run again."""
        tensor = self._made[number] if self._made else None
        if tensor is None:
            self._run_again()
            tensor = self._made[number]
            assert tensor is not None
        self._made[number] = None
        return tensor

    def _take_all(self, numbers: Sequence[int | None]) -> Saved:
        found = []
        for number in numbers:
            found.append(None if number is None else self._take(number))
        return tuple(found)

    def _run_again(self) -> None:
        self._made = []
        source = self._input().detach().requires_grad_(self._needs_gradient)
        try:
            with (
                torch.enable_grad(),
                self._random.restored(),
                saved_tensors_hooks(self._collect, _refuse),
                KeptBy(self._collect_all, _refuse),
            ):
                self._function(source)
        except _AllThereError:
            return
        raise self._other()

    def _input(self) -> Tensor:
        if self._source is None:
            assert self._again is not None
            return self._again()
        if version_of(self._source) != self._version:
            raise ModelError(
                "This model writes into the input of a layer after the layer has begun, so the layer cannot be "
                "recomputed from it; set training.activation_checkpointing=none."
            )
        return self._source

    def _collect(self, tensor: Tensor) -> None:
        # Without its history: autograd asks it of what it is given back.
        self._collect_all((tensor.detach() if tensor.requires_grad else tensor,))

    def _collect_all(self, tensors: Saved) -> None:
        """Collect tensors with their history: that of a graph which holds no tensors, and goes with them."""
        for tensor in tensors:
            if tensor is None:
                continue
            if (tensor.shape, tensor.dtype) != self._kinds[len(self._made)]:
                raise self._other()
            self._made.append(tensor)
            if len(self._made) == len(self._kinds):
                raise _AllThereError

    def _other(self) -> ModelError:
        return ModelError(
            f"A layer of this model computes other tensors when it is run again: {len(self._made)} of "
            f"{len(self._kinds)} agree. It cannot be recomputed; set training.activation_checkpointing=none."
        )


def _refuse(packed: object) -> Any:
    raise AssertionError("a graph that is thrown away was used")
