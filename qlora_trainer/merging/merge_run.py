"""Merge a run directory into a verified model: plan, measure, choose the base, fold, and compare logits.

The trained function, in fp32, gives the reference: logits on sample rows, and the eval loss. Then what was written
is run by plain transformers and must give the same. On the dequantized base the merged model is the trained function,
so the bound is tight. The original base makes another function: its merge is held to the same bound against original
weights + adapter, and how far that is from what was trained is reported, with the eval losses of both; where it is
clearly worse it is refused. The plan is made once, before a weight is read, and handed on.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from qlora_trainer.adapters.kinds.table import adapter_kind
from qlora_trainer.adapters.tokens.new_tokens import run_tokenizer
from qlora_trainer.common.atomic import refuse_existing
from qlora_trainer.common.cache import user_cache
from qlora_trainer.common.errors import CheckpointError, DtypeRangeError, MergeError, memory_errors
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.common.units import dtype_name
from qlora_trainer.merging.fold import MergeReport, merge
from qlora_trainer.merging.llama_cpp import stops_unknown_to_llama_cpp
from qlora_trainer.merging.logits import LogitDifference, Logits, compare_logits
from qlora_trainer.merging.measure import (
    Measured,
    MergeRun,
    SampleRows,
    measure_original,
    measure_rounded,
    measure_trained,
    plan_streaming,
    reference_model,
)
from qlora_trainer.merging.merge_plan import MergeBase, MergeInputs, plan_merge
from qlora_trainer.merging.plain_verification import PlainCheckInputs, verify_by_transformers
from qlora_trainer.merging.streamed_model import load_streamed_model
from qlora_trainer.merging.verify import (
    BaseChoice,
    Verification,
    check_original,
    choose_base,
    verify_merge,
)
from qlora_trainer.model.device import choose_device
from qlora_trainer.model.fingerprint import config_identity
from qlora_trainer.model.load import load_dense_model
from qlora_trainer.model.modules.activation_range import ActivationRange
from qlora_trainer.model.source import resolve_model
from qlora_trainer.runs.directory import read_run_config
from qlora_trainer.runs.trained import newest_adapter, read_trained
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.shard_writer import DEFAULT_SHARD_BYTES

Wanted = Literal["auto", "dequantized", "original"]


@dataclasses.dataclass(frozen=True)
class Deployment:
    """Report what a merge did, and what was measured on the way."""

    report: MergeReport
    choice: BaseChoice
    difference_from_trained: LogitDifference | None  # of the base taken, before rounding; None for the dequantized one
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """Describe the merge in plain JSON values.

        Returns:
            Every field by its name.
        """
        return dataclasses.asdict(self)


def merge_run(
    run_dir: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    base: Wanted = "auto",
    model: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = silent,
) -> Deployment:
    """Merge a run's adapter into its base, verify it, and write it to `output`.

    Args:
        run_dir: the run directory.
        output: a new or empty directory for the merged model.
        dtype: of the merged weights; None: float16, or bfloat16 where float16 has not the range.
        base: what to fold into; auto measures both and takes the better.
        model: another copy of the run's base, such as a prequantized one, to merge from; by default the run's own.
        max_shard_bytes: of a file of weights; a larger tensor has one of its own.
        progress: is called as the merge proceeds.

    Returns:
        What was done and measured.

    Raises:
        QLoRATrainerError: there is no adapter or another base than it was trained on, the merge or its verification
            failed, or the original base was asked for and is clearly worse; nothing was left.
    """
    _refuse_kinds_that_do_not_merge(run_dir)
    refuse_existing(output)
    run = _open_run(run_dir, output, dtype or torch.float16, model, progress)
    with memory_errors(f"Merging {run_dir}", "Free memory and merge again; nothing was written."):
        return _merge_run(run, base, dtype is None, max_shard_bytes, progress)


def _merge_run(
    run: MergeRun, base: Wanted, dtype_is_open: bool, max_shard_bytes: int, progress: Progress
) -> Deployment:
    if base == "original":
        run.plan.refuse_missing_original()
    _check_recorded(run, progress)
    plan_streaming(run, run.device)
    sample, as_trained = measure_trained(run, progress)
    on_original = measure_original(run, sample, base, progress)
    choice = _choose(base, as_trained, on_original)
    reference = as_trained
    difference = None
    if choice.base == "original":
        assert on_original is not None
        check_original(as_trained.loss, on_original.loss)
        reference = on_original
        difference = compare_logits(as_trained.logits, on_original.logits)

    provenance = {
        "base_model": run.model,
        "adapter": run.trained.source,
        "base_choice": dataclasses.asdict(choice),
        "difference_from_trained": dataclasses.asdict(difference) if difference else None,
    }

    def write() -> MergeReport:
        refuse_out_of_range(reference.activations, run.plan.dtype)
        # Weights in fp32 are not rounded.
        is_rounded = run.plan.dtype != torch.float32
        rounded = measure_rounded(run, sample, choice.base, progress) if is_rounded else reference.logits
        return merge(
            run.plan,
            base=choice.base,
            device=run.device,
            max_shard_bytes=max_shard_bytes,
            verify=lambda written: _verify(written, run, sample, reference, rounded, choice.base, progress),
            provenance=provenance,
            progress=progress,
        )

    too_narrow = ""
    try:
        report = write()
    except DtypeRangeError as error:
        if not dtype_is_open:
            raise
        too_narrow = error.reason
    if too_narrow:  # outside the except block, whose traceback would keep the tensors alive
        run.warnings.append(f"The merged model is in bfloat16, as no --dtype was named. {too_narrow}")
        run.plan = run.plan.with_dtype(torch.bfloat16)
        report = write()
    corrected = [
        f"config.json of the merged model says {key}: {value}, as its weights are, and the base's does not."
        for key, value in _changed_values(run.plan.inputs.base.config_json, run.plan.config_corrections)
    ]
    unknown = stops_unknown_to_llama_cpp(run.plan.output, sample.stops)
    return Deployment(report, choice, difference, [*run.warnings, *corrected, *unknown])


def _changed_values(before: Mapping[str, Any], corrections: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys that are other than before, those of a part by the part's name too."""
    for key, value in corrections.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", new) for inner, new in _changed_values(before[key], value))
        elif before.get(key) != value:
            yield key, value


def refuse_out_of_range(seen: ActivationRange, dtype: torch.dtype) -> None:
    """Refuse a dtype that cannot hold a model's activations.

    Args:
        seen: the activations, computed in fp32.
        dtype: of the merged weights, in which others will compute.

    Raises:
        DtypeRangeError: an activation is beyond it.
    """
    limit = torch.finfo(dtype).max
    first, largest = seen.first_beyond(limit), seen.largest()
    if first is None or largest is None or not math.isfinite(largest.value):
        return  # what is not finite in fp32 is found by the comparison of logits
    most = f", and the most {largest}" if largest != first else ""
    raise DtypeRangeError(
        f"In {dtype_name(dtype)}, which ends at {limit:,.0f}, this model's activations do not fit: the first that is "
        f"beyond is {first}{most} (computed in float32, on the rows that are compared)."
    )


def _verify(
    written: ModelDirectory,
    run: MergeRun,
    sample: SampleRows,
    reference: Measured,
    rounded: Logits,
    base: MergeBase,
    progress: Progress,
) -> Verification:
    """Compare logits, then let plain transformers answer prompts."""
    loss_path = sample.forward.loss_path
    load_merged: Callable[[ModelDirectory], Any] = functools.partial(_load_written, run)
    if run.stream is not None:  # it holds no weights, so once is enough
        load_merged = functools.cache(load_merged)
    compared = verify_merge(
        written,
        sample.rows,
        reference.logits,
        rounded,
        load_merged,
        loss_path,
        reference.is_routed,
        progress,
    )
    if not sample.prompts:
        return compared
    inputs = PlainCheckInputs(
        prompts=sample.prompts,
        stops=sorted(sample.stops),
        left_out=sample.left_out,
        max_new_tokens=run.trained.config.evaluation.max_new_tokens,
        loss_path=loss_path,
        decode=run.tokenizer.decode,
        load_reference=lambda: reference_model(run, base, progress),
        load_merged=load_merged,
    )
    agreement = verify_by_transformers(written, inputs, run.device, progress)
    return dataclasses.replace(compared, plain=agreement)


def _refuse_kinds_that_do_not_merge(run_dir: Path) -> None:
    settings = read_run_config(run_dir).adapter
    kind = adapter_kind(settings)
    if not kind.merges:
        raise MergeError(
            f"The adapter of {run_dir} does not merge: {kind.in_words(settings)} (adapter.kind={kind.name}) are no "
            f"change of the base's weights. Deploy it {kind.deployment}: {newest_adapter(run_dir)}"
        )


def _open_run(run_dir: Path, output: Path, dtype: torch.dtype, model: str | None, progress: Progress) -> MergeRun:
    """Read the run's adapter and plan its merge, without reading the base's weights."""
    trained = read_trained(run_dir)
    settings = trained.config.model
    name = model or settings.name
    directory = resolve_model(name, None if model else settings.revision, user_cache(), progress)
    config = config_identity(directory.config_json)
    if difference := trained.fingerprint.difference(dataclasses.replace(trained.fingerprint, config=config)):
        raise CheckpointError(f"The base {name} is not the one this adapter was trained on: {difference}.")
    tokenizer = run_tokenizer(directory, trained.config.adapter)
    new_tokens = (*trained.config.adapter.new_tokens,)
    plan = plan_merge(MergeInputs(directory, trained.fingerprint, trained.adapter, new_tokens), output, dtype)
    return MergeRun(trained, name, plan, tokenizer, choose_device(settings.device), stream=None)


def _check_recorded(run: MergeRun, progress: Progress) -> None:
    """Refuse another base by its dense tensors, such as the embedding, before the passes over all weights."""
    recorded = [tensor.recorded for tensor in run.plan.tensors if tensor.recorded]
    for done, tensor in enumerate(recorded):
        progress("checking the base", done, len(recorded))
        tensor.check()


def _choose(base: Wanted, as_trained: Measured, on_original: Measured | None) -> BaseChoice:
    original_loss = on_original.loss if on_original else None
    if base == "auto":
        return choose_base(as_trained.loss, original_loss)
    losses = {"dequantized": as_trained.loss, "original": original_loss}
    return BaseChoice(base, {k: v for k, v in losses.items() if v is not None}, "it was asked for")


def _load_written(run: MergeRun, directory: ModelDirectory) -> Any:
    """Load what was merged, in fp32, as the base was loaded."""
    load = load_dense_model if run.stream is None else load_streamed_model
    return load(directory, run.device)
