"""Choose what backward keeps of each decoder layer: everything, or its input alone, on the device or on the host.

`full` runs each layer's forward again in backward (gradient checkpointing, Chen et al. 2016, arXiv:1604.06174): for a
third more arithmetic, memory hardly grows with depth (offload.py). `offload` moves each layer's input to host memory
until then, or every second or third, from which those between are computed again. `tiled` also takes the MLPs a part of
the tokens at a time, and dequantizes large weights in parts.

Each level takes less of the device than the one before; under each of them the last layers may keep everything. All
give the same gradients: bit for bit, but for tiles, where matrix products have other sizes, and DoRA's magnitudes and
IA3's vectors, which are summed in another order where outputs are not kept.

Left out: choosing a policy by what fits (planning/fit.py), and what single modules keep (patches.py).
"""

import dataclasses
from typing import Any, Literal

import torch

from qlora_kernels.host_copy import pinned_bytes
from qlora_trainer.common.errors import ModelError
from qlora_trainer.common.machine import host_memory
from qlora_trainer.config.schema import TrainingConfig
from qlora_trainer.model.modules.decoder_layers import decoder_layers
from qlora_trainer.model.modules.nf4_linear import share_workspaces
from qlora_trainer.training.memory.offload import OffloadedInputs, RecomputedLayer
from qlora_trainer.training.patches import tile_mlps

Level = Literal["none", "full", "offload", "tiled"]
LEVELS: tuple[Level, ...] = ("none", "full", "offload", "tiled")
MOST_BETWEEN_OFFLOADED = 3  # layers of which one has its input in host memory; more cost as much again in time
HOST_SHARE = 0.75  # of the host memory that is free, for what is offloaded
TILES = 8  # what one tile of an MLP takes is then less than what attention takes of the whole row
TILED_WORKSPACE = 1 << 24  # elements of a weight dequantized at a time under `tiled`


@dataclasses.dataclass(frozen=True)
class Policy:
    """Say what backward keeps; each level of LEVELS needs less memory on the device than the one before it."""

    level: Level
    uncheckpointed_layers: int = 0  # of the last layers: all of theirs is kept, under every level
    offload_every_n_layers: int = 1  # offload and tiled: of so many layers the input of one is in host memory

    @property
    def offloads(self) -> bool:
        """Return True if inputs of layers wait in host memory."""
        return self.level in ("offload", "tiled")

    def with_less_memory(self) -> "Policy | None":
        """Return the next policy with less on the device: first no layer keeps everything, then a level further.

        Returns:
            The policy; None at the end.
        """
        if self.level != "none" and self.uncheckpointed_layers:
            return dataclasses.replace(self, uncheckpointed_layers=0)
        later = LEVELS[LEVELS.index(self.level) + 1 :]
        return Policy(later[0], offload_every_n_layers=self.offload_every_n_layers) if later else None

    def as_settings(self) -> dict[str, object]:
        """Return the fields of TrainingConfig that name this policy.

        Returns:
            Values by the fields' names.
        """
        return {
            "activation_checkpointing": self.level,
            "uncheckpointed_layers": self.uncheckpointed_layers,
            "offload_every_n_layers": self.offload_every_n_layers,
        }

    def __str__(self) -> str:
        parts: list[str] = [self.level]
        if self.level != "none" and self.uncheckpointed_layers:
            parts.append(
                f"except for the last "
                f"{'layer' if self.uncheckpointed_layers == 1 else f'{self.uncheckpointed_layers} layers'}"
            )
        if self.offloads and self.offload_every_n_layers > 1:
            parts.append(f"the input of one layer in {self.offload_every_n_layers} in host memory")
        return ", ".join(parts)


def choose_policy(settings: TrainingConfig, device: torch.device) -> Policy:
    """Return the policy that the config names; for auto, where no plan has chosen one, full on CUDA and none on a CPU.

    Args:
        settings: the config's section `training`.
        device: that the run takes.

    Returns:
        The policy.
    """
    if settings.activation_checkpointing == "auto":
        return Policy("full" if device.type == "cuda" else "none")
    return Policy(settings.activation_checkpointing, settings.uncheckpointed_layers, settings.offload_every_n_layers)


def apply_policy(model: Any, policy: Policy, workers: int = 1) -> None:
    """Set the policy on a model, in the place of another; it holds in training mode.

    Args:
        model: of transformers, patched.
        policy: to set.
        workers: threads that run the model at once.

    Raises:
        ModelError: the model's layers cannot be recomputed; nothing was changed.
    """
    layers = decoder_layers(model)
    if policy.level != "none" and not (layers and model.supports_gradient_checkpointing):
        raise ModelError(
            f"{type(model).__name__} cannot recompute its layers; set training.activation_checkpointing=none."
        )
    for layer in layers:
        layer.__dict__.pop("forward", None)
    tile_mlps(model, TILES if policy.level == "tiled" else 1)
    share_workspaces(model, model.config.dtype, TILED_WORKSPACE if policy.level == "tiled" else None, workers)
    if policy.level == "none":
        return
    inputs = OffloadedInputs(policy.offload_every_n_layers) if policy.offloads else None
    for layer in layers[: max(len(layers) - policy.uncheckpointed_layers, 0)]:
        layer.forward = RecomputedLayer(layer, inputs)


def offloaded_bytes(model: Any, policy: Policy, tokens: int) -> int:
    """Compute the host memory that a policy takes for the layers' inputs of one micro-batch.

    Args:
        model: of transformers.
        policy: to count for.
        tokens: of the micro-batch.

    Returns:
        Bytes of pinned memory.
    """
    size = model.config.get_text_config().hidden_size * model.config.dtype.itemsize
    return bytes_of_inputs(len(decoder_layers(model)), size, policy, tokens)


def bytes_of_inputs(layers: int, size: int, policy: Policy, tokens: int) -> int:
    """Compute the host memory that a policy takes for the inputs of so many layers.

    Args:
        layers: of the model.
        size: bytes of one token's hidden states.
        policy: to count for.
        tokens: of the micro-batch.

    Returns:
        Bytes of pinned memory.
    """
    if not policy.offloads:
        return 0
    offloaded = -(-(layers - policy.uncheckpointed_layers) // policy.offload_every_n_layers)
    return offloaded * pinned_bytes(tokens * size)


def spare_host_memory() -> int:
    """Compute the host memory that may be taken for what is offloaded.

    Returns:
        Bytes.
    """
    return int(host_memory().available * HOST_SHARE)
