"""Recompute a decoder layer in backward from its input, which may wait in host memory until then.

Left out: how it is run again (recompute.py), which layers are recomputed and which inputs are offloaded
(activations.py).
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kernels.host_copy import HostCopy
from qlora_kernels.random_state import RandomState
from qlora_trainer.training.memory.recompute import Recomputation


class RecomputedLayer:
    """Run the forward of a decoder layer so that its input alone is kept; the first argument is that input.

    Args:
        layer: of the model.
        inputs: keeps the inputs of all layers on the host; None: on the device.
    """

    def __init__(self, layer: nn.Module, inputs: "OffloadedInputs | None") -> None:
        self.layer = layer
        self.inputs = inputs

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer; in training keep only its input, from which backward runs it again.

        Args:
            hidden: the layer's input.
            *args: other arguments of the layer.
            **kwargs: other arguments by name.

        Returns:
            The layer's output.
        """

        def run(hidden: Tensor) -> Any:
            return type(self.layer).forward(self.layer, hidden, *args, **kwargs)

        if not (self.layer.training and torch.is_grad_enabled()):
            return run(hidden)
        if self.inputs is None:
            return Recomputation(run, hidden).run(hidden)
        kept = self.inputs.put(hidden, run)
        output = Recomputation(run, hidden, kept.take).run(hidden)
        kept.note_output(output)
        return output


class OffloadedInputs:
    """Keep the layers' inputs of one forward pass after another: every n-th on the host, the others made from it again.

    The others are made again where a layer's input is the output of the layer before it; any other input is moved to
    the host itself.

    Args:
        every: n.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._last: weakref.ref[KeptInput] | None = None

    def put(self, hidden: Tensor, run: Callable[[Tensor], Any]) -> "KeptInput":
        """Keep the input of the next layer.

        Args:
            hidden: (..., hidden size), the input.
            run: the layer's forward.

        Returns:
            The input, kept.
        """
        last = None if self._last is None else self._last()
        if last is not None:
            last.release()
        before = last if last is not None and last.produced(hidden) else None  # else a new forward pass has begun
        kept = KeptInput(hidden, run, before, self.every)
        self._last = weakref.ref(kept)
        return kept


class KeptInput:
    """Keep one layer's input, in host memory or as the output of the layer before it.

    Args:
        hidden: the input.
        run: the layer's forward.
        before: the input of the layer whose output this is; None if it is no layer's output.
        every: one input of so many is on the host.
    """

    def __init__(self, hidden: Tensor, run: Callable[[Tensor], Any], before: "KeptInput | None", every: int) -> None:
        self.before = before
        depth = 0 if before is None else before.depth + 1
        self.depth: int = depth % every  # layers from one whose input is on the host
        self._run = run
        self._output: weakref.ref[Tensor] | None = None
        self._random = RandomState(hidden) if every > 1 else None
        self._copy = HostCopy(hidden.detach()) if self.depth == 0 else None
        self._again: Tensor | None = None  # made again, until this layer's backward takes it

    def produced(self, hidden: Tensor) -> bool:
        """Return True if `hidden` is this layer's own output, untouched.

        Args:
            hidden: (..., hidden size), input of another layer.

        Returns:
            True if it is.
        """
        return self._output is not None and self._output() is hidden

    def note_output(self, output: Any) -> None:
        """Remember the layer's output, to recognize it as the next layer's input.

        Args:
            output: of the layer.
        """
        self._output = weakref.ref(_first(output))

    def release(self) -> None:
        """Wait for the copy to the host, and let go of the tensor on the device."""
        if self._copy is not None:
            self._copy.release()

    def take(self) -> Tensor:
        """Return the layer's input for its backward, and begin to fetch what the layers before it need.

        Returns:
            The input, on the device.
        """
        hidden, self._again = self.value(), None
        nearest = self.before
        while nearest is not None and nearest._copy is None:
            nearest = nearest.before
        if nearest is not None and (self._copy is not None or self.before is nearest):
            assert nearest._copy is not None
            nearest._copy.prefetch()  # comes while this layer computes, for the next one or for those before that
        return hidden

    def value(self) -> Tensor:
        """Return the input: from the host, or by running the layers from the nearest whose input is there.

        Returns:
            The input, on the device.
        """
        if self._copy is not None:
            return self._copy.take()
        if self._again is None:
            assert self.before is not None
            self._again = self.before.output_again()
        return self._again

    def output_again(self) -> Tensor:
        """Run the layer again for the input of the layer after it.

        Returns:
            The layer's output, without a graph.
        """
        assert self._random is not None
        hidden = self.value()
        with torch.no_grad(), self._random.restored():
            return _first(self._run(hidden))


def _first(output: Any) -> Tensor:
    """Return a layer's hidden states, which some layers give as the first of several results."""
    return output[0] if isinstance(output, tuple) else output
