"""Read and write adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

An adapter from elsewhere is data from strangers, so reading is strict where other loaders are lenient. Safetensors and
JSON only, never pickle. Only lora_A, lora_B and (where the config says so) bias tensors are allowed: a file that also
holds `lm_head.weight` would silently overwrite the base in loaders that accept it. What would make the adapter another
function than s * B A added to the weight (DoRA, scalings that differ, modules saved whole, initializations that changed
the base) is refused by name instead of ignored. Layers may differ in rank where their alpha differs with it, so that
one s holds for all: so lie layers of which parts are adapted alone (fused_parts.py) next to others.

Legend: R rank, I in features, O out features.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qlora_trainer.adapters.formulas import lora_scaling
from qlora_trainer.common.atomic import write_text
from qlora_trainer.common.errors import AdapterError, DiskError, FileMissingError
from qlora_trainer.config.schema import AdapterConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 2**20
MAX_RANK = 3 * 1024  # of three parts of a fused layer at the largest adapter.rank
MAX_TENSORS = 100_000

_LORA = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<part>[AB])\.weight")
_BIAS = re.compile(r"base_model\.model\.(?P<path>.+)\.bias")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Keys of PEFT's config that say how an adapter came about or where it was put, which its tensors tell better.
_IGNORED = {
    "auto_mapping",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
}
# Keys that change what an adapter does, and what to do about them. Neutral (null, false, empty) they pass.
_REFUSED = {
    "use_dora": "DoRA is not supported yet",
    "modules_to_save": "modules saved whole are not supported; train it without them, or merge it with PEFT first",
    "trainable_token_indices": "trained tokens are not supported; merge it with PEFT first",
    "target_parameters": "adapters on bare parameters are not supported; merge it with PEFT first",
    "layer_replication": "replicated layers are not supported; merge it with PEFT first",
    "lora_bias": "a bias on lora_B is not supported; merge it with PEFT first",
    "alora_invocation_tokens": "activated LoRA is not supported",
}
_PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "orthogonal")  # others change the base's weights, or may


class AdapterFileConfig(BaseModel):
    """The keys of adapter_config.json that we write and read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    peft_type: Literal["LORA"] = "LORA"
    task_type: Literal["CAUSAL_LM"] | None = "CAUSAL_LM"
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: int = Field(ge=1, le=MAX_RANK)
    lora_alpha: float = Field(gt=0.0)
    lora_dropout: float = Field(0.0, ge=0.0, le=1.0)
    rank_pattern: dict[str, int] = {}  # of layers of another rank than r, by the end of their path
    alpha_pattern: dict[str, float] = {}  # likewise of alpha
    target_modules: list[str] | str | None  # ends of module paths, or a regex; reading goes by the tensors instead
    bias: Literal["none", "lora_only", "all"] = "none"
    use_rslora: bool = False
    use_dora: Literal[False] = False
    fan_in_fan_out: bool = False  # the base stores these weights (I, O), as GPT-2's Conv1D does
    init_lora_weights: bool | str | None = True
    modules_to_save: None = None
    inference_mode: bool = True

    def rank_of(self, path: str) -> int:
        """R of a layer. (Names are compared as they are written, though PEFT would read them as expressions.)"""
        return next((r for end, r in self.rank_pattern.items() if f".{path}".endswith(f".{end}")), self.r)

    @model_validator(mode="after")
    def _one_scaling_holds_for_all(self) -> Self:
        scaling = lora_scaling(self.r, self.lora_alpha, self.use_rslora)
        for name in {**self.rank_pattern, **self.alpha_pattern}:
            rank, alpha = self.rank_pattern.get(name, self.r), self.alpha_pattern.get(name, self.lora_alpha)
            if not 1 <= rank <= MAX_RANK or not math.isclose(lora_scaling(rank, alpha, self.use_rslora), scaling):
                key = "rank_pattern" if name in self.rank_pattern else "alpha_pattern"
                raise ValueError(
                    f"{key} gives {name} rank {rank} and alpha {alpha:g}, and so another scaling than the other layers "
                    "have, which is not supported; train it with one scaling"
                )
        return self


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as read from its files."""

    config: AdapterFileConfig
    tensors: dict[str, Tensor]  # PEFT's names; lora_A (R, I), lora_B (O, R), biases (O,); fp32 on the CPU

    @property
    def paths(self) -> list[str]:
        """Paths of the adapted modules in the base model, in the order of the file."""
        return list(stored_ranks(self.tensors))


def write_adapter(directory: Path, tensors: Mapping[str, Tensor], config: AdapterFileConfig) -> None:
    """Write the adapter's two files into an existing directory.

    `tensors` have PEFT's names and shapes as in StoredAdapter; lists of target modules are written sorted. The config
    comes last, so that a directory with a config has its weights.

    Raises:
        AdapterError: the tensors do not fit the config, or hold values that are not finite.
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

    Raises:
        FileMissingError: there is no such directory, or no adapter in it.
        AdapterError: it is of a kind not supported here, or not what an adapter should be.
    """
    _check_files(directory)
    config = _read_config(directory / ADAPTER_CONFIG)
    tensors = _read_tensors(directory / ADAPTER_WEIGHTS, config)
    return StoredAdapter(config, {name: tensor.float() for name, tensor in tensors.items()})


def stored_ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """R of each adapted layer, by its path, from tensors named as PEFT names them."""
    return {
        match["path"]: len(tensor)
        for name, tensor in tensors.items()
        if (match := _LORA.fullmatch(name)) and match["part"] == "A"
    }


def setting_differences(found: AdapterFileConfig, wanted: AdapterConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that make an adapter's numbers another function: config key -> (the file's value, the config's)."""
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


def _read_config(path: Path) -> AdapterFileConfig:
    """Check adapter_config.json: kinds we cannot train are refused by name, all problems at once."""
    if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
        raise AdapterError(f"{path} has {size} bytes, more than the {MAX_CONFIG_BYTES} that are read.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise AdapterError(f"{path} should hold a JSON object, but holds {type(raw).__name__}.")
    if raw.get("peft_type") != "LORA":
        raise AdapterError(f"{path} is an adapter of type {raw.get('peft_type')!r}; only LORA is supported.")
    known = {}
    problems = []
    for key, value in raw.items():
        if key in _REFUSED and value:
            problems.append(f"{key} is {_short(value)}: {_REFUSED[key]}")
        elif key in AdapterFileConfig.model_fields:
            known[key] = value
        elif key not in _IGNORED and value:
            problems.append(
                f"{key} is {_short(value)}: this key is not known here, and may change what the adapter does"
            )
    if known.get("init_lora_weights") not in _PLAIN_INITIALISATIONS:
        problems.append(
            f"init_lora_weights is {_short(known['init_lora_weights'])}, which may change the base's weights "
            "too; convert it to a plain LoRA (PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
        )
    try:
        # What is refused has been reported; here it must not be reported again.
        config = AdapterFileConfig.model_validate({k: v for k, v in known.items() if k not in _REFUSED})
    except ValidationError as error:
        problems += [_reported(item["loc"], item["msg"]) for item in error.errors()]
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in dict.fromkeys(problems))
        raise AdapterError(f"{path} describes an adapter that cannot be used here:\n{lines}")
    return config


def _read_tensors(path: Path, config: AdapterFileConfig) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) > MAX_TENSORS:
                raise AdapterError(f"{path} holds {len(names)} tensors, more than the {MAX_TENSORS} that are read.")
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
    """A bias of an adapted layer is called `<path>.base_layer.bias`, any other `<path>.bias`."""
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


def _reported(place: tuple[int | str, ...], message: str) -> str:
    """One of pydantic's errors; what concerns several keys has no place."""
    return f"{place[0]}: {message.lower()}" if place else message.removeprefix("Value error, ")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
