"""Scale the loss in fp16 so that small gradients do not vanish; lower the scale where a gradient overflows."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from qlora_trainer.common.errors import CheckpointError
from qlora_trainer.training.flat import FlatGroup


class GradScale:
    """Scale the loss for fp16 compute, by the rule of torch.amp.GradScaler, in plain Python.

    The loss is multiplied by a power of two before backward so that small fp16 gradients do not flush to zero, and the
    gradients are divided by it before the norm. A step with a non-finite norm is skipped and halves the scale;
    `growth_interval` good steps in a row double it.

    Args:
        enabled: False: every method is the identity.
        value: of the scale at first, a power of two.
        growth_interval: good steps in a row that double it.
    """

    def __init__(self, enabled: bool, value: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.enabled = enabled
        self.value = value if enabled else 1.0
        self.growth_interval = growth_interval
        self.good_steps = 0

    def scale(self, loss: Tensor) -> Tensor:
        """Multiply the loss by the scale, if it is in use.

        Args:
            loss: (), of a micro-batch.

        Returns:
            The loss to take gradients of.
        """
        return loss * self.value if self.enabled else loss

    def unscale_(self, groups: Sequence[FlatGroup]) -> None:
        """Divide the gradients in place; exact, as the scale is a power of two.

        Args:
            groups: all that train.
        """
        if self.enabled:
            for group in groups:
                group.grad.mul_(1.0 / self.value)

    def update(self, found_non_finite: bool) -> None:
        """Adapt the scale; called once after each step, taken or skipped.

        Args:
            found_non_finite: the step was skipped for that.
        """
        if not self.enabled:
            return
        if found_non_finite:
            self.value *= 0.5
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.value *= 2.0
            self.good_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint saves.

        Returns:
            Values by name.
        """
        return {"enabled": self.enabled, "value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Args:
            state: of a checkpoint.

        Raises:
            CheckpointError: the checkpoint scaled its loss and this run does not, or the reverse.
        """
        if state["enabled"] != self.enabled:
            raise CheckpointError(
                f"The checkpoint was trained {'with' if state['enabled'] else 'without'} fp16 loss scaling and this "
                f"run is {'with' if self.enabled else 'without'}: the compute dtype differs. Resume with the same "
                "model.compute_dtype on the same kind of device."
            )
        self.value = float(state["value"])
        self.good_steps = int(state["good_steps"])
