"""From a run directory to a merged, verified model: choose the base, merge, and compare answers.

The trained function, in fp32, gives the reference: logits on sample rows, and the eval loss. Then what was written
is run by plain transformers and must give the same. On the dequantized base the merged model is the trained function,
so the bound is tight. The original base makes another function: its merge is held to the same bound against original
weights + adapter, and how far that is from what was trained is reported, with the eval losses of both; where it is
clearly worse it is refused.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch

from qlora_trainer.common.atomic import refuse_existing
from qlora_trainer.common.cache import user_cache
from qlora_trainer.common.errors import CheckpointError, MergeError, memory_errors
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.merging.fold import MergeReport, merge, prepare_merge
from qlora_trainer.merging.logits import LogitDifference, compare_logits
from qlora_trainer.merging.measure import ON_CPU, MergeRun, measure_original, measure_trained
from qlora_trainer.merging.streamed_model import can_stream, load_streamed_model, streaming_device
from qlora_trainer.merging.trained_weights import trained_weights
from qlora_trainer.merging.verify import (
    KL_BOUNDS,
    ROUTED_KL_BOUNDS,
    BaseChoice,
    check_original,
    choose_base,
    verify_merge,
)
from qlora_trainer.model.device import choose_device
from qlora_trainer.model.fingerprint import config_identity
from qlora_trainer.model.load import load_dense_model
from qlora_trainer.model.source import load_tokenizer, resolve_model
from qlora_trainer.runs.trained import read_trained
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.shard_writer import DEFAULT_SHARD_BYTES


@dataclasses.dataclass(frozen=True)
class Deployment:
    """What a merge did, and what was measured on the way."""

    report: MergeReport
    choice: BaseChoice
    difference_from_trained: LogitDifference | None  # of the base taken, before rounding; None for the dequantized one
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def merge_run(
    run_dir: Path,
    output: Path,
    *,
    dtype: torch.dtype = torch.float16,
    base: Literal["auto", "dequantized", "original"] = "auto",
    model: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = silent,
) -> Deployment:
    """Merge a run's adapter into its base, verify it, and write it to `output`, a new or empty directory.

    Args:
        model: another copy of the run's base, such as a prequantized one, to merge from; by default the run's own.
        max_shard_bytes: of a file of weights; a larger tensor has one of its own.

    Raises:
        CheckpointError: there is no adapter, or the base is not the one it was trained on.
        MergeError: the merge or its verification failed, or the original base was asked for and is clearly worse;
            nothing was left.
        OutputExistsError, DiskError, InsufficientMemoryError: as named.
    """
    refuse_existing(output)
    run = _open_run(run_dir, model, progress)
    with memory_errors(f"Merging {run_dir}", "Free memory and merge again; nothing was written."):
        return _merge_run(run, output, dtype, base, max_shard_bytes, progress)


def _merge_run(
    run: MergeRun,
    output: Path,
    dtype: torch.dtype,
    base: Literal["auto", "dequantized", "original"],
    max_shard_bytes: int,
    progress: Progress,
) -> Deployment:
    if base == "original" and run.directory.facts.is_prequantized:
        raise MergeError(
            f"{run.directory} is prequantized: it holds no original weights to merge into. Merge into the dequantized "
            "base (--base dequantized), which is the function that was trained."
        )
    _refuse_early(run, output, dtype, base, progress)
    sample, as_trained = measure_trained(run, progress)
    on_original = measure_original(run, sample, base, progress)
    original_loss = on_original.loss if on_original else None
    if base == "auto":
        choice = choose_base(as_trained.loss, original_loss)
    else:
        losses = {"dequantized": as_trained.loss, "original": original_loss}
        choice = BaseChoice(base, {k: v for k, v in losses.items() if v is not None}, "it was asked for")
    reference = as_trained
    difference = None
    if choice.base == "original":
        assert on_original is not None
        check_original(as_trained.loss, on_original.loss)
        reference = on_original
        difference = compare_logits(as_trained.answers, on_original.answers)

    report = merge(
        run.inputs,
        output,
        dtype=dtype,
        base=choice.base,
        max_shard_bytes=max_shard_bytes,
        verify=lambda directory: verify_merge(
            directory,
            sample.rows,
            reference.answers,
            lambda path: _load_written(path, run),
            sample.forward.loss_path,
            (ROUTED_KL_BOUNDS if as_trained.is_routed else KL_BOUNDS)[dtype],
            progress,
        ),
        provenance={
            "base_model": run.model,
            "adapter": run.trained.source,
            "base_choice": dataclasses.asdict(choice),
            "difference_from_trained": dataclasses.asdict(difference) if difference else None,
        },
        progress=progress,
    )
    return Deployment(report, choice, difference, run.warnings)


def _open_run(run_dir: Path, model: str | None, progress: Progress) -> MergeRun:
    """The run's adapter, and what can be said of the base without reading its weights."""
    trained = read_trained(run_dir)
    settings = trained.config.model
    directory = resolve_model(model or settings.name, None if model else settings.revision, user_cache(), progress)
    config = config_identity(directory.config_json)
    if difference := trained.fingerprint.difference(dataclasses.replace(trained.fingerprint, config=config)):
        raise CheckpointError(
            f"The base {model or settings.name} is not the one this adapter was trained on: {difference}."
        )
    wanted = choose_device(settings.device)
    run = MergeRun(
        trained=trained,
        model=model or settings.name,
        directory=directory,
        tokenizer=load_tokenizer(directory),
        weights=trained_weights(
            directory.path, directory.tensors, trained.fingerprint, trained.adapter.config.fan_in_fan_out
        ),
        device=streaming_device(directory.path, wanted),
        streams=can_stream(directory.path),
    )
    if run.device != wanted:
        run.warnings.append(ON_CPU)
    return run


def _load_written(path: Path, run: MergeRun) -> Any:
    """Load what was merged, in fp32, as the base was loaded."""
    if run.streams:
        return load_streamed_model(path, run.device)
    return load_dense_model(ModelDirectory.open(path), run.device)


def _refuse_early(run: MergeRun, output: Path, dtype: torch.dtype, base: str, progress: Progress) -> None:
    """What can be refused without a pass over all weights: a merge that cannot be made, or another base's embedding."""
    plans = prepare_merge(run.inputs, output, dtype, "original" if base == "original" else "dequantized")[0]
    recorded = [plan.recorded for plan in plans if plan.recorded]
    for done, tensor in enumerate(recorded):
        progress("checking the base", done, len(recorded))
        tensor.check()
