"""Hold the base's linear layers frozen in 4 bits (NF4), and find which of a model's layers become 4-bit.

A base Linear becomes an NF4Linear: packed 4-bit codes with double-quantized block maxima, held as plain buffers, so
that optimizers and casts of parameters do not touch them. qlora_kernels quantizes (QLoRA, Dettmers et al. 2023), on
every device to the codes that bitsandbytes gives on a CPU. Weights that were quantized elsewhere are checked by
weights/bitsandbytes_format.py.

Legend: O out features, I in features.
"""

from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kernels.lora_linear import nf4_linear
from qlora_kernels.nf4 import NF4Weight
from qlora_kernels.nf4_reference import BLOCK_SIZE, NESTED_BLOCK_SIZE
from qlora_kernels.side_by_side import worker_number
from qlora_trainer.common.errors import ModelError
from qlora_trainer.common.transformers_internals import modules_kept_in_fp32, tied_weight_names
from qlora_trainer.common.units import counted
from qlora_trainer.weights.bitsandbytes_format import weight_from_bitsandbytes
from qlora_trainer.weights.nf4 import WEIGHT_TENSORS, empty_weight, load_bitsandbytes

# Classes that only multiply by a matrix and add a bias, by name, since classes derived from them may do more.
_LINEAR, _CONV1D = {"Linear", "FalconLinear"}, "Conv1D"  # GPT-2's Conv1D stores (I, O)


class NF4Linear(nn.Module):
    """Run a frozen linear layer, y = x W^T + b, with W (O, I) in NF4, dequantized when it is used.

    Args:
        weight: W.
        bias: b, or None.
        fan_in_fan_out: True if the checkpoint stores (I, O), as GPT-2's Conv1D does.
    """

    packed: Tensor  # this and the next four as in NF4Weight
    absmax: Tensor
    nested_absmax: Tensor
    nested_code: Tensor
    offset: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: NF4Weight,
        bias: Tensor | None,  # (O,)
        fan_in_fan_out: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.fan_in_fan_out = fan_in_fan_out
        for name in WEIGHT_TENSORS:
            self.register_buffer(name, getattr(weight, name), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._weights: dict[int, NF4Weight] = {}  # kept, as making it at each use costs as much as an operation
        self.workspaces = ()

    def take(self, weight: NF4Weight) -> None:
        """Replace the weight by another one of the same shape.

        Args:
            weight: held without a copy.
        """
        assert weight.shape == (self.out_features, self.in_features)
        self._weights = {}
        for name in WEIGHT_TENSORS:
            setattr(self, name, getattr(weight, name))

    @property
    def workspaces(self) -> tuple[Tensor, ...]:
        """Return what the weight is dequantized into, by worker; see `share_workspaces`.

        They are no buffers, as all layers share them.
        """
        return self._workspaces

    @workspaces.setter
    def workspaces(
        self,
        workspaces: tuple[Tensor, ...],  # each (any,)
    ) -> None:
        self._weights, self._workspaces = {}, workspaces

    @property
    def nf4_weight(self) -> NF4Weight:
        """Return the weight in the form that the kernels take, for this thread; it shares this module's buffers."""
        packed, number = self.packed, worker_number()
        kept = self._weights.get(number)
        if kept is None or kept.packed is not packed:  # another one since `take`, or since the module was moved
            kept = self._weights[number] = NF4Weight(
                packed=packed,
                absmax=self.absmax,
                nested_absmax=self.nested_absmax,
                nested_code=self.nested_code,
                offset=self.offset,
                shape=(self.out_features, self.in_features),
                block_size=BLOCK_SIZE,
                nested_block_size=NESTED_BLOCK_SIZE,
                workspace=self.workspaces[number] if number < len(self.workspaces) else None,
            )
        return kept

    def forward(
        self,
        x: Tensor,  # (..., I)
    ) -> Tensor:  # (..., O), dtype of x
        """Multiply with the dequantized weight, and add the bias.

        Args:
            x: input, (..., I).

        Returns:
            Output, (..., O), in the dtype of `x`.
        """
        return nf4_linear(x, self.nf4_weight, self.bias)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise _NoWeightError(
                f"This model's own code reads the weight of a linear layer ({self.out_features} x {self.in_features}) "
                "rather than calls the layer, and in 4 bits (NF4Linear) there is none to read. Choose a base of "
                "another architecture."
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """Describe the layer, as `print(model)` shows it.

        Returns:
            Its sizes.
        """
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _NoWeightError(ModelError, AttributeError):
    """Make hasattr(layer, "weight") False, and end a forward that needs the weight with an error message."""


def share_workspaces(model: nn.Module, dtype: torch.dtype, most_elements: int | None = None, workers: int = 1) -> None:
    """Give a model's 4-bit layers one buffer for each worker to dequantize into, and drop any they had.

    Args:
        model: any.
        dtype: of computation.
        most_elements: limit of a buffer, never below one row; larger weights are dequantized in parts; by
            default none, and it holds the largest weight.
        workers: threads that run the model at once.
    """
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    for layer in layers:
        layer.workspaces = ()  # free the old ones before the new ones are made
    largest = max((layer.out_features * layer.in_features for layer in layers), default=0)
    widest_row = max((layer.in_features for layer in layers), default=0)
    elements = largest if most_elements is None else min(largest, max(most_elements, widest_row))
    device = layers[0].packed.device if layers else None
    workspaces = tuple(torch.empty(elements, dtype=dtype, device=device) for _ in range(workers))
    for layer in layers:
        layer.workspaces = workspaces


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Find the layers that become 4-bit: every linear one except the LM head and any that share a weight.

    Layers that the model's class asks to keep in fp32 are left out too.

    Args:
        model: of transformers or not.

    Returns:
        Path -> layer.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    users = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    tied = tied_weight_names(model)
    tied_names = {*tied.keys(), *tied.values()}
    in_fp32 = modules_kept_in_fp32(model)
    return {
        path: layer
        for path, layer in model.named_modules()
        if type(layer).__name__ in {*_LINEAR, _CONV1D}
        and layer is not head
        and users[id(layer.weight)] == 1
        and f"{path}.weight" not in tied_names
        and not any(f".{name}." in f".{path}." for name in in_fp32)
    }


def is_transposed(layer: nn.Module) -> bool:
    """Return True if a linear layer stores its weight as (I, O), as GPT-2's does.

    Args:
        layer: any.

    Returns:
        True for a Conv1D.
    """
    return type(layer).__name__ == _CONV1D


def empty_nf4(model: nn.Module, paths: Collection[str] | None = None, device: str = "cpu") -> None:
    """Turn linear layers of a model into NF4Linears whose buffers are uninitialized.

    The model then has the shapes of a quantized one: to be filled, or for planning, where tensors are fake.

    Args:
        model: changed in place.
        paths: of the layers; by default all that `linear_layers` finds.
        device: of the buffers; biases stay where they are.
    """
    for path, layer in linear_layers(model).items():
        if paths is None or path in paths:
            shape: Any = layer.weight.shape
            out_features, in_features = reversed(shape) if is_transposed(layer) else shape
            weight = empty_weight(out_features, in_features, device)
            bias: Any = layer.bias
            model.set_submodule(path, NF4Linear(weight, bias, fan_in_fan_out=is_transposed(layer)))


def quantized_fraction(model: nn.Module) -> tuple[float, list[str]]:
    """Compute the share of the linear weights, the LM head left out, that is 4-bit.

    Fused expert weights, 3-D parameters without a module of their own, count as linear weights.

    Args:
        model: any.

    Returns:
        The share from 0 to 1, and the names of the other weights, largest first.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    four_bit, other = 0, {}
    for path, module in model.named_modules():
        if isinstance(module, NF4Linear):
            four_bit += module.out_features * module.in_features
        elif module is not head and not isinstance(module, nn.Embedding):
            is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 or (is_linear and parameter.ndim == 2):
                    other[f"{path}.{name}"] = parameter.numel()
    total = four_bit + sum(other.values())
    return (four_bit / total if total else 0.0), sorted(other, key=lambda name: -other[name])


def check_quantized_fraction(model: nn.Module, minimum: float) -> float:
    """Refuse a model of which too little is 4-bit.

    Args:
        model: after quantization.
        minimum: the least share, from 0 to 1.

    Returns:
        The share.

    Raises:
        ModelError: it is less than `minimum`.
    """
    share, others = quantized_fraction(model)
    if share < minimum:
        raise ModelError(
            f"Only {share:.1%} of this model's linear weights become 4-bit; "
            f"{counted(len(others), 'tensor stays', 'tensors stay')} 16-bit, such "
            f"as {', '.join(others[:3])}. The model would take far more memory than a 4-bit base. To train it all the "
            f"same, set model.min_quantized_fraction={max(share - 0.005, 0.0):.2f}."
        )
    return share


def is_linear(module: nn.Module) -> bool:
    """Return True for a linear layer: 4-bit, plain, or GPT-2's Conv1D, which stores its weight (I, O).

    Args:
        module: any.

    Returns:
        True if it is linear.
    """
    return isinstance(module, NF4Linear | nn.Linear) or type(module).__name__ == "Conv1D"


def adopt_linear4bit(model: nn.Module) -> int:
    """Turn every bitsandbytes Linear4bit into an NF4Linear that takes over its bytes.

    QuantizationError is raised if a layer is not NF4 with block size 64, double quantization and uint8 storage.

    Args:
        model: changed in place.

    Returns:
        The number of layers.
    """
    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, load_bitsandbytes().nn.Linear4bit)]
    for path, layer in layers:
        weight = weight_from_bitsandbytes(layer.weight.data, layer.weight.quant_state, path)
        bias = None if layer.bias is None else layer.bias.data
        source_class = getattr(layer, "source_cls", nn.Linear)
        model.set_submodule(path, NF4Linear(weight, bias, fan_in_fan_out=source_class.__name__ == "Conv1D"))
    return len(layers)
