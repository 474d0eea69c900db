"""Record how large a model's activations get, module by module, to know whether a narrower dtype can hold them.

float16 ends at 65,504. A model made in bfloat16 may go far beyond it in its hidden states, or only in the product
inside an MLP, which is the input of its last layer and the output of none. So the input and the output of every module
are watched, in the order in which they are computed. Left out: what is no module's input or output, such as attention
scores; running the model in the narrow dtype shows these.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LargestValue:
    """Hold a place in a model and the largest absolute value seen there, which may be infinite or NaN."""

    place: str  # such as "the input of model.layers.0.mlp.down_proj"
    value: float

    def __str__(self) -> str:
        """Describe both.

        Returns:
            Such as "the output of model.layers.3, 102,950".
        """
        return f"{self.place}, {self.value:,.0f}"


@dataclass(eq=False)
class ActivationRange:
    """Hold the largest absolute value at each place, in the order in which the places were computed first."""

    _largest: dict[str, Tensor] = field(default_factory=dict)  # () fp32 each

    def take(self, place: str, values: Any) -> None:
        """Look at one tensor; what is no tensor of floats is passed over.

        Args:
            place: where it is.
            values: the first of a tuple is looked at.
        """
        found = values[0] if isinstance(values, tuple | list) and values else values
        if not isinstance(found, Tensor) or not found.is_floating_point() or found.numel() == 0:
            return
        largest = torch.stack(found.detach().aminmax()).float().abs().amax()  # NaN where there is one
        before = self._largest.get(place)
        self._largest[place] = largest if before is None else torch.maximum(before, largest.to(before.device))

    def largest(self) -> LargestValue | None:
        """Find the place of the largest value; one that is not finite counts as the largest.

        Returns:
            The place; None where nothing was seen.
        """
        values = self._values()
        return max(values, key=lambda found: found.value if found.value == found.value else float("inf"), default=None)

    def first_beyond(self, limit: float) -> LargestValue | None:
        """Find the first place, in the order of computation, that has a value beyond a limit or one that is NaN.

        Args:
            limit: the largest value that is held.

        Returns:
            The place; None where all values are held.
        """
        return next((found for found in self._values() if not found.value <= limit), None)

    def _values(self) -> list[LargestValue]:
        return [LargestValue(place, float(value)) for place, value in self._largest.items()]


@contextmanager
def watched_activations(model: nn.Module) -> Iterator[ActivationRange]:
    """Record the activations of every forward pass in the block.

    Args:
        model: of any kind.

    Yields:
        What is recorded.
    """
    seen = ActivationRange()
    hooks = []
    below_adapters = {id(module.base) for module in model.modules() if hasattr(module, "own_parameters")}
    for path, module in model.named_modules():
        if id(module) in below_adapters:
            continue  # what it gives without its adapter is in no merged model
        name = path or "the model"

        def note_input(_: nn.Module, inputs: tuple[Any, ...], place: str = f"the input of {name}") -> None:
            seen.take(place, inputs)

        def note_output(
            _: nn.Module, inputs: tuple[Any, ...], output: Any, place: str = f"the output of {name}"
        ) -> None:
            seen.take(place, output)

        hooks += [module.register_forward_pre_hook(note_input), module.register_forward_hook(note_output)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
