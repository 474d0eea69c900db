"""What backward keeps of each decoder layer: everything, or the layer's input alone.

`recompute` runs each layer's forward again in backward (gradient checkpointing, Chen et al. 2016): about a third more
arithmetic for memory that no longer grows with depth. It is non-reentrant, because the reentrant kind loses gradients
where a layer's input needs none, as with a frozen embedding, and it restores the random state, so dropout draws the
same mask twice.
"""

from typing import Any, Literal

import torch

from qlora_trainer.errors import ModelError

Policy = Literal["keep", "recompute"]


def choose_policy(wanted: str, device: torch.device) -> Policy:
    """auto: recompute on CUDA, where memory is what decides; keep on a CPU, where time is."""
    if wanted == "auto":
        return "recompute" if device.type == "cuda" else "keep"
    return "recompute" if wanted == "recompute" else "keep"


def apply_policy(model: Any, policy: Policy) -> None:
    """Set the policy on a transformers model; it holds in training mode."""
    if policy == "keep":
        return
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(model).__name__} cannot recompute its layers' activations; set training.activations=keep."
        )
    model.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": True}
    )
