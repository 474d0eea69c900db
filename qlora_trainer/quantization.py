"""The frozen 4-bit base: the only owner of bitsandbytes' weights.

A base Linear becomes an NF4Linear: packed 4-bit codes with double-quantised block maxima, held as plain buffers, so
that nothing can cast them, move them halfway or hand them to an optimizer. On CUDA bitsandbytes quantises (QLoRA,
Dettmers et al. 2023), on a CPU qlora_kernels, to the bits that bitsandbytes gives on a CPU; its CUDA code is compiled
with approximate division, and a value beside the middle of two codes may take the other one there. Dequantisation is
qlora_kernels' own, checked against its definition at start-up, because bitsandbytes' module forwards rewrite biases
and, on some CPUs, repack the weights they were given.

The tables of a weight that was quantised elsewhere are held to the shapes and dtypes of our own: compiled kernels read
them by these alone.

Legend: O out features, I in features.
"""

import dataclasses
import json
import logging
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kernels.lora_linear import nf4_linear
from qlora_kernels.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, NF4_CODE, NF4Weight, dequantize_nf4, quantize_nf4
from qlora_trainer.errors import ModelError, QuantizationError


def _import_bitsandbytes() -> Any:
    """Import bitsandbytes without its attempt to download CPU kernels through the package `kernels`, if installed."""
    missing = object()
    previous = sys.modules.get("kernels", missing)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # makes `import kernels` raise ImportError
    try:
        import bitsandbytes
    finally:
        if previous is missing:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = previous  # type: ignore[assignment]
    return bitsandbytes


bitsandbytes = _import_bitsandbytes()

_STATE_KEY = "quant_state.bitsandbytes__nf4"
_STATE_BYTES = 256
_DAMAGED = "The checkpoint is damaged: fetch it again, or use the model's 16-bit checkpoint."
_SOURCE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHT_TENSORS = ("packed", "absmax", "nested_absmax", "nested_code", "offset")  # of an NF4Weight

# Layers that multiply by a matrix and add a bias, by the name of their class; others derived from them may do more.
_LINEAR, _CONV1D = {"Linear", "FalconLinear"}, "Conv1D"  # GPT-2's Conv1D stores (I, O)


class NF4Linear(nn.Module):
    """A frozen linear layer in NF4: y = x W^T + b, with W (O, I) dequantised where it is used."""

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
    """So that hasattr answers, and a forward that needs the weight ends with a letter."""


def share_workspace(model: nn.Module, dtype: torch.dtype, most_elements: int | None = None) -> None:
    """Give the 4-bit layers of a model one buffer to dequantise into, in the place of any they had.

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


def quantize_weight(
    weight: Tensor,  # (O, I), any float dtype
    name: str = "the weight",
) -> NF4Weight:
    """Quantise to NF4 with block size 64 and double-quantised block maxima, on the weight's device.

    On a CPU by our own code, elsewhere by bitsandbytes'.

    Raises:
        QuantizationError: a value is not finite; one of them would turn the whole tensor into NaN.
    """
    if weight.device.type == "cpu":
        quantized = quantize_nf4(weight)
        is_sound = bool(torch.isfinite(quantized.offset))  # the mean of all block maxima, so it shows such a value
    else:
        packed, state = bitsandbytes.functional.quantize_4bit(
            weight.contiguous(), blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4"
        )
        nested = state.state2
        tables = (packed.reshape(-1), state.absmax, nested.absmax, nested.code, state.offset.reshape(()))
        quantized = NF4Weight(*tables, shape=(weight.shape[0], weight.shape[1]))
        is_sound = all_finite(weight, quantized.offset)  # bitsandbytes' CUDA code passes over NaN
    if not is_sound:
        bad = int((~torch.isfinite(weight)).sum())
        told = f"{bad} value(s) that are not finite" if bad else "values so large that their scales overflow"
        raise QuantizationError(
            f"{name} holds {told}, and cannot be quantised. The checkpoint is damaged: fetch it again, or choose "
            "another base."
        )
    return quantized


def all_finite(*tensors: Tensor) -> bool:
    """Whether no value is infinite or NaN; tensors that are not of floats have none."""
    # One pass without another tensor: a NaN anywhere is both the least and the greatest value.
    floats = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return all(torch.isfinite(extreme) for tensor in floats for extreme in torch.aminmax(tensor))


def adopt_linear4bit(model: nn.Module) -> int:
    """Turn every bitsandbytes Linear4bit of `model` into an NF4Linear that takes over its bytes; returns how many.

    Raises:
        QuantizationError: a layer is quantised otherwise than NF4, block size 64, double quantisation, uint8 storage.
    """
    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    for path, layer in layers:
        weight = _from_bitsandbytes(layer.weight.data, layer.weight.quant_state, path)
        bias = None if layer.bias is None else layer.bias.data
        source_class = getattr(layer, "source_cls", nn.Linear)
        model.set_submodule(path, NF4Linear(weight, bias, fan_in_fan_out=source_class.__name__ == "Conv1D"))
    return len(layers)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that become 4-bit, by path: every linear one but the output head and what shares its weight.

    What the model's class asks to keep in fp32 is left out too.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    users = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    tied = getattr(model, "all_tied_weights_keys", {})
    tied_names = {*tied.keys(), *tied.values()}
    in_fp32 = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
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
    """Turn linear layers of `model` into NF4Linears whose buffers are uninitialised.

    It then has the shapes of a quantised model: to be filled, or for planning, where tensors are fake.

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


def empty_weight(out_features: int, in_features: int, device: str = "cpu") -> NF4Weight:
    """The tensors of a quantised (O, I) weight, uninitialised."""
    elements = out_features * in_features
    blocks = -(-elements // BLOCK_SIZE)
    return NF4Weight(
        packed=torch.empty(-(-elements // 2), dtype=torch.uint8, device=device),
        absmax=torch.empty(blocks, dtype=torch.uint8, device=device),
        nested_absmax=torch.empty(-(-blocks // NESTED_BLOCK_SIZE), dtype=torch.float32, device=device),
        nested_code=torch.empty(256, dtype=torch.float32, device=device),
        offset=torch.empty((), dtype=torch.float32, device=device),
        shape=(out_features, in_features),
        block_size=BLOCK_SIZE,
        nested_block_size=NESTED_BLOCK_SIZE,
    )


def weight_from_checkpoint(
    packed: Tensor,  # (O*I/2, 1) uint8, the checkpoint's "<name>.weight"
    stats: Mapping[str, Tensor],  # the checkpoint's "<name>.weight.<key>" by key
    name: str,
) -> NF4Weight:
    """Rebuild a weight from a prequantised bitsandbytes checkpoint's tensors.

    Raises:
        QuantizationError: it is quantised otherwise than NF4, block size 64, double quantisation, uint8 storage; or a
            table is missing or damaged.
    """
    facts = _facts(stats, name)
    _refuse_otherwise(facts.get("quant_type"), facts.get("blocksize"), facts.get("nested_blocksize"), packed, name)
    offset = facts.get("nested_offset")
    absent = packed.new_empty(0)  # is refused by its shape
    return _checked(
        NF4Weight(
            packed=packed.reshape(-1),
            absmax=stats.get("absmax", absent),
            nested_absmax=stats.get("nested_absmax", absent),
            nested_code=stats.get("nested_quant_map", absent),
            offset=torch.tensor(
                offset if type(offset) is float else torch.nan, dtype=torch.float32, device=packed.device
            ),
            shape=facts.get("shape", ()),
        ),
        stats.get("quant_map", absent),
        name,
    )


def weight_to_checkpoint(
    weight: NF4Weight,
    source_dtype: torch.dtype,  # what it was quantised from; bitsandbytes dequantises to it
) -> dict[str, Tensor]:
    """What bitsandbytes stores of a weight: "" is the packed codes, the other keys follow the weight's name and a dot.

    Shapes and dtypes depend on the weight's shape alone, so a file can be laid out before anything is quantised.
    """
    facts = {
        "quant_type": "nf4",
        "blocksize": BLOCK_SIZE,
        "dtype": str(source_dtype).removeprefix("torch."),
        "shape": list(weight.shape),
        "nested_blocksize": NESTED_BLOCK_SIZE,
        "nested_dtype": "float32",
        "nested_offset": float(weight.offset) if weight.offset.device.type != "meta" else 0.0,
    }
    state = json.dumps(facts).encode().ljust(_STATE_BYTES)  # as long for every offset; JSON may end in spaces
    return {
        "": weight.packed[:, None],
        "absmax": weight.absmax,
        "quant_map": NF4_CODE,
        "nested_absmax": weight.nested_absmax,
        "nested_quant_map": weight.nested_code,
        _STATE_KEY: torch.frombuffer(bytearray(state), dtype=torch.uint8),
    }


def source_dtype_of(statistics: Mapping[str, Tensor], name: str) -> torch.dtype:
    """The dtype that a prequantised weight was quantised from, by what is stored beside it.

    Raises:
        QuantizationError: it is no NF4 weight, or its keys cannot be read.
    """
    return _SOURCE_DTYPES[_facts(statistics, name)["dtype"]]


def _facts(statistics: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """What bitsandbytes says of a weight in JSON, of which nothing is sure but that it names a source dtype."""
    try:
        facts: dict[str, Any] = json.loads(bytes(statistics[_STATE_KEY].tolist()))
        _SOURCE_DTYPES[facts["dtype"]]
        return facts
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        stored = ", ".join(sorted(statistics)) or "nothing"
        raise QuantizationError(
            f"{name} is quantised otherwise than this trainer keeps its base, or its quantisation keys cannot be read "
            f"(beside it are {stored}). Use the model's 16-bit checkpoint, which is quantised while loading."
        ) from error


def _from_bitsandbytes(packed: Tensor, state: Any, name: str) -> NF4Weight:
    nested: Any = getattr(state, "state2", None)
    _refuse_otherwise(state.quant_type, state.blocksize, nested and nested.blocksize, packed, name)
    offset, shape = state.offset.reshape(()), tuple(state.shape)
    weight = NF4Weight(packed.reshape(-1), state.absmax, nested.absmax, nested.code, offset, shape)
    return _checked(weight, state.code, name)


def _refuse_otherwise(kind: Any, block_size: Any, nested_block_size: Any, packed: Tensor, name: str) -> None:
    """QuantizationError unless it is NF4, block size 64, double quantisation, uint8 storage."""
    found = {
        "type": kind,
        "block size": block_size,
        "double quantisation": nested_block_size is not None,
        "nested block size": nested_block_size or NESTED_BLOCK_SIZE,
        "storage": str(packed.dtype).removeprefix("torch."),
    }
    wanted = {
        "type": "nf4",
        "block size": BLOCK_SIZE,
        "double quantisation": True,
        "nested block size": NESTED_BLOCK_SIZE,
        "storage": "uint8",
    }
    if found != wanted:
        differences = ", ".join(
            f"{key} {found[key]} (needed: {wanted[key]})" for key in wanted if found[key] != wanted[key]
        )
        raise QuantizationError(
            f"{name} is quantised otherwise than this trainer keeps its base: {differences}. Use the model's 16-bit "
            "checkpoint, which is quantised while loading, or one prequantised to NF4 with double quantisation."
        )


def _checked(weight: NF4Weight, code: Tensor, name: str) -> NF4Weight:
    """The weight, if its tables are those of its shape; `code` are the sixteen values its codes stand for.

    Raises:
        QuantizationError: a table has another shape or dtype, or a value that cannot be.
    """
    shape: Any = weight.shape  # still what the checkpoint says
    if not (
        isinstance(shape, list | tuple)
        and len(shape) == 2
        and all(type(size) is int and 0 < size < 2**31 for size in shape)
    ):
        raise QuantizationError(f"{name} says that its shape is {shape!r}, which is no matrix's. {_DAMAGED}")
    weight = dataclasses.replace(weight, shape=tuple(shape))
    expected = empty_weight(*weight.shape, "meta")
    for table in WEIGHT_TENSORS:
        found, wanted = getattr(weight, table), getattr(expected, table)
        if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
            raise QuantizationError(
                f"{name}: {table} is {_told(found)}, and in a weight of {shape[0]} x {shape[1]} it is {_told(wanted)}. "
                f"{_DAMAGED}"
            )
    if code.dtype != NF4_CODE.dtype or not torch.equal(code, NF4_CODE.to(code.device)):
        raise QuantizationError(f"{name}: quant_map, the values of its codes, is not that of NF4. {_DAMAGED}")
    if not all_finite(weight.offset, weight.nested_absmax, weight.nested_code):
        raise QuantizationError(f"{name} was quantised from values that are not finite. {_DAMAGED}")
    return weight


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def check_dequantization(device: torch.device) -> list[str]:
    """Compare dequantisation on `device` with its definition, on even and awkward shapes, to the last bit.

    Returns one notice for each shape on which bitsandbytes' own function differs (its CPU code does for widths that
    are no multiple of the block size, on some processors); training here does not use that function.

    Raises:
        QuantizationError: ours differs, so that training would adapt to another base than the merge writes.
    """
    generator = torch.Generator().manual_seed(0)
    notices = []
    for shape in ((64, 64), (3, 80), (96, 192), (1, 576)):
        values = torch.randn(shape, generator=generator).to(device)
        packed, state = bitsandbytes.functional.quantize_4bit(
            values, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4"
        )
        weight = _from_bitsandbytes(packed, state, "a sample")
        expected = _dequantize_by_definition(weight)
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        if not all(torch.equal(dequantize_nf4(weight, dtype), expected.to(dtype)) for dtype in dtypes):
            raise QuantizationError(
                f"On {device} NF4 weights of shape {shape} are dequantised otherwise than they are defined. Set "
                "QLORA_KERNELS=reference to use the plain implementation, and please report this with the output of "
                "`qlora doctor`."
            )
        if not torch.equal(bitsandbytes.functional.dequantize_4bit(packed, state), expected):
            notices.append(
                f"bitsandbytes dequantises NF4 of shape {shape} wrongly on {device}; it is not used for that."
            )
    return notices


def _dequantize_by_definition(weight: NF4Weight) -> Tensor:  # (O, I) fp32
    """value = NF4_CODE[code] * (nested_code[absmax] * nested_absmax + offset), element by element."""
    codes = torch.stack([weight.packed >> 4, weight.packed & 15], dim=1).reshape(-1).long()
    element = torch.arange(weight.shape[0] * weight.shape[1], device=codes.device)
    block = element // weight.block_size
    scale = weight.nested_code[weight.absmax.long()[block]] * weight.nested_absmax[block // weight.nested_block_size]
    values = NF4_CODE.to(codes.device)[codes[: element.numel()]] * (scale + weight.offset)
    return values.reshape(weight.shape)


def four_bit_share(model: nn.Module) -> tuple[float, list[str]]:
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


def check_four_bit_share(model: nn.Module, minimum: float) -> float:
    """Return the 4-bit share; ModelError if it is below `minimum`."""
    share, others = four_bit_share(model)
    if share < minimum:
        raise ModelError(
            f"Only {share:.1%} of this model's linear weights become 4-bit; {len(others)} tensor(s) stay 16-bit, such "
            f"as {', '.join(others[:3])}. The model would take far more memory than a 4-bit base. To train it all the "
            f"same, set model.minimum_4bit_share={max(share - 0.005, 0.0):.2f}."
        )
    return share
