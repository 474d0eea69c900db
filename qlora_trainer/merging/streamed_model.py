"""Run a model that keeps none of its matrices: each is read from the checkpoint when its module runs, and dropped.

A 7B model takes 28 GB in fp32, more than the machine has that trained it in 4 bits. So where logits are compared, each
forward pass reads the weights once more: it needs the memory of one matrix and of the activations, and the time of
reading the checkpoint. Callers put as many tokens into a pass as they can. A weight comes as the checkpoint holds it,
or as it was in training, through NF4 and back (trained_weights.py).

Of an embedding only the rows of the tokens are read, and the LM head is multiplied with a block of its rows at a
time, so memory does not grow with the vocabulary.

Between its uses a matrix is a single NaN seen in the matrix's shape, four bytes on the model's device. Code that asks
for shapes and devices gets the right ones; code that computes with a weight outside of its module's forward gets NaN,
never a plausible number, which `has_finite_logits` finds. Vectors always stay: they are small, and biases may be
trained. So do the small matrices of modules that are not linear, such as convolutions, which the code around them may
take directly.

Left out: what is read from where (stream_plan.py).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_kernels.head_rows import head_logits
from qlora_kernels.products import linear
from qlora_kernels.torch_internals import without_torch_function
from qlora_trainer.common.errors import ModelError
from qlora_trainer.merging.stream_plan import MatrixSource, StreamPlan, is_plain_head, plan_stream
from qlora_trainer.merging.trained_weights import TrainedWeight
from qlora_trainer.model.load import load_dense_model
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.reading import read_rows
from qlora_trainer.weights.tensors import TensorInfo


class StreamedMatrix(nn.Parameter):
    """Represent a parameter of two dimensions or more, fp32 and frozen, that has its values only while it is in use."""

    source: MatrixSource
    users: int  # a matrix tied to two modules may be in use by both
    rounding: Callable[[Tensor], Tensor] | None = None  # done to values that were read (rounding.py)

    @classmethod
    def of(cls, source: MatrixSource, shape: torch.Size, device: torch.device) -> "StreamedMatrix":
        """Make the parameter without its values.

        Args:
            source: to read it from.
            shape: of the matrix.
            device: of its values while it has them.

        Returns:
            The parameter.
        """
        matrix = cls(_absent(shape, device), requires_grad=False)
        matrix.source, matrix.users = source, 0
        return matrix

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look an embedding up by rows, whatever its module makes of the tokens before; all else as usual.

        Args:
            func: the function of torch that was called.
            types: of its arguments; not used.
            args: its arguments.
            kwargs: its named arguments.

        Returns:
            What the function gives.
        """
        with without_torch_function():
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
        """Read some rows from the checkpoint, of a matrix that was not 4-bit in training.

        Args:
            index: which rows.
            dtype: of what is returned.

        Returns:
            (rows, ...) on the matrix's device.
        """
        assert isinstance(self.source, TensorInfo), "embeddings and LM heads are dense"
        read = self.source.read(index) if isinstance(index, slice) else read_rows(self.source, index)
        return self._rounded(read.to(self.device)).to(dtype)

    def _rounded(self, values: Tensor) -> Tensor:
        return values if self.rounding is None else self.rounding(values.float())

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Give the matrix its values as long as the block runs."""
        if self.users == 0:
            self.data = self._rounded(_read(self.source, self.device))
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            if self.users == 0:
                self.data = _absent(self.shape, self.device)


class StreamedHead(nn.Module):
    """Compute logits = hidden W^T + b as a frozen LM head whose W is read by rows; it is its own HeadRows.

    Args:
        weight: (V, H).
        bias: (V,), or None.
    """

    def __init__(self, weight: StreamedMatrix, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    @property
    def shape(self) -> tuple[int, int]:
        """Return (V, H)."""
        return self.weight.shape[0], self.weight.shape[1]

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:  # (stop - start, H)
        """Read some rows of the weight.

        Args:
            start: the first row.
            stop: the row after the last.
            dtype: of what is returned.

        Returns:
            (stop - start, H).
        """
        return self.weight.rows(slice(start, stop), dtype)

    def forward(
        self,
        hidden: Tensor,  # (..., H)
    ) -> Tensor:  # (..., V)
        """Multiply hidden states with the weight, a block of its rows at a time.

        Args:
            hidden: the states.

        Returns:
            The logits.
        """
        logits = head_logits(hidden, self)
        return logits if self.bias is None else logits + self.bias


def load_streamed_model(
    directory: ModelDirectory,
    device: torch.device,
    trained: Mapping[str, TrainedWeight] | None = None,
    *,
    layers: int | None = None,
) -> Any:
    """Load a model in fp32, frozen, in evaluation mode, whose modules read their matrices when they are called.

    It is on the CPU where a GPU has too little memory. Adapters can be put on it; it gives no gradients. A model that
    cannot be streamed is loaded whole.

    Args:
        directory: of the model.
        device: to run it on.
        trained: weights to take as they were in training, by the checkpoint's names; reading one checks it.
        layers: only so many of the decoder's layers.

    Returns:
        The model of transformers.
    """
    plan = plan_stream(directory, device, trained, layers=layers)
    if plan.sources is None:
        assert not trained, "callers ask the plan"
        return load_dense_model(directory, plan.device)
    return fill_model(plan)


def fill_model(plan: StreamPlan) -> Any:
    """Give the planned model its parameters and buffers, in place.

    Args:
        plan: of a model that can be streamed, not filled before.

    Returns:
        The plan's model, in fp32, frozen, in evaluation mode.
    """
    model, sources, device = plan.model, plan.sources, plan.device
    assert sources is not None, "callers ask the plan"
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters are one, and stay one
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter not in made:
                made[parameter] = _parameter(sources[name], parameter, device, parameter in plan.resident)
            setattr(module, name.rpartition(".")[2], made[parameter])
        for name, buffer in module.named_buffers(path, recurse=False):
            source = sources.get(name)
            value = buffer if source is None else _read(source, device).to(buffer.dtype)
            setattr(module, name.rpartition(".")[2], value.to(device))
    for path, module in list(model.named_modules()):
        if is_plain_head(module, model):
            model.set_submodule(path, StreamedHead(module.weight, module.bias))
        elif not isinstance(module, nn.Embedding) and _matrices(module):
            forward = functools.partial(_multiply, module) if type(module) is nn.Linear else module.forward
            module.forward = functools.partial(_run_with_matrices, module, forward)
    return model


def read_trained_weights(model: Any, trained: Mapping[str, TrainedWeight]) -> None:
    """Make a streamed model read its weights as they were in training from here on: undo `read_original_weights`.

    Args:
        model: of `fill_model`; its adapters stay.
        trained: by the checkpoint's names.
    """
    for parameter in model.parameters():
        if isinstance(parameter, StreamedMatrix) and isinstance(parameter.source, TensorInfo):
            parameter.source = trained.get(parameter.source.name, parameter.source)


def read_original_weights(model: Any) -> None:
    """Make a streamed model read the checkpoint's own weights from here on, in place of those of training.

    Args:
        model: of `fill_model`, from a checkpoint that is not prequantized; its adapters stay.
    """
    for parameter in model.parameters():
        if isinstance(parameter, StreamedMatrix) and isinstance(parameter.source, TrainedWeight):
            parameter.source = parameter.source.source


@torch.no_grad()
def has_finite_logits(model: Any) -> bool:
    """Try a few tokens: the logits of a streamed model are not finite where its code takes absent weights.

    Args:
        model: of `fill_model`.

    Returns:
        True if all logits are finite.
    """
    ids = torch.arange(8, device=next(model.parameters()).device)[None]
    return bool(torch.isfinite(model(input_ids=ids, use_cache=False).logits).all())


def _parameter(source: MatrixSource, expected: Tensor, device: torch.device, stays: bool) -> nn.Parameter:
    info, shape = (source.source, source.stored_shape) if isinstance(source, TrainedWeight) else (source, source.shape)
    if shape != expected.shape:
        raise ModelError(
            f"{info.name} in {info.file} has shape {shape}, and the config asks for {tuple(expected.shape)}. "
            "Fetch the checkpoint again."
        )
    if stays:
        return nn.Parameter(_read(source, device).clone(), requires_grad=False)
    return StreamedMatrix.of(source, expected.shape, device)


def _read(source: MatrixSource, device: torch.device) -> Tensor:
    """Read the whole tensor in fp32."""
    if isinstance(source, TrainedWeight):
        return source.dense(device)
    return source.read().to(device).float()


def _absent(shape: torch.Size, device: torch.device) -> Tensor:
    return torch.full((), torch.nan, device=device).expand(shape)


def _matrices(module: nn.Module) -> list[StreamedMatrix]:
    return [parameter for parameter in module.parameters(recurse=False) if isinstance(parameter, StreamedMatrix)]


def _multiply(
    module: nn.Linear,
    x: Tensor,  # (..., I)
) -> Tensor:  # (..., O)
    """Compute as a plain linear layer, by the library that is fastest on this processor."""
    product = linear(x.reshape(-1, x.shape[-1]), module.weight, module.bias)
    return product.view(*x.shape[:-1], module.out_features)


def _run_with_matrices(module: nn.Module, forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    with contextlib.ExitStack() as matrices:
        for matrix in _matrices(module):
            matrices.enter_context(matrix.present())
        return forward(*arguments, **named)
