"""A model that keeps none of its matrices: each is read from the checkpoint when its module runs, and dropped after.

A 7B model takes 28 GB in fp32, more than the machine has that trained it in 4 bits. So where answers are compared, each
forward pass reads the weights once more: it needs the memory of one matrix and of the activations, and the time of
reading the checkpoint. Callers put as many tokens into a pass as they can.

Between its uses a matrix is a single NaN seen in the matrix's shape, four bytes on the model's device. Code that asks
for shapes and devices gets the right ones; code that computes with a weight outside of its module's forward gets NaN,
never a plausible number. For such code `resident` keeps a module's weights in place. Vectors always stay: they are
small, and biases may be trained.

Left out: models whose tensors transformers renames or fuses while loading. Those are loaded whole.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.errors import ModelError
from qlora_trainer.model import device_with_room, empty_model, load_dense_model
from qlora_trainer.tensor_io import TensorInfo, checkpoint_name, checkpoint_tensors, read_tensor

WORKING_BYTES = 2**30  # activations and logits of a pass, roughly


class StreamedMatrix(nn.Parameter):
    """A parameter of two dimensions or more, fp32 and frozen, that has its values only while it is in use."""

    info: TensorInfo
    users: int  # a matrix tied to two modules may be in use by both

    @classmethod
    def of(cls, info: TensorInfo, device: torch.device) -> "StreamedMatrix":
        matrix = cls(_absent(info, device), requires_grad=False)
        matrix.info, matrix.users = info, 0
        return matrix

    def fetch(self) -> None:
        if self.users == 0:
            self.data = read_tensor(self.info).to(self.device).float()
        self.users += 1

    def drop(self) -> None:
        self.users -= 1
        if self.users == 0:
            self.data = _absent(self.info, self.device)


def load_streamed_model(directory: Path, device: torch.device) -> Any:
    """A model directory in fp32, frozen, in evaluation mode, whose modules read their matrices when they are called.

    It lies on the CPU where a GPU has no room. Adapters can be put on it; it gives no gradients.

    Raises:
        ModelError: it cannot be made, or its checkpoint does not fit its config.
        InsufficientMemoryError: as `check_streaming`.
    """
    model, sources, device = _examine(directory, device)
    if sources is None:
        return load_dense_model(directory, device)
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters are one, and stay one
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter not in made:
                made[parameter] = _parameter(sources[name], parameter, device)
            setattr(module, name.rpartition(".")[2], made[parameter])
        for name, buffer in module.named_buffers(path, recurse=False):
            source = sources.get(name)
            value = buffer if source is None else read_tensor(source).to(buffer.dtype)
            setattr(module, name.rpartition(".")[2], value.to(device))
        if _matrices(module):
            module.register_forward_pre_hook(_fetch)
            module.register_forward_hook(_drop, always_call=True)
    return model


def check_streaming(directory: Path, device: torch.device) -> None:
    """Whether the model of `directory`, or its merge, can be run by `load_streamed_model`.

    Raises:
        InsufficientMemoryError: neither the device nor the host has room for its largest matrix twice (the output head
            stays while the rest streams), or for the whole model where its tensors are renamed while loading.
    """
    _examine(directory, device)


@contextmanager
def resident(module: nn.Module) -> Iterator[None]:
    """Within, the module's own weights are in place, for code that uses them without calling it."""
    _fetch(module)
    try:
        yield
    finally:
        _drop(module)


def _examine(directory: Path, device: torch.device) -> tuple[Any, dict[str, TensorInfo] | None, torch.device]:
    """The empty model, where its parameters come from, if that can be told, and the device that has room."""
    model = empty_model(directory)
    sources = _sources(model, checkpoint_tensors(directory))
    sizes = [4 * parameter.numel() for parameter in model.parameters()]
    needed = sum(sizes) if sources is None else 2 * max(sizes)
    return model, sources, device_with_room(needed + WORKING_BYTES, device, f"Comparing answers of {directory}")


def _sources(model: nn.Module, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo] | None:
    """The tensor of each parameter and stored buffer, tied ones under each of their names; None if one has none."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    sources: dict[str, TensorInfo] = {}
    for tied in names.values():
        stored = [tensors[found] for name in tied if (found := checkpoint_name(name, tensors))]
        # transformers ties what is stored twice only where both hold the same values.
        if not stored or not all(torch.equal(read_tensor(stored[0]), read_tensor(other)) for other in stored[1:]):
            return None
        sources |= dict.fromkeys(tied, stored[0])
    for name in model.state_dict().keys() - sources.keys():
        if found := checkpoint_name(name, tensors):
            sources[name] = tensors[found]
    return sources


def _parameter(info: TensorInfo, expected: Tensor, device: torch.device) -> nn.Parameter:
    if info.shape != expected.shape:
        raise ModelError(
            f"{info.name} in {info.file} has shape {info.shape}, and the config asks for {tuple(expected.shape)}. "
            "Fetch the checkpoint again."
        )
    if len(info.shape) >= 2:
        return StreamedMatrix.of(info, device)
    return nn.Parameter(read_tensor(info).to(device, torch.float32, copy=True), requires_grad=False)


def _absent(info: TensorInfo, device: torch.device) -> Tensor:
    return torch.full((), torch.nan, device=device).expand(info.shape)


def _matrices(module: nn.Module) -> list[StreamedMatrix]:
    return [parameter for parameter in module.parameters(recurse=False) if isinstance(parameter, StreamedMatrix)]


def _fetch(module: nn.Module, *_: Any) -> None:
    for matrix in _matrices(module):
        matrix.fetch()


def _drop(module: nn.Module, *_: Any) -> None:
    for matrix in _matrices(module):
        matrix.drop()
