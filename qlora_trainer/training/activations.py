"""What backward keeps of each decoder layer: everything, or its input alone, on the device or on the host.

`recompute` runs each layer's forward again in backward (gradient checkpointing, Chen et al. 2016): less arithmetic than
keeping saves memory, which then hardly grows with depth. It is torch's non-reentrant kind: the reentrant one loses
gradients where a layer's input needs none, as with a frozen embedding, and would not stop before a layer's last
product. It restores the random state, so dropout draws the same masks. `offload` moves each layer's input to host
memory until then, or every second or third, from which those between are computed again. `tile` also takes the MLPs a
part of the tokens at a time, and dequantises large weights in parts.

Each level takes less of the device than the one before; the last layers may keep all under each of them. All give the
same gradients: bit for bit, but for tiles, where matrix products have other sizes.

Left out: choosing a policy by what fits (planning/fit.py), and what single modules keep (patches.py).
"""

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from qlora_kernels.host_copy import HostCopy, pinned_bytes
from qlora_kernels.random_state import RandomState
from qlora_trainer.common.errors import ModelError
from qlora_trainer.common.machine import host_memory
from qlora_trainer.config.schema import TrainingConfig
from qlora_trainer.model.modules.nf4_linear import share_workspace
from qlora_trainer.training.patches import tile_mlps

Level = Literal["keep", "recompute", "offload", "tile"]
LEVELS: tuple[Level, ...] = ("keep", "recompute", "offload", "tile")
MOST_BETWEEN_OFFLOADED = 3  # layers whose input one on the host stands for; more cost as much again in time
HOST_SHARE = 0.75  # of the host memory that is free, for what is offloaded
TILES = 8  # what one tile of an MLP takes is then less than what attention takes of the whole row
TILED_WORKSPACE = 1 << 24  # elements of a weight dequantised at a time under `tile`


@dataclasses.dataclass(frozen=True)
class Policy:
    """What backward keeps; each level of LEVELS needs less memory on the device than the one before it."""

    level: Level
    kept_layers: int = 0  # of the last layers; they keep all under every level
    offload_every: int = 1  # offload and tile: the input of every so many layers is kept on the host

    def leaner(self) -> "Policy | None":
        """The next policy with less on the device: first no layer keeps all, then a level further; None at the end."""
        if self.level != "keep" and self.kept_layers:
            return dataclasses.replace(self, kept_layers=0)
        later = LEVELS[LEVELS.index(self.level) + 1 :]
        return Policy(later[0], offload_every=self.offload_every) if later else None

    def as_settings(self) -> dict[str, object]:
        """The fields of TrainingConfig that name this policy."""
        return {"activations": self.level, "kept_layers": self.kept_layers, "offload_every": self.offload_every}

    def __str__(self) -> str:
        parts: list[str] = [self.level]
        if self.level != "keep" and self.kept_layers:
            parts.append(f"the last {self.kept_layers} layers keep all")
        if self.level in ("offload", "tile") and self.offload_every > 1:
            parts.append(f"one layer's input of {self.offload_every} on the host")
        return ", ".join(parts)


def choose_policy(settings: TrainingConfig, device: torch.device) -> Policy:
    """The policy that the config names; for auto, where no plan has decided it: recompute on CUDA, keep on a CPU."""
    if settings.activations == "auto":
        return Policy("recompute" if device.type == "cuda" else "keep")
    return Policy(settings.activations, settings.kept_layers, settings.offload_every)


def apply_policy(model: Any, policy: Policy) -> None:
    """Set the policy on a transformers model, in the place of another; it holds in training mode.

    Raises:
        ModelError: the model's layers cannot be recomputed; nothing was changed.
    """
    layers = decoder_layers(model)
    if policy.level != "keep" and not (layers and model.supports_gradient_checkpointing):
        raise ModelError(
            f"{type(model).__name__} cannot recompute its layers' activations; set training.activations=keep."
        )
    for layer in layers:
        layer.__dict__.pop("forward", None)
    tile_mlps(model, TILES if policy.level == "tile" else 1)
    share_workspace(model, model.config.dtype, TILED_WORKSPACE if policy.level == "tile" else None)
    if policy.level == "keep":
        return
    inputs = None if policy.level == "recompute" else OffloadedInputs(policy.offload_every)
    for layer in layers[: max(len(layers) - policy.kept_layers, 0)]:
        layer.forward = RecomputedLayer(layer, inputs)


def offloaded_bytes(model: Any, policy: Policy, tokens: int) -> int:
    """Host memory that a policy takes for the layers' inputs of one micro-batch."""
    if policy.level not in ("offload", "tile"):
        return 0
    layers = len(decoder_layers(model)) - policy.kept_layers
    one = tokens * model.config.get_text_config().hidden_size * model.config.dtype.itemsize
    return -(-layers // policy.offload_every) * pinned_bytes(one)


def host_room() -> int:
    """Bytes of host memory that may be taken for what is offloaded."""
    return int(host_memory().available * HOST_SHARE)


def decoder_layers(model: Any) -> list[nn.Module]:
    """A transformers model's decoder layers in order; empty where they are not one list of the config's length."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return list(lists[0]) if lists else []


class RecomputedLayer:
    """The forward of a decoder layer that keeps its input alone; the first argument is that input."""

    def __init__(self, layer: nn.Module, inputs: "OffloadedInputs | None") -> None:
        self.layer = layer
        self.inputs = inputs

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        def run(hidden: Tensor, *args: Any) -> Any:
            return type(self.layer).forward(self.layer, hidden, *args, **kwargs)

        if not (self.layer.training and torch.is_grad_enabled()):
            return run(hidden, *args)
        if self.inputs is None:
            return checkpoint(run, hidden, *args, use_reentrant=False)
        kept = self.inputs.put(hidden, lambda hidden: run(hidden, *args))
        with saved_tensors_hooks(kept.pack, kept.unpack):  # seen by checkpoint's inputs, not by what it recomputes
            output = checkpoint(run, hidden, *args, use_reentrant=False)
        kept.note_output(output)
        return output


class OffloadedInputs:
    """The layers' inputs of one forward pass after another: every n-th on the host, the others made from it again.

    That is where a layer's input is the output of the layer before it; another input goes to the host itself.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._last: weakref.ref[KeptInput] | None = None

    def put(self, hidden: Tensor, run: Callable[[Tensor], Any]) -> "KeptInput":
        """Keep the input of the next layer, whose forward is `run`."""
        last = None if self._last is None else self._last()
        if last is not None:
            last.release()
        before = last if last is not None and last.gave(hidden) else None  # else a new forward pass has begun
        kept = KeptInput(hidden, run, before, self.every)
        self._last = weakref.ref(kept)
        return kept


class KeptInput:
    """One layer's input, in host memory or as the output of the layer before it."""

    def __init__(self, hidden: Tensor, run: Callable[[Tensor], Any], before: "KeptInput | None", every: int) -> None:
        self.before = before
        depth = 0 if before is None else before.depth + 1
        self.depth: int = depth % every  # layers from one whose input is on the host
        self._run = run
        self._input = weakref.ref(hidden)
        self._output: weakref.ref[Tensor] | None = None
        self._random = RandomState(hidden) if every > 1 else None
        self._copy = HostCopy(hidden.detach()) if self.depth == 0 else None
        self._again: Tensor | None = None  # made again, until this layer's backward takes it

    def gave(self, hidden: Tensor) -> bool:
        """Whether `hidden` is this layer's own output, untouched."""
        return self._output is not None and self._output() is hidden

    def note_output(self, output: Any) -> None:
        self._output = weakref.ref(_first(output))

    def release(self) -> None:
        """Wait for the copy to the host, and let go of the tensor on the device."""
        if self._copy is not None:
            self._copy.release()

    def pack(self, tensor: Tensor) -> "Tensor | KeptInput":
        """For autograd: keep this object in the place of the layer's input, and other arguments as they are."""
        return self if tensor is self._input() else tensor

    def unpack(self, packed: "Tensor | KeptInput") -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        hidden, self._again = self.value(), None
        nearest = self.before
        while nearest is not None and nearest._copy is None:
            nearest = nearest.before
        if nearest is not None and (self._copy is not None or self.before is nearest):
            assert nearest._copy is not None
            nearest._copy.prefetch()  # comes while this layer computes, for the next one or for those before that
        return hidden

    def value(self) -> Tensor:
        """The input: from the host, or by running the layers from the nearest that is there."""
        if self._copy is not None:
            return self._copy.take()
        if self._again is None:
            assert self.before is not None
            self._again = self.before.output_again()
        return self._again

    def output_again(self) -> Tensor:
        assert self._random is not None
        hidden = self.value()
        with torch.no_grad(), self._random.restored():
            return _first(self._run(hidden))


def _first(output: Any) -> Tensor:
    """A layer's hidden states, which some layers give as the first of several."""
    return output[0] if isinstance(output, tuple) else output
