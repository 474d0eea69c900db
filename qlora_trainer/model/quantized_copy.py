"""Keep a base in 4 bits on disk: quantized once, and then loaded in the seconds that mapping a file takes.

What is written is bitsandbytes' own layout under the checkpoint's names, so plain transformers loads it as it is, and
so does this trainer, to the same base: the packed codes and their statistics are those that loading the original gives,
and what stays dense is copied. Tensors are converted one at a time, as in loading. The copy of a mixture of experts is
loaded by this trainer only, which its report says.

A kept copy in the user's cache is known by the files it was made of (path, size, times), and by their config. Left out:
models whose tensors transformers merges or splits while loading, which have no 4-bit weights of those names.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kernels.nf4 import NF4Weight
from qlora_trainer.common.atomic import new_directory, refuse_existing, refuse_unwritable, remove_leftovers, write_text
from qlora_trainer.common.errors import ModelError, OutputExistsError, memory_errors
from qlora_trainer.common.hashing import values_sha256
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.common.units import dtype_name
from qlora_trainer.config.schema import ModelConfig
from qlora_trainer.model.device import choose_device, device_with_memory
from qlora_trainer.model.fill import check_finite, quantize_arrival
from qlora_trainer.model.fingerprint import BaseFingerprint, TensorFingerprint, make_fingerprint, tensor_fingerprint
from qlora_trainer.model.load import Base, config_corrections, load_base_model, plan_base
from qlora_trainer.model.load_plan import RECORD_NAME, LoadPlan, untied_warning
from qlora_trainer.model.modules.experts import SplitExperts
from qlora_trainer.model.modules.nf4_linear import is_transposed, linear_layers
from qlora_trainer.model.pretrained import nf4_config
from qlora_trainer.weights.bitsandbytes_format import weight_to_checkpoint
from qlora_trainer.weights.gguf.reader import IMPORT_RECORD
from qlora_trainer.weights.listing import read_json_object
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.nf4 import empty_weight
from qlora_trainer.weights.read_back import verify_files
from qlora_trainer.weights.reading import row_blocks
from qlora_trainer.weights.shard_writer import DEFAULT_SHARD_BYTES, ShardWriter
from qlora_trainer.weights.side_files import copy_files, files_to_copy, refuse_full_disk
from qlora_trainer.weights.stream import stream_tensors
from qlora_trainer.weights.tensors import TensorInfo, TensorSpec

FUSED_EXPERTS = (
    "Only this trainer can load this copy: transformers fuses the model's experts while loading, and cannot read them "
    "in 4 bits."
)
_KEPT_FORMAT = 1  # raise it where other layers become 4-bit than before, so that copies are made anew


@dataclass(frozen=True)
class QuantizeReport:
    """Report what was written."""

    weights: int  # in 4 bits
    dense: int  # tensors copied as they were
    bytes: int  # of all tensors
    source_bytes: int  # of the checkpoint
    source_dtype: str  # that the weights were quantized from
    warnings: list[str]
    start: Mapping[str, Any] | None = None  # what was taken out of the weights

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON's types.

        Returns:
            The fields by name.
        """
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class BaseStart:
    """Hold how the start of an adapter is taken out of a base while it is quantized, and what is written of it."""

    working_bytes: int  # that splitting the largest weight takes on the device
    # (path of the layer, weight (O, I), the same in 4 bits, its name) -> what is left of it, in 4 bits
    split: Callable[[str, Tensor, NF4Weight, str], NF4Weight]
    # (directory of the copy, which base it is, which base it would be without a start) -> JSON values for the report
    write: Callable[[Path, BaseFingerprint, BaseFingerprint], Mapping[str, Any]]


def quantize_checkpoint(
    directory: ModelDirectory,
    output: Path,
    *,
    device: torch.device,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = silent,
    start: BaseStart | None = None,
) -> QuantizeReport:
    """Write the model of `directory` in NF4 to `output`, a new or empty directory that appears when it is whole.

    Other errors: InsufficientMemoryError where no device has space for its largest tensor, QuantizationError for a
    weight that is not finite or is quantized already, OutputExistsError, and DiskError. Nothing is left or overwritten.

    Args:
        directory: of the model.
        output: the directory to write.
        device: to quantize on.
        max_shard_bytes: largest size of a file of weights, unless one tensor is larger.
        progress: is called as tensors are written.
        start: is taken out of the weights.

    Returns:
        What was written.

    Raises:
        ModelError: it cannot be loaded here, or not be kept in 4 bits.
    """
    refuse_existing(output)
    plan, model = plan_base(directory)
    if hindrance := _hindrance(plan, model):
        raise ModelError(f"{hindrance} Train from the checkpoint as it is.")
    needed = plan.passing_bytes + (start.working_bytes if start else 0)
    device = device_with_memory(needed, device, f"Quantizing {directory}")
    layers = linear_layers(model)
    specs = {info.name: _specs(info, plan) for info in plan.tensors.values()}
    written = [spec for found in specs.values() for spec in found]
    copied = files_to_copy(directory.path)
    total = sum(spec.nbytes for spec in written)
    remove_leftovers(output)
    refuse_full_disk(output, total + sum(path.stat().st_size for path in copied), "The quantized model")

    kept_dense = [path for path, layer in _linear_modules(model) if path not in layers]
    with new_directory(output) as work:
        with (
            ShardWriter(work, written, max_shard_bytes) as writer,
            memory_errors(f"Quantizing {directory} on {device}"),
        ):
            found = _write_tensors(plan, writer, device, progress, start)
        verify_files(work, written, writer.checksums, progress, "quantized model")
        copy_files(directory.path, copied, work)
        _write_config(plan, work, kept_dense)
        report = QuantizeReport(
            weights=len(plan.four_bit),
            dense=len(plan.tensors) - len(plan.four_bit),
            bytes=total,
            source_bytes=sum(info.nbytes for info in plan.tensors.values()),
            source_dtype=dtype_name(plan.source_dtype),
            warnings=[
                *([untied_warning(directory, plan.untied[0])] if plan.untied else []),
                *([FUSED_EXPERTS] if any(isinstance(module, SplitExperts) for module in model.modules()) else []),
            ],
            start=start.write(work, found.base(plan, found.rest), found.base(plan, {})) if start else None,
        )
        record = report.to_json() | {"model": str(directory.path.absolute()), "sources": found.sources}
        write_text(work / RECORD_NAME, json.dumps(record, indent=1) + "\n")
    return report


def load_base(
    directory: ModelDirectory,
    settings: ModelConfig,
    cache_dir: Path,  # the user's
    progress: Progress = silent,
) -> Base:
    """Load the base of a model directory, from its 4-bit copy in the cache where model.cache_quantized asks for one.

    The copy is made where there is none. It is the same base; `directory` stays the base's directory, from which it is
    merged. What cannot be kept in 4 bits is loaded as it is, with a warning. Errors are those of `load_base_model` and
    `quantize_checkpoint`.

    Args:
        directory: of the model.
        settings: the config's section `model`.
        cache_dir: that has the copies and the records of known bases.
        progress: is called as tensors are read or written.

    Returns:
        The base.
    """
    if not settings.cache_quantized:
        return load_base_model(directory, settings, cache_dir, progress)
    kept = cache_dir / "quantized" / f"{Path(settings.name).name}-{_key(directory)[:16]}"
    if not (kept / RECORD_NAME).is_file():
        plan, model = plan_base(directory)
        if hindrance := _hindrance(plan, model):
            base = load_base_model(directory, settings, cache_dir, progress)
            again = f"{hindrance} It was quantized while loading, as it will be each time."
            return dataclasses.replace(base, warnings=[*base.warnings, *([] if plan.statistics else [again])])
        _make_copy(directory, kept, settings, progress)
    base = load_base_model(ModelDirectory.open(kept), settings, cache_dir, progress)
    warnings = [*base.warnings]
    if config_corrections(directory):  # which the copy has
        warnings.append(untied_warning(directory, "the LM head"))
    return dataclasses.replace(base, directory=directory, warnings=warnings)


def _make_copy(directory: ModelDirectory, kept: Path, settings: ModelConfig, progress: Progress) -> None:
    """Write the 4-bit copy, unless another process makes it meanwhile."""
    refuse_unwritable(kept, "XDG_CACHE_HOME")
    try:
        quantize_checkpoint(directory, kept, device=choose_device(settings.device), progress=progress)
    except OutputExistsError:
        if not (kept / RECORD_NAME).is_file():  # only a whole one of the other process can be under this name
            raise


def _key(directory: ModelDirectory) -> str:
    """Return a key of the files a base is loaded from, each known by its path, size and times: contents are not read.

    A changed file changes the time of its last change, whatever its other times were set to. Its inode and device are
    left out: some systems number them anew when they start, and each copy takes gigabytes. An imported file is known by
    the sha256 and the tensors that its record has.
    """
    facts: list[Any] = [_KEPT_FORMAT, directory.config_json]
    imported = directory.path / IMPORT_RECORD
    if imported.is_file():
        facts += [{key: value for key, value in read_json_object(imported).items() if key != "file"}]
    else:
        facts += [[file.path, file.size, file.mtime_ns, file.ctime_ns] for file in directory.file_identity]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _hindrance(plan: LoadPlan, model: Any) -> str | None:
    """Return why a model cannot be kept in 4 bits, in a sentence; None where it can."""
    if plan.statistics:
        return f"{plan.directory} holds 4-bit weights already."
    if not plan.four_bit:
        return f"{plan.directory} has no linear layers that can be quantized."
    if plan.converted:
        return (
            f"{plan.directory} cannot be kept in 4 bits: transformers merges or splits {len(plan.converted)} of its "
            f"tensors while loading, such as {plan.converted[0]}."
        )
    unknown = {type(layer).__name__ for layer in linear_layers(model).values()} - {"Linear", "Conv1D"}
    if unknown:
        return (
            f"{plan.directory} cannot be kept in 4 bits: transformers does not load its layers of class "
            f"{', '.join(sorted(unknown))} from such a checkpoint."
        )
    return None


def _specs(info: TensorInfo, plan: LoadPlan) -> list[TensorSpec]:
    """Describe the tensors that are written for a tensor of the checkpoint."""
    if info.name not in plan.four_bit:
        return [info]
    rows, columns = reversed(info.shape) if info.name in plan.transposed else info.shape
    parts = weight_to_checkpoint(empty_weight(rows, columns, "meta"), plan.source_dtype)
    return [TensorSpec(name, part.dtype, tuple(part.shape)) for name, part in _named(info, parts)]


def _named(info: TensorInfo, parts: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for key, part in parts.items():
        yield (f"{info.name}.{key}" if key else info.name), part


@dataclass
class _Written:
    """Hold what identifies the tensors; but for `sources`, only where a start is taken out."""

    sources: dict[str, str] = dataclasses.field(default_factory=dict)  # sha256 as on disk, by the checkpoint's names
    plain: dict[str, TensorFingerprint] = dataclasses.field(default_factory=dict)  # in 4 bits, by path
    rest: dict[str, TensorFingerprint] = dataclasses.field(default_factory=dict)  # after the start was taken out
    dense: dict[str, str] = dataclasses.field(default_factory=dict)  # sha256 by the model's names

    def base(self, plan: LoadPlan, tensors: Mapping[str, TensorFingerprint]) -> BaseFingerprint:
        """Return the base that has these tensors in the place of the plain ones.

        Args:
            plan: of the checkpoint.
            tensors: by path.

        Returns:
            Its fingerprint.
        """
        both = {**self.plain, **tensors}
        config = plan.directory.config_json
        return make_fingerprint(config, plan.source_dtype, both, self.dense, self.sources, plan.renamed)


def _write_tensors(
    plan: LoadPlan, writer: ShardWriter, device: torch.device, progress: Progress, start: BaseStart | None
) -> _Written:
    """Write every tensor in the checkpoint's order."""
    found = _Written()
    done, total = 0, sum(info.nbytes for info in plan.tensors.values())
    infos = list(plan.tensors.values())
    arrivals = stream_tensors(infos, device, stays_on_host=lambda info: info.name not in plan.four_bit)
    with contextlib.closing(arrivals):
        for arrival in arrivals:
            progress("quantizing", done, total)
            info = arrival.info
            assert arrival.sha256 is not None
            found.sources[info.name] = arrival.sha256
            if info.name in plan.four_bit:
                weight = quantize_arrival(arrival, plan)
                if start is not None:
                    path = plan.four_bit[info.name]
                    found.plain[path] = tensor_fingerprint(weight)
                    values = arrival.values.T if info.name in plan.transposed else arrival.values
                    weight = start.split(path, values, weight, info.name)
                    found.rest[path] = tensor_fingerprint(weight)
                for name, part in _named(info, weight_to_checkpoint(weight, plan.source_dtype)):
                    writer.write(name, part)
            else:
                if info.name in plan.dense:
                    check_finite(arrival.info, arrival.values)
                    if start is not None:
                        dense = plan.dense[info.name]
                        found.dense[dense.names[0]] = values_sha256(arrival.host, dense.dtype)
                for rows in row_blocks(info.shape):
                    block = arrival.host if rows is None else arrival.host[rows]
                    writer.write(info.name, block.clone())  # or what waits to be written would hold all of the tensor
            done += info.nbytes
            del arrival  # before the next one comes
    return found


def _linear_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) or is_transposed(module):
            yield path, module


def _write_config(plan: LoadPlan, work: Path, kept_dense: list[str]) -> None:
    """Write config.json as the weights are, with what transformers needs to know of the quantization."""
    config = {**plan.directory.config_json, **plan.config_corrections}
    # Where a 16-bit model has a tensor in fp32, it was not made to be computed with in fp32.
    named = getattr(torch, str(config.get("dtype", config.get("torch_dtype"))), None)
    compute_dtype = named if named in (torch.bfloat16, torch.float16) else plan.source_dtype
    config["quantization_config"] = nf4_config(compute_dtype, kept_dense).to_dict()
    write_text(work / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
