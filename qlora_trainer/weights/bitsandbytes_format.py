"""Read, write and check weights in the form that bitsandbytes holds and stores.

The tables of a weight that was quantized elsewhere must have the shapes and dtypes of our own, since compiled kernels
rely on these alone. Dequantization is qlora_kernels' own, checked against its definition at start-up, because
bitsandbytes' module forwards rewrite biases and, on some CPUs, repack the weights they were given.

Legend: O out features, I in features.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_kernels.nf4 import NF4Weight, dequantize_nf4
from qlora_kernels.nf4_reference import BLOCK_SIZE, NESTED_BLOCK_SIZE, NF4_CODE
from qlora_trainer.common.command_line import please_report
from qlora_trainer.common.errors import QuantizationError
from qlora_trainer.common.units import dtype_name
from qlora_trainer.weights.nf4 import WEIGHT_TENSORS, all_finite, empty_weight, load_bitsandbytes

_STATE_KEY = "quant_state.bitsandbytes__nf4"
_STATE_BYTES = 256
_DAMAGED = "The checkpoint is damaged: fetch it again, or use the model's 16-bit checkpoint."
_SOURCE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def weight_from_checkpoint(
    packed: Tensor,  # (O*I/2, 1) uint8, the checkpoint's "<name>.weight"
    stats: Mapping[str, Tensor],  # the checkpoint's "<name>.weight.<key>" by key
    name: str,
) -> NF4Weight:
    """Rebuild a weight from a prequantized bitsandbytes checkpoint's tensors.

    QuantizationError is raised if it is not NF4 with block size 64, double quantization and uint8 storage, or a table
    is missing or damaged.

    Args:
        packed: two codes a byte.
        stats: the weight's tables.
        name: of the weight, for error messages.

    Returns:
        The weight, in the memory of these tensors.
    """
    facts = _facts(stats, name)
    _refuse_otherwise(facts.get("quant_type"), facts.get("blocksize"), facts.get("nested_blocksize"), packed, name)
    offset = facts.get("nested_offset")
    absent = packed.new_empty(0)  # its shape is refused
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
    source_dtype: torch.dtype,  # what it was quantized from; bitsandbytes dequantizes to it
) -> dict[str, Tensor]:
    """List the tensors that bitsandbytes stores of a weight.

    Shapes and dtypes depend on the weight's shape alone, so a file can be laid out before anything is quantized.

    Args:
        weight: with tensors, or on meta for a layout.
        source_dtype: the dtype it was quantized from.

    Returns:
        Key -> tensor: "" for the packed codes, and for the others what follows the weight's name and a dot.
    """
    facts = {
        "quant_type": "nf4",
        "blocksize": BLOCK_SIZE,
        "dtype": dtype_name(source_dtype),
        "shape": list(weight.shape),
        "nested_blocksize": NESTED_BLOCK_SIZE,
        "nested_dtype": "float32",
        "nested_offset": float(weight.offset) if weight.offset.device.type != "meta" else 0.0,
    }
    state = json.dumps(facts).encode().ljust(_STATE_BYTES)  # the same length for every offset; JSON may end in spaces
    return {
        "": weight.packed[:, None],
        "absmax": weight.absmax,
        "quant_map": NF4_CODE,
        "nested_absmax": weight.nested_absmax,
        "nested_quant_map": weight.nested_code,
        _STATE_KEY: torch.frombuffer(bytearray(state), dtype=torch.uint8),
    }


def source_dtype_of(statistics: Mapping[str, Tensor], name: str) -> torch.dtype:
    """Return the dtype that a prequantized weight was quantized from.

    QuantizationError is raised if it is no NF4 weight, or its JSON cannot be read.

    Args:
        statistics: the weight's tables, by key.
        name: of the weight, for error messages.

    Returns:
        float32, bfloat16 or float16.
    """
    return _SOURCE_DTYPES[_facts(statistics, name)["dtype"]]


def _facts(statistics: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """Read the JSON that bitsandbytes stores for a weight; only its source dtype is checked here."""
    try:
        facts: dict[str, Any] = json.loads(bytes(statistics[_STATE_KEY].tolist()))
        _SOURCE_DTYPES[facts["dtype"]]
        return facts
    except (LookupError, ValueError, TypeError, RecursionError) as error:
        stored = ", ".join(sorted(statistics)) or "nothing"
        raise QuantizationError(
            f"{name} is quantized otherwise than this trainer keeps its base, or its quantization keys cannot be read "
            f"(stored with it: {stored}). Use the model's 16-bit checkpoint, which is quantized while loading."
        ) from error


def weight_from_bitsandbytes(
    packed: Tensor,  # (O*I/2, 1) uint8
    state: Any,
    name: str,
) -> NF4Weight:
    """Take over a weight that bitsandbytes holds in memory.

    QuantizationError is raised if it is not NF4 with block size 64, double quantization and uint8 storage.

    Args:
        packed: two codes a byte, (O*I/2, 1), uint8.
        state: bitsandbytes' QuantState of shape (O, I), with absmax (blocks,) uint8 and, nested, the tables of absmax.
        name: of the weight, for error messages.

    Returns:
        The weight, (O, I), in the memory of these tensors.
    """
    nested: Any = getattr(state, "state2", None)
    _refuse_otherwise(state.quant_type, state.blocksize, nested and nested.blocksize, packed, name)
    offset, shape = state.offset.reshape(()), tuple(state.shape)
    weight = NF4Weight(packed.reshape(-1), state.absmax, nested.absmax, nested.code, offset, shape)
    return _checked(weight, state.code, name)


def _refuse_otherwise(kind: Any, block_size: Any, nested_block_size: Any, packed: Tensor, name: str) -> None:
    """Raise QuantizationError unless it is NF4 with block size 64, double quantization and uint8 storage."""
    found = {
        "type": kind,
        "block size": block_size,
        "double quantization": nested_block_size is not None,
        "nested block size": nested_block_size or NESTED_BLOCK_SIZE,
        "storage": dtype_name(packed.dtype),
    }
    wanted = {
        "type": "nf4",
        "block size": BLOCK_SIZE,
        "double quantization": True,
        "nested block size": NESTED_BLOCK_SIZE,
        "storage": "uint8",
    }
    if found != wanted:
        differences = ", ".join(
            f"{key} {found[key]} (needed: {wanted[key]})" for key in wanted if found[key] != wanted[key]
        )
        raise QuantizationError(
            f"{name} is quantized otherwise than this trainer keeps its base: {differences}. Use the model's 16-bit "
            "checkpoint, which is quantized while loading, or one prequantized to NF4 with double quantization."
        )


def _checked(weight: NF4Weight, code: Tensor, name: str) -> NF4Weight:
    """Return the weight if its tables fit its shape and `code` holds the sixteen values of NF4.

    Raises:
        QuantizationError: a table has another shape or dtype, or an impossible value.
    """
    shape: Any = weight.shape  # as the checkpoint has it, unchecked
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
                f"{name}: {table} is {_shape_and_dtype(found)}, and in a weight of {shape[0]} x {shape[1]} "
                f"it is {_shape_and_dtype(wanted)}. {_DAMAGED}"
            )
    if code.dtype != NF4_CODE.dtype or not torch.equal(code, NF4_CODE.to(code.device)):
        raise QuantizationError(f"{name}: quant_map, the values of its codes, is not that of NF4. {_DAMAGED}")
    if not all_finite(weight.offset, weight.nested_absmax, weight.nested_code):
        raise QuantizationError(f"{name} was quantized from values that are not finite. {_DAMAGED}")
    return weight


def _shape_and_dtype(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} of shape {tuple(tensor.shape)}"


def check_dequantization(device: torch.device) -> list[str]:
    """Compare dequantization on a device with its definition, bit for bit, on several shapes.

    bitsandbytes' own function, which training here does not use, is compared too: its CPU code is wrong on some
    processors for widths that are no multiple of the block size.

    Args:
        device: to check.

    Returns:
        A warning for each shape on which bitsandbytes' function differs.

    Raises:
        QuantizationError: ours differs, so that training would adapt another base than the merge writes.
    """
    generator = torch.Generator().manual_seed(0)
    warnings = []
    for shape in ((64, 64), (3, 80), (96, 192), (1, 576)):
        values = torch.randn(shape, generator=generator).to(device)
        packed, state = load_bitsandbytes().functional.quantize_4bit(
            values, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4"
        )
        weight = weight_from_bitsandbytes(packed, state, "a sample")
        expected = _dequantize_by_definition(weight)
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        if not all(torch.equal(dequantize_nf4(weight, dtype), expected.to(dtype)) for dtype in dtypes):
            raise QuantizationError(
                f"On {device} NF4 weights of shape {shape} are dequantized otherwise than they are defined. Set "
                f"QLORA_KERNELS=reference to use the plain implementation. {please_report()}"
            )
        if not torch.equal(load_bitsandbytes().functional.dequantize_4bit(packed, state), expected):
            warnings.append(
                f"bitsandbytes dequantizes NF4 of shape {shape} wrongly on {device}; it is not used for that."
            )
    return warnings


def _dequantize_by_definition(weight: NF4Weight) -> Tensor:  # (O, I) fp32
    """Compute NF4_CODE[code] * (nested_code[absmax] * nested_absmax + offset), element by element.

    The formula is double dequantization (QLoRA, Dettmers et al. 2023, section 3), with bitsandbytes' offset.
    """
    codes = torch.stack([weight.packed >> 4, weight.packed & 15], dim=1).reshape(-1).long()
    element = torch.arange(weight.shape[0] * weight.shape[1], device=codes.device)
    block = element // weight.block_size
    scale = weight.nested_code[weight.absmax.long()[block]] * weight.nested_absmax[block // weight.nested_block_size]
    values = NF4_CODE.to(codes.device)[codes[: element.numel()]] * (scale + weight.offset)
    return values.reshape(weight.shape)
