"""Plan a merge: match source checkpoint, fingerprint and adapter by name and shape, for each tensor.

All of it is known before a byte is written, so everything that cannot fit is refused first. The source checkpoint's
names and order drive the plan; the model's module paths, which fingerprint and adapter use, are mapped to them exactly
or refused. Left out: models whose tensors transformers fuses or splits while loading.

Legend: O out features, I in features, R rank.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from qlora_trainer.adapters.folds import Fold
from qlora_trainer.adapters.kinds.table import ADAPTER_KINDS
from qlora_trainer.adapters.peft_format import StoredAdapter
from qlora_trainer.common.atomic import refuse_existing, remove_leftovers
from qlora_trainer.common.errors import MergeError
from qlora_trainer.common.units import dtype_name
from qlora_trainer.merging.trained_weights import (
    RecordedTensor,
    TrainedWeight,
    dense_tensors,
    name_of,
    trained_weights,
)
from qlora_trainer.model.fingerprint import BaseFingerprint
from qlora_trainer.model.load import config_corrections
from qlora_trainer.weights.listing import checkpoint_name
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.side_files import files_to_copy, refuse_full_disk
from qlora_trainer.weights.tensors import TensorInfo, TensorSpec
from qlora_trainer.weights.turn_files import TaughtTurns, turn_files

MergeBase = Literal["dequantized", "original"]
OUTPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class MergeInputs:
    """Hold what was trained, and on what."""

    base: ModelDirectory  # the checkpoint to merge from
    fingerprint: BaseFingerprint  # of the base as trained
    adapter: StoredAdapter

    @property
    def is_stored_transposed(self) -> bool:
        """Return True if the checkpoint stores the adapted weights (I, O), as GPT-2's Conv1D does."""
        return self.adapter.config.is_stored_transposed


@dataclass(frozen=True)
class TensorPlan:
    """Hold what becomes of one tensor of the source checkpoint."""

    source: TensorInfo
    output: TensorSpec
    trained_as: TrainedWeight | None = None  # it was NF4 in training
    recorded: RecordedTensor | None = None  # it was not, and the fingerprint knows it
    fold: Fold | None = None  # what trained next to it
    replacement: Tensor | None = None  # a trained bias
    transposed: bool = False  # stored (I, O)


@dataclass(frozen=True)
class MergePlan:
    """Hold all that a merge will do, but for which of the two bases it folds into; made once, by `plan_merge`."""

    inputs: MergeInputs
    output: Path
    dtype: torch.dtype  # of the merged weights
    tensors: list[TensorPlan]  # in the order of the source checkpoint
    copied: list[Path]  # files of the base that go along as they are
    config_corrections: Mapping[str, Any]  # keys of config.json that the weights contradict, and what is written
    has_original: bool  # the checkpoint holds the weights as they were before they were quantized
    changed: Mapping[str, str] = field(default_factory=dict)  # text of files in place of the base's, by name
    changes: tuple[str, ...] = ()  # a sentence on each of these

    @property
    def trained(self) -> dict[str, TrainedWeight]:
        """Return the weights that were 4-bit in training, by the checkpoint's names."""
        return {plan.source.name: plan.trained_as for plan in self.tensors if plan.trained_as}

    def with_turns(self, taught: TaughtTurns) -> Self:
        """Let the merged model's files say what training taught about turns.

        Args:
            taught: of the run.

        Returns:
            The plan with the files that change.
        """
        files, changes = turn_files(self.inputs.base, taught)
        copied = [path for path in self.copied if str(path.relative_to(self.inputs.base.path)) not in files]
        return dataclasses.replace(self, copied=copied, changed=files, changes=tuple(changes))

    def with_dtype(self, dtype: torch.dtype) -> Self:
        """Write the weights in another dtype.

        Args:
            dtype: one of 16 bits for another of 16 bits, as space was looked for.

        Returns:
            The plan.
        """
        tensors = [
            dataclasses.replace(each, output=dataclasses.replace(each.output, dtype=dtype))
            if each.output.dtype == self.dtype
            else each
            for each in self.tensors
        ]
        return dataclasses.replace(self, dtype=dtype, tensors=tensors)

    def refuse_missing_original(self) -> None:
        """Check that there is an original base to fold into.

        Raises:
            MergeError: the checkpoint is prequantized.
        """
        if not self.has_original:
            raise MergeError(
                f"{self.inputs.base} is prequantized: it holds no original weights to merge into. Merge into the "
                "dequantized base (--base dequantized), which is the function that was trained, or name the 16-bit "
                "checkpoint with --model."
            )


def refuse_unmergeable(adapter: StoredAdapter) -> None:
    """Refuse an adapter that has no place in a weight.

    Args:
        adapter: of any kind.

    Raises:
        MergeError: its kind does not merge.
    """
    kind = adapter.config.kind
    if not ADAPTER_KINDS[kind].merges:
        raise MergeError(
            f"This adapter is of the kind {kind}, which cannot be merged: what it computes is no weight of the base, "
            "and stays in the forward pass. Use it with its base, or train with adapter.kind=lora to merge."
        )


def plan_merge(inputs: MergeInputs, output: Path, dtype: torch.dtype = torch.float16) -> MergePlan:
    """Decide what becomes of each tensor, and refuse a merge that cannot be made; no weight is read for it.

    What a merge to the same place left when it was killed is removed.

    Args:
        inputs: what was trained, and on what; matched by names and shapes.
        output: a new or empty directory for the merged model.
        dtype: of the merged weights.

    Returns:
        The plan, for `merge`.

    Raises:
        MergeError: the inputs do not match, or weights of this dtype cannot be written.
    """
    refuse_existing(output)
    refuse_unmergeable(inputs.adapter)
    if dtype not in OUTPUT_DTYPES:
        raise MergeError(
            f"A merged model cannot be written as {dtype_name(dtype)}; choose float16, bfloat16 or float32. (Rounding "
            "it to the same 4 bits again would erase the adapter.)"
        )
    base = inputs.base
    tensors = _plan_tensors(inputs, dtype)
    copied = files_to_copy(base.path)
    remove_leftovers(output)
    needed = sum(plan.output.nbytes for plan in tensors) + sum(path.stat().st_size for path in copied)
    refuse_full_disk(output, needed, "The merged model")
    has_original = not (base.quant_states or base.facts.is_prequantized)
    return MergePlan(inputs, output, dtype, tensors, copied, config_corrections(base), has_original)


def _plan_tensors(inputs: MergeInputs, dtype: torch.dtype) -> list[TensorPlan]:
    """Match the checkpoint, the fingerprint and the adapter."""
    base = inputs.base
    trained = trained_weights(base, inputs.fingerprint, inputs.is_stored_transposed)
    recorded = dense_tensors(base, inputs.fingerprint)
    inputs.adapter.config.check_tensors(inputs.adapter.tensors, "The adapter")
    folds, biases = _by_stored_name(inputs)
    _refuse_tied(base, folds)

    belongs_to_weight = {info.name for keys in base.quant_states.values() for info in keys.values()}
    plans = []
    for name, info in base.tensors.items():
        if name in belongs_to_weight:
            continue
        plan = TensorPlan(
            source=info,
            output=info,
            trained_as=trained.get(name),
            recorded=recorded.get(name),
            fold=folds.get(name),
            replacement=biases.get(name),
            transposed=inputs.is_stored_transposed and (name in trained or name in folds) and len(info.shape) > 1,
        )
        plans.append(dataclasses.replace(plan, output=_output_spec(plan, dtype)))
        _check_shapes(plans[-1])
    return plans


def _by_stored_name(inputs: MergeInputs) -> tuple[dict[str, Fold], dict[str, Tensor]]:
    """Return what becomes of the adapted weights, and the trained biases, by the checkpoint's names."""
    tensors, stored_as = inputs.base.tensors, inputs.fingerprint.stored_as
    config, trained = inputs.adapter.config, inputs.adapter.tensors
    folds = {
        name_of(f"{path}.weight", tensors, stored_as, "has an adapter"): fold
        for path, fold in config.folds(trained).items()
    }
    biases = {
        name_of(f"{path}.bias", tensors, stored_as, "was trained"): bias
        for path, bias in config.biases(trained).items()
    }
    for path, fold in config.bias_folds(trained).items():
        if name := checkpoint_name(stored_as.get(f"{path}.bias", f"{path}.bias"), tensors):
            folds[name] = fold
    return folds, biases


def _refuse_tied(base: ModelDirectory, folds: Mapping[str, object]) -> None:
    """Refuse an adapter on one of two tied weights: once folded, it would be read by both."""
    embeddings = {"embed_tokens", "wte", "embed_in", "word_embeddings", "lm_head", "embed_out"}
    touched = [name for name in folds if name.split(".")[-2] in embeddings]
    if touched and base.config_json.get("tie_word_embeddings", True):
        raise MergeError(
            f"The adapter changes {touched[0]}, which this model ties to another tensor: merged, both would change. "
            "Use the adapter next to its base instead."
        )


def _output_spec(plan: TensorPlan, dtype: torch.dtype) -> TensorSpec:
    info = plan.source
    if plan.trained_as:
        return TensorSpec(info.name, dtype, plan.trained_as.stored_shape)
    if not info.dtype.is_floating_point:
        return TensorSpec(info.name, info.dtype, info.shape)
    if info.dtype.itemsize == 1:
        raise MergeError(
            f"{info.name} is stored as {dtype_name(info.dtype)}, an 8-bit quantization this merge does not know. "
            "Convert the base to 16 bits first."
        )
    return TensorSpec(info.name, dtype, info.shape)


def _check_shapes(plan: TensorPlan) -> None:
    shape = plan.output.shape[::-1] if plan.transposed else plan.output.shape  # (O, I) of a weight
    if plan.fold is not None and not plan.fold.fits(shape):
        raise MergeError(
            f"The adapter of {plan.source.name} does not fit the base's, which has the shape {shape}. It was made for "
            "another model."
        )
    if plan.replacement is not None and shape != plan.replacement.shape:
        raise MergeError(
            f"The adapter's {plan.source.name} has shape {tuple(plan.replacement.shape)}, the base's {shape}. It was "
            "made for another model."
        )
