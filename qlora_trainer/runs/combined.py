"""Combine the adapters of several runs into a run directory of its own, which evaluate, generate and merge take.

Its config is that of the first run that is named, with the settings of the combined adapter: its eval rows, template
and base are that run's. Each adapter of ours has the fingerprint of its base, and these are compared, as a merge does.
An adapter made by another program only names a base, and a difference there is a warning.

Left out: the arithmetic (adapters/arithmetic/combine.py).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.adapters.arithmetic.combine import CombinedAdapter, WeightedAdapter, combine_adapters
from qlora_trainer.adapters.arithmetic.methods import CombineSettings
from qlora_trainer.adapters.file_config import FileConfig
from qlora_trainer.adapters.peft_format import StoredAdapter, read_adapter, write_adapter
from qlora_trainer.common.atomic import new_directory, refuse_existing
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.config.load import save_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.runs.base_start import START_NAME, BaseOfRun, taken_out_of
from qlora_trainer.runs.directory import (
    BASE_NAME,
    RUN_CONFIG_NAME,
    BaseRecord,
    read_base_record,
    write_base_record,
)
from qlora_trainer.runs.trained import TrainedAdapter, newest_adapter, read_trained
from qlora_trainer.weights.side_files import copy_files, files_to_copy

_EXACT = ("cat", "svd")  # of the weighted sum


@dataclass(frozen=True)
class CombineReport:
    """Report which adapter was made."""

    method: str
    layers: int
    rank: int  # the largest of a layer
    difference: float  # of the adapter from the weighted sum, relative
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON's types.

        Returns:
            The fields by name.
        """
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _Source:
    """Hold an adapter as it was named: by its run, or by its own directory."""

    path: Path
    weight: float
    adapter: StoredAdapter
    directory: Path  # of PEFT's files
    record: BaseRecord | None
    run: TrainedAdapter | None


def combine_runs(
    adapters: Sequence[tuple[Path, float]],
    output: Path,
    settings: CombineSettings,
    *,
    original_base: bool = False,
    progress: Progress = silent,
) -> CombineReport:
    """Write a weighted combination of LoRA adapters of one base, as a run directory.

    `adapter/` in it is a PEFT adapter; `qlora evaluate`, `generate` and `merge` take the directory.

    Args:
        adapters: (directory, weight) of each: a run directory, or that of a PEFT adapter; one of them is a run's.
        output: a new or empty directory.
        settings: the method, and what it needs.
        original_base: make it an adapter of the base as it was before an adapter's start was taken out of it
            (adapter.init): what the start was is subtracted.
        progress: is called for each layer.

    Returns:
        What was made.

    Raises:
        QLoRATrainerError: a directory holds no adapter, the adapters are of different bases or of a kind that cannot
            be combined, or a setting is missing; nothing was written.
    """
    settings.check()
    refuse_existing(output)
    sources = [_read(path, weight) for path, weight in adapters]
    run = next((source.run for source in sources if source.run), None)
    if run is None:
        raise AdapterError(
            "None of these is a run directory, so nothing says which base and rows they belong to. Name one by its run "
            "directory; adapters of no run can be combined by PEFT's add_weighted_adapter."
        )
    warnings = _check_bases(run, sources)
    parts = [WeightedAdapter(str(source.path), source.adapter, source.weight) for source in sources]
    base = BaseOfRun(run.config.model.name, run.config.model.revision, run.fingerprint)
    if taken_out := _start_of(run, original_base):
        start, base = taken_out
        if settings.method not in _EXACT:
            raise AdapterError(
                f"With --original-base what the start was is subtracted, which --method {settings.method} cannot. Take "
                "cat, or svd with --rank."
            )
        parts.append(WeightedAdapter("their start", start, -sum(source.weight for source in sources)))
    combined = combine_adapters(parts, settings, progress)
    config, file_config = _configs(run, combined, base, output)
    with new_directory(output) as work:
        (work / "adapter").mkdir()
        write_adapter(work / "adapter", combined.tensors, file_config)
        record = BaseRecord(
            base.fingerprint, max(s.record.step for s in sources if s.record), output.name, run.data_key
        )
        write_base_record(work / "adapter", record)
        final = run.directory / "adapter"
        if final.is_dir():  # the files on turns, which a checkpoint has not
            copy_files(final, [path for path in files_to_copy(final) if path.name != BASE_NAME], work / "adapter")
        save_config(config, work / RUN_CONFIG_NAME)
        _check_written(work / "adapter", combined)
    return CombineReport(
        settings.method, len(combined.ranks), max(combined.ranks.values()), combined.difference, warnings
    )


def _read(path: Path, weight: float) -> _Source:
    if (path / RUN_CONFIG_NAME).is_file():
        run = read_trained(path)
        directory = newest_adapter(path)
        return _Source(path, weight, run.adapter, directory, read_base_record(directory), run)
    return _Source(path, weight, read_adapter(path), path, read_base_record(path), None)


def _check_bases(run: TrainedAdapter, sources: Sequence[_Source]) -> list[str]:
    """Refuse adapters of other bases than the run's; return warnings of those that only name one."""
    warnings, name = [], run.config.model.name
    for source in sources:
        if source.record and (difference := run.fingerprint.difference(source.record.fingerprint)):
            raise AdapterError(
                f"{source.path} was trained on another base than {run.directory}: {difference}. Only adapters of one "
                "base can be combined."
            )
        config = source.adapter.config
        if config.is_stored_transposed != run.adapter.config.is_stored_transposed:
            raise AdapterError(
                f"{source.path} is for a base that stores its weights in another order (fan_in_fan_out) than the base "
                f"of {run.directory}. Only adapters of one base can be combined."
            )
        named = config.base_model_name_or_path
        if not source.record and named and Path(named).name.lower() != Path(name).name.lower():
            warnings.append(
                f"{source.path} was made for {named}, and the base of {run.directory} is {name}. If these are "
                "different weights, the sum is of no use."
            )
    return warnings


def _start_of(run: TrainedAdapter, original_base: bool) -> tuple[StoredAdapter, BaseOfRun] | None:
    """Read what was taken out of a run's base, where it is to be put on the original one, and refuse what is no sum."""
    name = run.config.model.name
    taken_out = taken_out_of(Path(name)) if Path(name).is_dir() else None
    if original_base and taken_out is None:
        raise AdapterError(f"The base of {run.directory}, {name}, is an original one; leave --original-base out.")
    if not original_base and taken_out is not None:
        raise AdapterError(
            f"The base of {run.directory}, {name}, is whole only with its start, which each of its adapters holds, so "
            "they have no weighted sum on it. Combine them on the original base, with --original-base."
        )
    record = read_base_record(Path(name) / START_NAME) if taken_out else None
    if record and (difference := run.fingerprint.difference(record.fingerprint)):
        raise AdapterError(f"{run.directory} was trained on another base than {name} is now: {difference}. Restore it.")
    return taken_out


def _configs(
    run: TrainedAdapter, combined: CombinedAdapter, base: BaseOfRun, output: Path
) -> tuple[RunConfig, FileConfig]:
    """Describe the combined adapter as a run's config and as a file do."""
    named = getattr(run.adapter.config, "target_modules", None)
    has_the_runs_layers = combined.ranks.keys() == set(run.adapter.paths) and isinstance(named, list)
    targets = named if has_the_runs_layers and named else sorted(combined.ranks)
    transposed = run.adapter.config.is_stored_transposed
    file_config = combined.file_config(targets, base.name, base.revision, transposed)
    values: dict[str, Any] = {
        "model.name": base.name,
        "model.revision": base.revision,
        "adapter.rank": file_config.r,
        "adapter.alpha": file_config.lora_alpha,
        "adapter.rank_pattern": file_config.rank_pattern,
        "adapter.alpha_pattern": file_config.alpha_pattern,
        "adapter.use_rslora": False,
        "adapter.dropout": 0.0,
        "adapter.fused_parts": {},
        "adapter.target_modules": targets,
        "adapter.layers_to_transform": None,
        "adapter.init": "kaiming",
        "adapter.init_from": None,
        "adapter.dtype": "float32",
        "training.output_dir": str(output.absolute()),
    }
    return run.config.replace(values), file_config


def _check_written(directory: Path, combined: CombinedAdapter) -> None:
    """Read the adapter back, and compare it with what was to be written."""
    written = read_adapter(directory).tensors
    if written.keys() != combined.tensors.keys() or not all(
        torch.equal(tensor, written[name]) for name, tensor in combined.tensors.items()
    ):
        raise AdapterError(f"What was written to {directory} is not what was combined: the disk may be failing.")
