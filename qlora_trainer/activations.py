"""What backward keeps of each decoder layer: everything, or the layer's input alone.

`recompute` runs each layer's forward again in backward (gradient checkpointing, Chen et al. 2016): about a third more
arithmetic for memory that no longer grows with depth. It is non-reentrant, because the reentrant kind loses gradients
where a layer's input needs none, as with a frozen embedding, and it restores the random state, so dropout draws the
same mask twice.
"""

import dataclasses
from typing import Any, Literal

import torch

from qlora_trainer.config import TrainingConfig
from qlora_trainer.errors import ModelError

Level = Literal["keep", "recompute", "offload", "tile"]
LEVELS: tuple[Level, ...] = ("keep", "recompute", "offload", "tile")


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
    """Set the policy on a transformers model, in the place of another; it holds in training mode."""
    if policy.level == "keep":
        return
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(model).__name__} cannot recompute its layers' activations; set training.activations=keep."
        )
    model.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": True}
    )
