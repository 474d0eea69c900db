"""A model that keeps none of its matrices: each is read from the checkpoint when its module runs, and dropped after.

A 7B model takes 28 GB in fp32, more than the machine has that trained it in 4 bits. So where answers are compared, each
forward pass reads the weights once more: it needs the memory of one matrix and of the activations, and the time of
reading the checkpoint. Callers put as many tokens into a pass as they can. A weight comes as the checkpoint holds it,
or as it was in training, through NF4 and back (trained_weights.py).

Of an embedding only the rows of the tokens are read, and the LM head is multiplied with a block of its rows at a
time, so memory does not grow with the vocabulary.

Between its uses a matrix is a single NaN seen in the matrix's shape, four bytes on the model's device. Code that asks
for shapes and devices gets the right ones; code that computes with a weight outside of its module's forward gets NaN,
never a plausible number: `gives_answers` tells. Vectors always stay: they are small, and biases may be trained. So do
the small matrices of modules that are not linear, such as convolutions, which the code around them may take directly.

Left out: models whose tensors transformers fuses or splits while loading. Those are loaded whole.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_kernels.head_rows import head_logits
from qlora_trainer.common.errors import ModelError
from qlora_trainer.merging.trained_weights import TrainedWeight
from qlora_trainer.model.device import device_with_memory
from qlora_trainer.model.empty import empty_model, keep_layers
from qlora_trainer.model.load import load_dense_model
from qlora_trainer.model.modules.nf4_linear import is_linear
from qlora_trainer.model.names import match_names
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.reading import read_rows, same_values
from qlora_trainer.weights.tensors import TensorInfo

WORKING_BYTES = 2**30  # activations of a pass, roughly

Source = TensorInfo | TrainedWeight  # of a matrix: as the checkpoint holds it, or as it was in training


class StreamedMatrix(nn.Parameter):
    """A parameter of two dimensions or more, fp32 and frozen, that has its values only while it is in use."""

    source: Source
    users: int  # a matrix tied to two modules may be in use by both

    @classmethod
    def of(cls, source: Source, shape: torch.Size, device: torch.device) -> "StreamedMatrix":
        matrix = cls(_absent(shape, device), requires_grad=False)
        matrix.source, matrix.users = source, 0
        return matrix

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """An embedding is looked up by rows, whatever its module makes of the tokens before; all else as usual."""
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.embedding and isinstance(args[1], StreamedMatrix):
                ids, matrix = args[:2]
                wanted, places = ids.unique(return_inverse=True)
                return F.embedding(places, matrix.rows(wanted.cpu(), torch.float32))
            return func(*args, **(kwargs or {}))

    def rows(
        self,
        index: slice | Tensor,  # numbers of rows, ascending
        dtype: torch.dtype,
    ) -> Tensor:
        """Some of its rows, read from the checkpoint, of a matrix that was not 4-bit in training."""
        assert isinstance(self.source, TensorInfo), "embeddings and LM heads are dense"
        read = self.source.read(index) if isinstance(index, slice) else read_rows(self.source, index)
        return read.to(self.device).to(dtype)

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """It has its values as long as the block runs."""
        if self.users == 0:
            self.data = _read(self.source, self.device)
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            if self.users == 0:
                self.data = _absent(self.shape, self.device)


class StreamedHead(nn.Module):
    """A frozen LM head, logits = hidden W^T + b, whose W (V, H) is read by rows; it is its own HeadRows."""

    def __init__(self, weight: StreamedMatrix, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    @property
    def shape(self) -> tuple[int, int]:
        """(V, H)"""
        return self.weight.shape[0], self.weight.shape[1]

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:  # (stop - start, H)
        return self.weight.rows(slice(start, stop), dtype)

    def forward(
        self,
        hidden: Tensor,  # (..., H)
    ) -> Tensor:  # (..., V)
        logits = head_logits(hidden, self)
        return logits if self.bias is None else logits + self.bias


def load_streamed_model(
    directory: Path,
    device: torch.device,
    trained: Mapping[str, TrainedWeight] | None = None,
    *,
    layers: int | None = None,
) -> Any:
    """A model directory in fp32, frozen, in evaluation mode, whose modules read their matrices when they are called.

    It lies on the CPU where a GPU has no module. Adapters can be put on it; it gives no gradients.

    Args:
        trained: take these weights, by the checkpoint's names, as they were in training; reading one checks it.
        layers: only so many of the decoder's layers.

    Raises:
        ModelError: it cannot be made, or its checkpoint does not fit its config.
        InsufficientMemoryError: as `streaming_device`.
    """
    model, sources, device = _examine(directory, device, trained or {}, layers)
    if sources is None:
        assert not trained, "callers ask can_stream"
        return load_dense_model(ModelDirectory.open(directory), device)
    resident = _resident(model)
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters are one, and stay one
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter not in made:
                made[parameter] = _parameter(sources[name], parameter, device, parameter in resident)
            setattr(module, name.rpartition(".")[2], made[parameter])
        for name, buffer in module.named_buffers(path, recurse=False):
            source = sources.get(name)
            value = buffer if source is None else _read(source, device).to(buffer.dtype)
            setattr(module, name.rpartition(".")[2], value.to(device))
    for path, module in list(model.named_modules()):
        if _is_plain_head(module, model):
            model.set_submodule(path, StreamedHead(module.weight, module.bias))
        elif not isinstance(module, nn.Embedding) and _matrices(module):
            module.forward = functools.partial(_run_with_matrices, module, module.forward)
    return model


def can_stream(directory: Path) -> bool:
    """Whether `load_streamed_model` can stream the model; else its tensors are fused while loading."""
    opened = ModelDirectory.open(directory)
    return _sources(empty_model(opened, stored=opened.tensors), opened, {}) is not None


@torch.no_grad()
def gives_answers(model: Any) -> bool:
    """Whether a few tokens' logits are finite; a streamed model's are not where its code takes absent weights."""
    ids = torch.arange(8, device=next(model.parameters()).device)[None]
    return bool(torch.isfinite(model(input_ids=ids, use_cache=False).logits).all())


def streaming_device(directory: Path, device: torch.device) -> torch.device:
    """Where `load_streamed_model` would run the model of `directory`, or its merge: `device`, or the CPU.

    Raises:
        InsufficientMemoryError: neither has space for its largest matrix twice (it is made from another), or for the
            whole model where its tensors are fused while loading.
    """
    return _examine(directory, device, {}, None)[2]


def _examine(
    directory: Path, device: torch.device, trained: Mapping[str, TrainedWeight], layers: int | None
) -> tuple[Any, dict[str, Source] | None, torch.device]:
    """The empty model, where its parameters come from, if that can be determined, and the device that has space."""
    opened = ModelDirectory.open(directory)
    config = opened.config()
    if layers is not None:
        keep_layers(config.get_text_config(), layers)
    model = empty_model(opened, config, stored=opened.tensors)
    sources = _sources(model, opened, trained)
    if sources is None:
        needed = sum(4 * parameter.numel() for parameter in model.parameters())
    else:
        resident = _resident(model)
        by_rows = {m.weight for m in model.modules() if isinstance(m, nn.Embedding) or _is_plain_head(m, model)}
        fetched = [4 * parameter.numel() for parameter in set(model.parameters()) - resident - by_rows]
        needed = sum(4 * parameter.numel() for parameter in resident) + 2 * max(fetched, default=0)
    return model, sources, device_with_memory(needed + WORKING_BYTES, device, f"Comparing answers of {directory}")


def _sources(model: Any, directory: ModelDirectory, trained: Mapping[str, TrainedWeight]) -> dict[str, Source] | None:
    """What each parameter and stored buffer is read from, tied ones under each of their names; None if one has none."""
    tensors = directory.tensors
    stored_as = match_names(model, directory).found
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    sources: dict[str, Source] = {}
    for tied in names.values():
        stored = [tensors[found] for name in tied if (found := stored_as.get(name))]
        # transformers ties what is stored twice only where both hold the same values.
        if not stored or not all(same_values(stored[0], other) for other in stored[1:]):
            return None
        sources |= dict.fromkeys(tied, trained.get(stored[0].name, stored[0]))
    for name in model.state_dict().keys() - sources.keys():
        if found := stored_as.get(name):
            sources[name] = tensors[found]
    return sources


def _resident(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that stay: vectors, and matrices that the code around their module may take without calling it.

    Those are small, such as the convolutions of state-space models. Stacks of experts are not, and are used by their
    own module alone.
    """
    resident = set()
    for module in model.modules():
        is_torchs = type(module).__module__.startswith("torch.")
        for parameter in module.parameters(recurse=False):
            is_stack = parameter.ndim >= 3 and not is_torchs
            if parameter.ndim < 2 or not (is_stack or is_linear(module) or isinstance(module, nn.Embedding)):
                resident.add(parameter)
    return resident


def _parameter(source: Source, expected: Tensor, device: torch.device, stays: bool) -> nn.Parameter:
    info, shape = (source.source, source.stored_shape) if isinstance(source, TrainedWeight) else (source, source.shape)
    if shape != expected.shape:
        raise ModelError(
            f"{info.name} in {info.file} has shape {shape}, and the config asks for {tuple(expected.shape)}. "
            "Fetch the checkpoint again."
        )
    if stays:
        return nn.Parameter(_read(source, device).clone(), requires_grad=False)
    return StreamedMatrix.of(source, expected.shape, device)


def _read(source: Source, device: torch.device) -> Tensor:
    """The whole tensor in fp32."""
    if isinstance(source, TrainedWeight):
        return source.dense(device)
    return source.read().to(device).float()


def _absent(shape: torch.Size, device: torch.device) -> Tensor:
    return torch.full((), torch.nan, device=device).expand(shape)


def _is_plain_head(module: nn.Module, model: Any) -> bool:
    """Whether it is the LM head, and multiplies as a StreamedHead does."""
    return module is model.get_output_embeddings() and type(module) is nn.Linear


def _matrices(module: nn.Module) -> list[StreamedMatrix]:
    return [parameter for parameter in module.parameters(recurse=False) if isinstance(parameter, StreamedMatrix)]


def _run_with_matrices(module: nn.Module, forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    with contextlib.ExitStack() as matrices:
        for matrix in _matrices(module):
            matrices.enter_context(matrix.present())
        return forward(*arguments, **named)
