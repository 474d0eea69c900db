"""A device with too little memory for a micro-batch, and the state of a run before and after."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.batching.packing import Pack
from qlora_trainer.runs.run import Run
from qlora_trainer.runs.start import start_run
from qlora_trainer.training import step
from qlora_trainer.training.state import TrainState


class Scarcity:
    """Play a device: a micro-batch of more tokens than there is space for runs out of memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.limit: Callable[[], int] | None = None
        self.in_backward = False
        self.sizes: list[int] = []  # tokens, padding counted, of every micro-batch begun, this one last
        self.failures = 0
        self.succeeded_before_failure = 0
        real = step.loss_sum

        def loss_sum(model: Any, pack: Pack, path: Any) -> Tensor:
            self.sizes.append(pack.input_ids.numel())
            if not self.in_backward:
                self.check()
            return real(model, pack, path)

        monkeypatch.setattr(step, "loss_sum", loss_sum)

    def check(self, gradient: Tensor | None = None) -> None:
        if self.limit is not None and self.sizes[-1] > self.limit():
            self.failures += 1
            self.succeeded_before_failure = max(self.succeeded_before_failure, len(self.sizes) - 1)
            self.sizes.clear()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def fail_in_backward(self, state: TrainState) -> None:
        """When the gradients of later layers have been added, before the first layer's."""
        self.in_backward = True
        next(iter(state.groups[0].parameters.values())).register_hook(self.check)


def started(config: RunConfig) -> Run:
    """A run whose every adapter tensor gets a gradient at once: lora_B starts at zero, which would hide lora_A's."""
    run = start_run(config)
    with torch.no_grad():
        for group in run.state.groups:
            group.data.add_(torch.linspace(-0.05, 0.05, group.data.numel()))
    run.state.model.train()
    return run


def everything(state: TrainState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that a step could change, gradients and random state included."""
    tensors, rest = state.state_dict()
    buffers = {f"{g.name}.data": g.data.detach().clone() for g in state.groups}
    return tensors | buffers | {f"{g.name}.grad": g.grad.clone() for g in state.groups}, rest


def differences(one: tuple[dict[str, Tensor], dict], other: tuple[dict[str, Tensor], dict]) -> list[str]:
    assert one[0].keys() == other[0].keys()
    assert one[1].keys() == other[1].keys()
    tensors = [name for name in one[0] if not torch.equal(one[0][name], other[0][name])]
    return tensors + [name for name in one[1] if one[1][name] != other[1][name]]


def same_end(one: Run, other: Run) -> bool:
    files = "adapter_model.safetensors", "trainer_state.safetensors"
    ends = [max((run.directory / "checkpoints").iterdir()) for run in (one, other)]
    a, b = ({f"{f}:{k}": t for f in files for k, t in load_file(end / f).items()} for end in ends)
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)
