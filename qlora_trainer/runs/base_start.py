"""Take an adapter's start out of a base: write its 4-bit copy, and find that start again for a run on it.

    quantize --init pissa MODEL      ->  OUTPUT: what is left of the weights, in 4 bits
                                         OUTPUT/start: the adapter that makes them whole, in PEFT's files
    train with model.name=OUTPUT and adapter.init=pissa begins with that adapter

A run on the copy is a run like any other: resume, evaluate and merge find the copy as its base and compare it with the
fingerprint. The start also has the fingerprint of the copy, and of the base as it would be without a start, so that a
trained adapter can be put on the original base (combined.py). A copy without its start is a damaged base, so a run on
it with another start is refused.

Left out: how a weight is split (adapters/arithmetic/starts.py), and writing the copy (model/quantized_copy.py).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qlora_kernels.nf4 import NF4Weight, dequantize_nf4
from qlora_trainer.adapters.arithmetic.starts import STARTS
from qlora_trainer.adapters.file_config import PEFT_PREFIX
from qlora_trainer.adapters.inject import add_adapters, lora_layers
from qlora_trainer.adapters.kinds.table import adapter_kind
from qlora_trainer.adapters.peft_format import ADAPTER_WEIGHTS, StoredAdapter, read_adapter, write_adapter
from qlora_trainer.common.atomic import write_text
from qlora_trainer.common.boundary import read_bounded_json
from qlora_trainer.common.command_line import command_line
from qlora_trainer.common.errors import AdapterError, CheckpointError
from qlora_trainer.common.file_identity import file_sha256
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.common.units import counted
from qlora_trainer.config.override import override
from qlora_trainer.config.schema import AdapterConfig
from qlora_trainer.model.empty import empty_model
from qlora_trainer.model.fingerprint import BaseFingerprint
from qlora_trainer.model.load_plan import RECORD_NAME
from qlora_trainer.model.modules.nf4_linear import linear_layers
from qlora_trainer.model.quantized_copy import BaseStart, QuantizeReport, quantize_checkpoint
from qlora_trainer.runs.directory import MAX_RECORD_BYTES, BaseRecord, write_base_record
from qlora_trainer.weights.listing import read_json_object
from qlora_trainer.weights.model_directory import ModelDirectory

START_NAME = "start"
ORIGINAL_NAME = "original.json"
_COPIES = 4  # of the largest weight in fp32, while it is split
_ADVICE = "Make the copy again."
# Settings that a start has, next to init and rank.
_OF_START = ("target_modules", "layers_to_transform", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias")


class BaseOfRun(NamedTuple):
    """Hold a base: what a config names, and what it is."""

    name: str
    revision: str | None
    fingerprint: BaseFingerprint


def quantize_with_start(
    directory: ModelDirectory,
    output: Path,
    settings: AdapterConfig,
    *,
    name: str,
    revision: str | None = None,
    seed: int = 0,
    device: torch.device,
    progress: Progress = silent,
) -> QuantizeReport:
    """Write the 4-bit copy of what an adapter's start leaves of a base, and the start, to a new or empty directory.

    Weights are split one at a time. Other errors are those of `quantize_checkpoint`.

    Args:
        directory: of the base, not quantized.
        output: the directory to write.
        settings: of the adapter; `init` is a start that changes the base.
        name: of the base, as the config of a run would name it.
        revision: of the base.
        seed: of the random projections of large weights.
        device: to compute on.
        progress: is called as tensors are written.

    Returns:
        What was written; `start` has init, rank, and the relative errors of base + start and of plain NF4.

    Raises:
        AdapterError: the settings do not fit the model, a layer stays dense, or is smaller than the rank.
    """
    if settings.init not in STARTS or settings.fused_parts:
        raise AdapterError(f"adapter.init={settings.init} takes nothing out of a base. Choose {', '.join(STARTS)}.")
    model = empty_model(directory, stored=directory.tensors)
    four_bit = linear_layers(model).keys()
    paths = add_adapters(model, settings.model_copy(update={"init": "kaiming"}), seed)
    if dense := [path for path in paths if path not in four_bit]:
        raise AdapterError(
            f"{dense[0]} is adapted and stays dense in the 4-bit copy, as {counted(len(dense), 'layer')} of "
            f"{len(paths)} here: starts are taken out of 4-bit weights alone. Set adapter.init=kaiming for a run on "
            "the original base, or call quantize_with_start in Python with target_modules that leave such layers out."
        )
    layers = lora_layers(model)
    for path, layer in layers.items():
        smallest = min(layer.lora_A.in_features, layer.out_features)
        if layer.lora_B.in_features > smallest:
            raise AdapterError(
                f"{path} is {layer.out_features} x {layer.lora_A.in_features}, so no start of rank "
                f"{layer.lora_B.in_features} can be taken out of it. Set a rank of {smallest} or less."
            )
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    squares = {"whole": 0.0, "plain": 0.0, "start": 0.0}

    def split(path: str, weight: Tensor, plain: NF4Weight, tensor_name: str) -> NF4Weight:
        if path not in layers:
            return plain
        layer, weight = layers[path], weight.float()
        squares["whole"] += _square(weight)
        squares["plain"] += _square(dequantize_nf4(plain, torch.float32).sub_(weight))
        parts = STARTS[settings.init](weight, layer.lora_B.in_features, layer.scaling, generator, tensor_name)
        squares["start"] += parts.squared_error
        tensors[f"{PEFT_PREFIX}{path}.lora_A.weight"] = parts.lora_A.cpu()
        tensors[f"{PEFT_PREFIX}{path}.lora_B.weight"] = parts.lora_B.cpu()
        return parts.rest

    def write(work: Path, rest: BaseFingerprint, original: BaseFingerprint) -> Mapping[str, Any]:
        start = work / START_NAME
        start.mkdir()
        assert len(tensors) == 2 * len(paths), "each adapted layer was split"
        named = {"base_model_name_or_path": str(output.absolute()), "revision": None}
        write_adapter(start, tensors, adapter_kind(settings).file_config(settings, model, tensors, paths, named))
        write_base_record(start, BaseRecord(rest, 0, START_NAME, ""))
        place = str(Path(name).absolute()) if Path(name).exists() else name
        content = {"name": place, "revision": revision, "base": original.to_json()}
        write_text(start / ORIGINAL_NAME, json.dumps(content, indent=1) + "\n")
        return {
            "init": settings.init,
            "rank": settings.rank,
            "error": (squares["start"] / squares["whole"]) ** 0.5,
            "plain_error": (squares["plain"] / squares["whole"]) ** 0.5,
            "sha256": file_sha256(start / ADAPTER_WEIGHTS),
        }

    largest = max(layer.lora_A.in_features * layer.out_features for layer in layers.values())
    taken_out = BaseStart(4 * _COPIES * largest, split, write)
    return quantize_checkpoint(directory, output, device=device, progress=progress, start=taken_out)


def start_of_base(directory: ModelDirectory, settings: AdapterConfig) -> Path | None:
    """Find the start that belongs to a run's base, and refuse a run that would begin otherwise.

    Args:
        directory: of the run's model.
        settings: the config's section `adapter`.

    Returns:
        The directory of the start's files; None where the base has none, or the run goes on from another adapter.

    Raises:
        AdapterError: the settings ask for a start that the base has not, or not for the one that was taken out of it.
    """
    record = check_start(directory, settings)
    return None if record is None else _checked_start(directory.path, record)


def check_start(directory: ModelDirectory, settings: AdapterConfig) -> Mapping[str, Any] | None:
    """Refuse settings that begin otherwise than a base is made for; only its record is read, no weights.

    Args:
        directory: of the model.
        settings: the config's section `adapter`.

    Returns:
        What the record says of the base's start; None where it has none, or a run goes on from another adapter.

    Raises:
        AdapterError: the settings ask for a start that the base has not, or not for the one that was taken out of it.
    """
    record = _start_record(directory.path)
    if record is None:
        if settings.init in STARTS:
            command = command_line("quantize", directory.path, "--init", settings.init, "--rank", settings.rank)
            raise AdapterError(
                f"adapter.init={settings.init} begins on a 4-bit copy of the base that was made for it, and "
                f"{directory} is none. Make one with `{command} --output COPY`, and set model.name=COPY."
                f"{_other_settings(settings)}"
            )
        return None
    if settings.init_from is not None:
        return None  # an adapter that was trained on the copy; its own record says on which
    found = record.get("init")
    if settings.init != found:
        raise AdapterError(
            f"{directory} is what a start of {found} left of a base, and is whole only with it. Set "
            f"adapter.init={found}, or train on the original base."
        )
    return record


def command_settings(init: Literal["olora", "pissa", "loftq"], rank: int) -> AdapterConfig:
    """Return the adapter whose start the command quantize takes out of a base.

    Args:
        init: the start.
        rank: of all layers.

    Returns:
        The settings.
    """
    return AdapterConfig(init=init, rank=rank, alpha=2.0 * rank)


def taken_out_of(directory: Path) -> tuple[StoredAdapter, BaseOfRun] | None:
    """Read what was taken out of a base, and what it was before.

    Args:
        directory: of a model.

    Returns:
        (start, original base); None where nothing was taken out.

    Raises:
        CheckpointError: the record of the original base cannot be read.
    """
    record = _start_record(directory)
    if record is None:
        return None
    start = _checked_start(directory, record)
    path = start / ORIGINAL_NAME
    content = read_bounded_json(path, dict, MAX_RECORD_BYTES, CheckpointError, _ADVICE)
    try:
        original = BaseOfRun(content["name"], content["revision"], BaseFingerprint.from_json(content["base"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} should describe the original base, but does not: {error!r}. {_ADVICE}"
        ) from error
    return read_adapter(start), original


def _other_settings(settings: AdapterConfig) -> str:
    """Say which settings of a run are others than those of the command's start."""
    assert settings.init in ("olora", "pissa", "loftq")
    made = command_settings(settings.init, settings.rank)
    if settings.target_modules == "all-linear":
        made = made.model_copy(update={"target_modules": "all-linear"})  # another name of auto
    changes = {name: getattr(made, name) for name in _OF_START if getattr(made, name) != getattr(settings, name)}
    if not changes:
        return ""
    words = " ".join(override(f"adapter.{name}", value) for name, value in changes.items())
    own = "" if "bias" in changes else ", or make the copy for this run's own by quantize_with_start in Python"
    return f" Its start is for settings other than this run's: set {words} too{own}."


def _square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2


def _start_record(directory: Path) -> dict[str, Any] | None:
    """Return what a copy's record says of its start; None where it has none."""
    path = directory / RECORD_NAME
    record = read_json_object(path).get("start") if path.is_file() else None
    return record if isinstance(record, dict) else None


def _checked_start(directory: Path, record: Mapping[str, Any]) -> Path:
    """Return the directory of a start whose weights are those that were written."""
    start = directory / START_NAME
    weights = start / ADAPTER_WEIGHTS
    if not weights.is_file() or file_sha256(weights) != record.get("sha256"):
        raise AdapterError(
            f"{weights} is missing, or not the start that was taken out of {directory}: together they would be no "
            f"base. {_ADVICE}"
        )
    return start
