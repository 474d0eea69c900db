"""The frozen 4-bit base: its layers, how they are made, and which of a model's layers they are.

A base Linear becomes an NF4Linear: packed 4-bit codes with double-quantized block maxima, held as plain buffers, so
that nothing can cast them, move them halfway or hand them to an optimizer. qlora_kernels quantizes (QLoRA, Dettmers et
al. 2023), on every device to the codes that bitsandbytes gives on a CPU. Weights that were quantized elsewhere come
through weights/bitsandbytes_format.py.

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
from qlora_trainer.common.errors import ModelError
from qlora_trainer.common.transformers_internals import modules_kept_in_fp32, tied_weight_names
from qlora_trainer.weights.bitsandbytes_format import _from_bitsandbytes
from qlora_trainer.weights.nf4 import WEIGHT_TENSORS, bitsandbytes, empty_weight

# Layers that multiply by a matrix and add a bias, by the name of their class; others derived from them may do more.
_LINEAR, _CONV1D = {"Linear", "FalconLinear"}, "Conv1D"  # GPT-2's Conv1D stores (I, O)


class NF4Linear(nn.Module):
    """A frozen linear layer in NF4: y = x W^T + b, with W (O, I) dequantized where it is used."""

    packed: Tensor  # and the others as in NF4Weight
    absmax: Tensor
    nested_absmax: Tensor
    nested_code: Tensor
    offset: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: NF4Weight,
        bias: Tensor | None,  # (O,)
        fan_in_fan_out: bool = False,  # the checkpoint stores (I, O), as GPT-2's Conv1D does
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.fan_in_fan_out = fan_in_fan_out
        for name in WEIGHT_TENSORS:
            self.register_buffer(name, getattr(weight, name), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.workspace: Tensor | None = None  # see `share_workspace`; no buffer, as it is not this layer's alone

    def take(self, weight: NF4Weight) -> None:
        """Hold this weight from now on, of the same shape."""
        assert weight.shape == (self.out_features, self.in_features)
        for name in WEIGHT_TENSORS:
            setattr(self, name, getattr(weight, name))

    @property
    def nf4_weight(self) -> NF4Weight:
        """The weight as the kernels take it; shares memory with this module's buffers."""
        return NF4Weight(
            packed=self.packed,
            absmax=self.absmax,
            nested_absmax=self.nested_absmax,
            nested_code=self.nested_code,
            offset=self.offset,
            shape=(self.out_features, self.in_features),
            block_size=BLOCK_SIZE,
            nested_block_size=NESTED_BLOCK_SIZE,
            workspace=self.workspace,
        )

    def forward(
        self,
        x: Tensor,  # (..., I)
    ) -> Tensor:  # (..., O), dtype of x
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
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _NoWeightError(ModelError, AttributeError):
    """So that hasattr answers, and a forward that needs the weight ends with an error message."""


def share_workspace(model: nn.Module, dtype: torch.dtype, most_elements: int | None = None) -> None:
    """Give the 4-bit layers of a model one buffer to dequantize into, in the place of any they had.

    Args:
        most_elements: make it so small at most, and take larger weights in parts; by default it holds the largest.
    """
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    for layer in layers:
        layer.workspace = None  # an old one goes before the new one comes
    largest = max((layer.out_features * layer.in_features for layer in layers), default=0)
    widest_row = max((layer.in_features for layer in layers), default=0)
    elements = largest if most_elements is None else min(largest, max(most_elements, widest_row))
    workspace = torch.empty(elements, dtype=dtype, device=layers[0].packed.device if layers else None)
    for layer in layers:
        layer.workspace = workspace


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that become 4-bit, by path: every linear one but the LM head and what shares its weight.

    What the model's class asks to keep in fp32 is left out too.
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
    """Whether a linear layer stores its weight as (I, O), as GPT-2's does."""
    return type(layer).__name__ == _CONV1D


def empty_nf4(model: nn.Module, paths: Collection[str] | None = None, device: str = "cpu") -> None:
    """Turn linear layers of `model` into NF4Linears whose buffers are uninitialized.

    It then has the shapes of a quantized model: to be filled, or for planning, where tensors are fake.

    Args:
        paths: turn these; by default all that `linear_layers` says.
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
    """Share of the linear weights, the output embedding left out, that is 4-bit; and what is not, largest first.

    Fused expert weights, 3-D parameters without a module of their own, count as linear weights.
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
    """Return the 4-bit share; ModelError if it is below `minimum`."""
    share, others = quantized_fraction(model)
    if share < minimum:
        raise ModelError(
            f"Only {share:.1%} of this model's linear weights become 4-bit; {len(others)} tensor(s) stay 16-bit, such "
            f"as {', '.join(others[:3])}. The model would take far more memory than a 4-bit base. To train it all the "
            f"same, set model.min_quantized_fraction={max(share - 0.005, 0.0):.2f}."
        )
    return share


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: 4-bit, plain, or GPT-2's Conv1D, which stores its weight (I, O)."""
    return isinstance(module, NF4Linear | nn.Linear) or type(module).__name__ == "Conv1D"


def adopt_linear4bit(model: nn.Module) -> int:
    """Turn every bitsandbytes Linear4bit of `model` into an NF4Linear that takes over its bytes; returns how many.

    Raises:
        QuantizationError: a layer is quantized otherwise than NF4, block size 64, double quantization, uint8 storage.
    """
    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    for path, layer in layers:
        weight = _from_bitsandbytes(layer.weight.data, layer.weight.quant_state, path)
        bias = None if layer.bias is None else layer.bias.data
        source_class = getattr(layer, "source_cls", nn.Linear)
        model.set_submodule(path, NF4Linear(weight, bias, fan_in_fan_out=source_class.__name__ == "Conv1D"))
    return len(layers)
