"""List the tensors that a model directory holds: safetensors, or a GGUF file that it represents.

A checkpoint is data from strangers. Only safetensors and JSON are read, never pickle; an index may only name files of
its own directory; what a loader would guess at (two sets of weights side by side) is refused here.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_trainer.common.errors import FileMissingError, MergeError, ModelError
from qlora_trainer.weights.gguf.reader import open_weights

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 100 * 2**20

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor before it has values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class TensorInfo(TensorSpec):
    """A tensor on disk; in another file than one of safetensors, `read` gives its rows."""

    file: Path
    offset: int | None = None  # of its first byte in a file of safetensors
    read: Callable[[slice | None], Tensor] | None = dataclasses.field(default=None, compare=False)


def checkpoint_tensors(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor that transformers would load from `directory`, by name, in the order they lie on disk.

    A directory may represent a GGUF file (weights/gguf/importer.py), whose tensors are read from there.

    Raises:
        FileMissingError: there is no such directory.
        ModelError: it holds no safetensors weights, an adapter, two sets of weights, an index that names a file
            outside or a file or tensor that is missing, or a damaged shard.
    """
    if not directory.is_dir():
        raise FileMissingError(f"There is no model directory {directory}.")
    if (directory / "adapter_config.json").exists():
        raise ModelError(
            f"{directory} holds adapter_config.json: it is an adapter, or a model that loaders would apply an adapter "
            "to a second time. Give the directory of the base model alone."
        )
    if (imported := open_weights(directory)) is not None:
        file, read = imported.file, imported.read
        return {
            name: TensorInfo(name, tensor.dtype, tensor.shape, file, read=functools.partial(read, name))
            for name, tensor in imported.tensors.items()
        }
    tensors: dict[str, TensorInfo] = {}
    index = _read_index(directory)
    for file_name in dict.fromkeys(index.values()) if index else [WEIGHTS_NAME]:
        for info in tensors_of_file(file_inside(directory, file_name)):
            if info.name in tensors:
                raise ModelError(
                    f"{directory}: tensor {info.name} is both in {tensors[info.name].file.name} and in {file_name}; "
                    "which one counts is left to chance. Fetch the model again."
                )
            tensors[info.name] = info
    for name, file_name in (index or {}).items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise ModelError(
                f"{directory}: the index says that {file_name} holds tensor {name}, but it does not. The checkpoint "
                "is incomplete: fetch it again."
            )
    return tensors


def checkpoint_name(parameter: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """A parameter's name in the checkpoint: the same, or without the model's prefix where the body was saved alone."""
    return next((name for name in (parameter, parameter.partition(".")[2]) if name in tensors), None)


def weight_statistics(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """What bitsandbytes stores next to each prequantized weight, by the weight's name and the key after it."""
    found: dict[str, dict[str, TensorInfo]] = {name: {} for name in tensors if f"{name}.absmax" in tensors}
    for name, info in tensors.items():
        layer, dot, key = name.rpartition(".weight.")
        if dot and f"{layer}.weight" in found:
            found[f"{layer}.weight"][key] = info
    return found


def file_inside(directory: Path, name: str) -> Path:
    """The path of a file of `directory`; a link may lead elsewhere inside it, or to the hub cache's own blobs.

    Raises:
        ModelError: `name` is not a plain file name, or the file is missing or leads outside.
    """
    if Path(name).name != name or "\\" in name or name in {"", ".", ".."}:
        raise ModelError(f"{directory} names a file outside of itself, {name!r}. That is not read; mend the index.")
    path = directory / name
    if not path.is_file():
        raise ModelError(f"{directory} should hold {name}, but the file is missing. Fetch the model again.")
    real, home = path.resolve(), directory.resolve()
    # The hub cache: models--owner--name/snapshots/<commit>/file links to models--owner--name/blobs/<hash>.
    in_hub_cache = real.parent.name == "blobs" and home.is_relative_to(real.parent.parent / "snapshots")
    if not real.is_relative_to(home) and not in_hub_cache:
        raise ModelError(f"{path} is a link that leads outside its directory, to {real}. Copy the file there instead.")
    return path


def _read_index(directory: Path) -> dict[str, str] | None:
    """Tensor name -> file name; None for a checkpoint of one file."""
    index_path, single = directory / INDEX_NAME, directory / WEIGHTS_NAME
    if not index_path.exists():
        if single.exists():
            return None
        pickled = sorted(path.name for suffix in ("*.bin", "*.pt", "*.pth") for path in directory.glob(suffix))
        if pickled:
            raise ModelError(
                f"{directory} holds its weights as {pickled[0]}, a pickle, which can run code when opened and is not "
                "read here. If you trust it, convert it once with transformers: AutoModelForCausalLM.from_pretrained("
                "directory).save_pretrained(new_directory), and copy the tokenizer's files next to it."
            )
        raise ModelError(f"{directory} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}: it is no safetensors model.")
    weight_map = _read_json(file_inside(directory, INDEX_NAME)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelError(f"{index_path} has no weight_map of tensor names and file names. Fetch the model again.")
    if single.exists() and set(weight_map.values()) != {WEIGHTS_NAME}:
        raise ModelError(
            f"{directory} holds both {WEIGHTS_NAME} and {INDEX_NAME}. transformers reads the former and ignores the "
            "index without a word; one of them is stale. Move the stale one away."
        )
    if bad := [file for file in weight_map.values() if not file.endswith(".safetensors")]:
        raise ModelError(f"{index_path} names {bad[0]!r}, which is no safetensors file; others are not read.")
    return weight_map


def _read_json(path: Path) -> dict[str, object]:
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise ModelError(f"{path} has {path.stat().st_size} bytes, more than the {MAX_INDEX_BYTES} that are read.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}. Fetch the model again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} should hold a JSON object, but holds a {type(content).__name__}.")
    return content


def tensors_of_file(path: Path) -> list[TensorInfo]:
    """Of a file of safetensors, in the order they lie there.

    Raises:
        ModelError: the file is damaged, or holds a dtype that is not known here.
    """
    tensors = []
    try:
        with safe_open(path, framework="pt") as file, path.open("rb") as header:
            end = 8 + int.from_bytes(header.read(8), "little")  # of the header; the tensors follow without a gap
            for name in file.offset_keys():
                tensor = file.get_slice(name)
                dtype, shape = tensor.get_dtype(), tuple(tensor.get_shape())
                if dtype not in _DTYPES:
                    raise ModelError(f"{path}: tensor {name} has dtype {dtype}, which this trainer does not know.")
                tensors.append(TensorInfo(name, _DTYPES[dtype], shape, path, end))
                end += tensors[-1].nbytes
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or cut short ({error}). Fetch the file again.") from error
    return tensors


def read_config_json(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MergeError(f"{directory / 'config.json'} cannot be read: {error}") from error
    if not isinstance(config, dict) or "transformers_weights" in config:
        raise MergeError(
            f"{directory / 'config.json'} is of a kind that cannot be merged: it names its own weight file."
        )
    return config
