"""Read and write adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

An adapter from elsewhere is data from strangers, so reading is strict where other loaders are lenient. Safetensors and
JSON only, never pickle. Only lora_A, lora_B and (where the config says so) bias tensors are allowed: a file that also
holds `lm_head.weight` would silently overwrite the base in loaders that accept it. What would make the adapter another
function than s * B A added to the weight (DoRA, scalings that differ, modules saved whole, initializations that changed
the base) is refused by name instead of ignored. Layers may differ in rank where their alpha differs with it, so that
one s holds for all: layers of which some parts are adapted alone are stored so, next to others (fused_parts.py).

Legend: R rank, I in features, O out features.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qlora_trainer.adapters.formulas import lora_scaling
from qlora_trainer.adapters.peft_config import ADAPTER_CONFIG, AdapterFileConfig, read_config
from qlora_trainer.common.atomic import write_text
from qlora_trainer.common.errors import AdapterError, DiskError, FileMissingError
from qlora_trainer.common.units import counted
from qlora_trainer.config.schema import AdapterConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"
MAX_TENSORS = 100_000

_LORA = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<part>[AB])\.weight")
_BIAS = re.compile(r"base_model\.model\.(?P<path>.+)\.bias")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class StoredAdapter:
    """Hold an adapter as read from its files."""

    config: AdapterFileConfig
    tensors: dict[str, Tensor]  # PEFT's names; lora_A (R, I), lora_B (O, R), biases (O,); fp32 on the CPU

    @property
    def paths(self) -> list[str]:
        """List the paths of the adapted modules in the base model, in the order of the file.

        Returns:
            The paths.
        """
        return list(stored_ranks(self.tensors))


def write_adapter(directory: Path, tensors: Mapping[str, Tensor], config: AdapterFileConfig) -> None:
    """Write the adapter's two files into an existing directory.

    Lists of target modules are written sorted. The config comes last, so that a directory with a config has its
    weights. Tensors that do not fit the config, or hold values that are not finite, are refused by an AdapterError.

    Args:
        directory: to write to.
        tensors: with names and shapes as in StoredAdapter.
        config: of the adapter.

    Raises:
        DiskError: a write failed.
    """
    _check_tensors(tensors, config, origin="The adapter to be saved")
    content = config.model_dump()
    if content["lora_alpha"].is_integer():
        content["lora_alpha"] = int(content["lora_alpha"])  # as PEFT writes it; some readers insist
    content["alpha_pattern"] = {
        name: int(alpha) if alpha.is_integer() else alpha for name, alpha in content["alpha_pattern"].items()
    }
    if isinstance(content["target_modules"], list):
        content["target_modules"] = sorted(content["target_modules"])
    weights = directory / ADAPTER_WEIGHTS
    try:
        weights.touch()
        mode = weights.stat().st_mode & 0o777  # what the umask leaves; safetensors would make it 0600
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
        weights.chmod(mode)
        write_text(
            directory / ADAPTER_CONFIG, json.dumps(content, indent=2, sort_keys=True) + "\n"
        )  # last: it makes it whole
    except (OSError, SafetensorError) as error:
        raise DiskError(f"The adapter could not be written to {directory}: {error}. Free some space.") from error


def read_adapter(directory: Path) -> StoredAdapter:
    """Read an adapter in PEFT's format, ours or another's.

    Where there is no adapter, FileMissingError is raised; where it is of a kind not supported here, or not what an
    adapter should be, AdapterError.

    Args:
        directory: that has its files.

    Returns:
        The adapter.
    """
    _check_files(directory)
    config = read_config(directory / ADAPTER_CONFIG)
    tensors = _read_tensors(directory / ADAPTER_WEIGHTS, config)
    return StoredAdapter(config, {name: tensor.float() for name, tensor in tensors.items()})


def stored_ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return R of each adapted layer, by its path, from tensors named as PEFT names them.

    Args:
        tensors: of an adapter.

    Returns:
        Ranks by path.
    """
    return {
        match["path"]: len(tensor)
        for name, tensor in tensors.items()
        if (match := _LORA.fullmatch(name)) and match["part"] == "A"
    }


def setting_differences(found: AdapterFileConfig, wanted: AdapterConfig) -> dict[str, tuple[Any, Any]]:
    """Find settings that make an adapter's numbers another function.

    Args:
        found: the file's config.
        wanted: the run's section `adapter`.

    Returns:
        (the file's value, the config's) by config key.
    """
    # Parts of a fused layer that are adapted alone are stored as one adapter of their summed rank.
    ranks = {wanted.rank * count for count in {1, *map(len, wanted.fused_parts.values())}}
    pairs: dict[str, tuple[Any, Any]] = {
        "adapter.rank": (wanted.rank if found.r in ranks else found.r, wanted.rank),
        "adapter.bias": (found.bias, wanted.bias),
    }
    scaling = lora_scaling(found.r, found.lora_alpha, found.use_rslora)
    ours = lora_scaling(wanted.rank, wanted.alpha, wanted.use_rslora)
    if not math.isclose(scaling, ours, rel_tol=1e-12):  # one scaling can be written in two ways
        pairs["adapter.alpha"] = (found.lora_alpha, wanted.alpha)
        pairs["adapter.use_rslora"] = (found.use_rslora, wanted.use_rslora)
    return {key: values for key, values in pairs.items() if values[0] != values[1]}


def _check_files(directory: Path) -> None:
    if not (directory / ADAPTER_CONFIG).is_file():
        raise FileMissingError(
            f"{directory} is not an adapter: it has no {ADAPTER_CONFIG}. Give the directory of a PEFT adapter, such as "
            "a run's adapter/ or one of its checkpoints."
        )
    if not (directory / ADAPTER_WEIGHTS).is_file():
        if (directory / "adapter_model.bin").exists():
            raise AdapterError(
                f"{directory} has its weights in adapter_model.bin, a pickle, which can run code when it is read. Ask "
                "for the adapter as safetensors, or load it with PEFT where you trust it and save it again."
            )
        raise FileMissingError(f"{directory} has no {ADAPTER_WEIGHTS}; the adapter is incomplete.")


def _read_tensors(path: Path, config: AdapterFileConfig) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) > MAX_TENSORS:
                raise AdapterError(
                    f"{path} holds {counted(len(names), 'tensor')}, more than the {MAX_TENSORS} that are read."
                )
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise AdapterError(f"{path} is not a safetensors file, or is damaged: {error}") from error
    _check_tensors(tensors, config, origin=str(path))
    return tensors


def _check_tensors(tensors: Mapping[str, Tensor], config: AdapterFileConfig, origin: str) -> None:
    """Raise AdapterError unless these are pairs of lora_A and lora_B of the config's rank, and biases it names."""
    pairs: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        match = _LORA.fullmatch(name)
        if match is None:
            continue
        path, part = match["path"], match["part"]
        pairs.setdefault(path, set()).add(part)
        rank_dimension, rank = 0 if part == "A" else 1, config.rank_of(path)
        if tensor.dim() != 2 or tensor.shape[rank_dimension] != rank:
            wanted = f"({rank}, in features)" if part == "A" else f"(out features, {rank})"
            raise AdapterError(
                f"{origin}: {name} has shape {tuple(tensor.shape)}; with r {rank} it should be {wanted}."
            )
    if not pairs:
        raise AdapterError(f"{origin} holds no lora_A and lora_B tensors.")
    for path, parts in pairs.items():
        if len(parts) == 1:
            raise AdapterError(f"{origin}: {path} has lora_{parts.pop()} but not the other half of the pair.")
    for name, tensor in tensors.items():
        if _LORA.fullmatch(name) is None:
            _check_bias(name, tensor, config, pairs, origin)
        if tensor.dtype not in _DTYPES:
            raise AdapterError(f"{origin}: {name} is {tensor.dtype}; float32, float16 or bfloat16 is expected.")
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{origin}: {name} holds values that are not finite; the adapter is broken.")


def _check_bias(
    name: str, tensor: Tensor, config: AdapterFileConfig, adapted: Mapping[str, object], origin: str
) -> None:
    """Refuse a bias of a wrong name: an adapted layer's is `<path>.base_layer.bias`, any other's `<path>.bias`."""
    match = _BIAS.fullmatch(name)
    if match is None:
        raise AdapterError(
            f"{origin} also holds {name}, which is no part of a LoRA adapter and would overwrite the base. Trained "
            "heads, embeddings, DoRA magnitudes and modules saved whole are not supported."
        )
    path = match["path"]
    of_adapted = path.endswith(".base_layer") and path.removesuffix(".base_layer") in adapted
    if config.bias == "none" or (config.bias == "lora_only" and not of_adapted):
        raise AdapterError(f"{origin} holds the bias {name}, though its config says bias: {config.bias}.")
    if tensor.dim() != 1:
        raise AdapterError(f"{origin}: the bias {name} has shape {tuple(tensor.shape)}; one dimension is expected.")
