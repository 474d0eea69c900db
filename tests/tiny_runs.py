"""What tests of whole runs share: a display that shows nothing, a config changed by hand, and what came out."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.runs.start import start_run
from qlora_trainer.training.step import train_step


def quiet(record: dict[str, Any]) -> None:
    """A display that shows nothing."""


def edit_config(directory: Path, section: str, **fields: Any) -> None:
    """Change a run's config.yaml by hand."""
    path = directory / "config.yaml"
    raw = yaml.safe_load(path.read_text())
    raw[section] |= fields
    path.write_text(yaml.safe_dump(raw))


def final_adapter(directory: Path) -> dict[str, Tensor]:
    """The tensors of a run's adapter."""
    return load_file(directory / "adapter" / "adapter_model.safetensors")


class NoUpdate:
    """An optimizer that zeroes gradients and leaves parameters alone."""

    def __init__(self, optimizer: Any) -> None:
        self.zero_grad = optimizer.zero_grad

    def step(self, rate: float) -> None: ...


def gradients_of_one_step(config: RunConfig) -> tuple[float, list[Tensor]]:
    """(loss, flat gradient of each group) of the first step, before clipping."""
    run = start_run(config)
    for group in run.state.groups:  # what starts at zero, such as lora_B, would hide errors in other gradients
        with torch.no_grad():
            group.data.add_(torch.linspace(-0.05, 0.05, group.data.numel()).to(group.data.device))
    frozen = dataclasses.replace(run.state, optimizer=NoUpdate(run.state.optimizer))  # type: ignore[arg-type]
    frozen.model.train()
    metrics = train_step(frozen, run.state.loader.next())
    return metrics["loss"], [group.grad.clone() for group in run.state.groups]


def no_load(*args: object, **kwargs: object) -> None:
    """Take the place of what loads a base, where a mistake is to be found before."""
    raise AssertionError("the base was loaded, though the mistake could be found before")
