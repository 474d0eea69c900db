"""List the tensors that a model directory holds: safetensors, or a GGUF file that it represents.

A checkpoint may come from anyone. Only safetensors and JSON are read, never pickle; an index may only name files of
its own directory; what a loader would guess at (two sets of weights in one directory) is refused here. Start at
model_directory.py, which lists a directory once.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qlora_trainer.common.boundary import read_bounded_json
from qlora_trainer.common.errors import ModelError
from qlora_trainer.weights.gguf.reader import open_weights
from qlora_trainer.weights.tensors import TensorFile, TensorInfo

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_JSON_BYTES = 100 * 2**20


def list_tensors(
    directory: Path,
    model_config: Callable[[], Any],  # makes transformers' config of the directory, where GGUF tensors need it
) -> dict[str, TensorInfo]:
    """List every tensor that transformers would load from `directory`, in the order they lie on disk.

    A directory may represent a GGUF file (gguf/importer.py), whose tensors are read from there.

    Args:
        directory: of the model.
        model_config: called without arguments, and only for a GGUF file.

    Returns:
        The tensors by name.

    Raises:
        ModelError: it holds no safetensors weights, two sets of weights, an index that names a file outside or a file
            or tensor that is missing, or a damaged shard.
    """
    if (imported := open_weights(directory, model_config)) is not None:
        return {
            name: TensorInfo(name, tensor.dtype, tensor.shape, imported, offset=None)
            for name, tensor in imported.tensors.items()
        }
    tensors: dict[str, TensorInfo] = {}
    index = _read_index(directory)
    for file_name in dict.fromkeys(index.values()) if index else [WEIGHTS_NAME]:
        for info in TensorFile(file_inside(directory, file_name)).tensors.values():
            if info.name in tensors:
                raise ModelError(
                    f"{directory}: tensor {info.name} is both in {tensors[info.name].file.name} and in {file_name}; "
                    "it is undefined which one is loaded. Fetch the model again."
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
    """Return a parameter's name in the checkpoint: the same, or without the model's prefix.

    Args:
        parameter: its name in the model, such as "model.norm.weight".
        tensors: of the checkpoint, by name.

    Returns:
        The name; None if the checkpoint has no such tensor.
    """
    return next((name for name in (parameter, parameter.partition(".")[2]) if name in tensors), None)


def weight_statistics(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Group what bitsandbytes stores next to each prequantized weight.

    Args:
        tensors: of a checkpoint, by name.

    Returns:
        By the weight's name, the tensors called "<name>.<key>", by key, such as "absmax".
    """
    found: dict[str, dict[str, TensorInfo]] = {name: {} for name in tensors if f"{name}.absmax" in tensors}
    for name, info in tensors.items():
        layer, dot, key = name.rpartition(".weight.")
        if dot and f"{layer}.weight" in found:
            found[f"{layer}.weight"][key] = info
    return found


def file_inside(directory: Path, name: str) -> Path:
    """Return the path of a file of `directory`; a link may lead elsewhere inside it, or to the hub cache's own blobs.

    Args:
        directory: that the file must be in.
        name: of the file, without a folder.

    Returns:
        The path, links not resolved.

    Raises:
        ModelError: `name` is not a plain file name, or the file is missing or leads outside.
    """
    if Path(name).name != name or "\\" in name or name in {"", ".", ".."}:
        raise ModelError(
            f"{directory} names a file outside of itself, {name!r}. Only files in the model directory are read; fix "
            "the index."
        )
    path = directory / name
    if not path.is_file():
        raise ModelError(f"{directory} should hold {name}, but the file is missing. Fetch the model again.")
    real, home = path.resolve(), directory.resolve()
    # The hub cache: models--owner--name/snapshots/<commit>/file links to models--owner--name/blobs/<hash>.
    in_hub_cache = real.parent.name == "blobs" and home.is_relative_to(real.parent.parent / "snapshots")
    if not real.is_relative_to(home) and not in_hub_cache:
        raise ModelError(f"{path} is a link that leads outside its directory, to {real}. Copy the file there instead.")
    return path


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file of a checkpoint that holds an object.

    Args:
        path: the file.

    Returns:
        The object's keys and values.

    Raises:
        ModelError: it is missing, cannot be read, is larger than MAX_JSON_BYTES, or holds something else.
    """
    return read_bounded_json(path, dict, MAX_JSON_BYTES, ModelError, "Fetch the model again.")


def _read_index(directory: Path) -> dict[str, str] | None:
    """Return file names by tensor name; None for a checkpoint of one file."""
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
    weight_map = read_json_object(file_inside(directory, INDEX_NAME)).get("weight_map")
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
