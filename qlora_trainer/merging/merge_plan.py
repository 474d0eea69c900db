"""Plan a merge: match source checkpoint, fingerprint and adapter by name and shape, for each tensor.

All of it is known before a byte is written, so everything that cannot fit is refused first. The source checkpoint's
names and order drive the plan; the model's module paths, which fingerprint and adapter use, are mapped to them exactly
or refused. Left out: models whose tensors transformers fuses or splits while loading.

Legend: O out features, I in features, R rank.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from qlora_trainer.adapters.folds import Fold, MergedTokens
from qlora_trainer.adapters.kinds.table import ADAPTER_KINDS
from qlora_trainer.adapters.peft_format import StoredAdapter
from qlora_trainer.adapters.tokens.new_tokens import changed_tokenizer_files
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
from qlora_trainer.model.tokenizer import TOKENIZER_NAME
from qlora_trainer.weights.listing import checkpoint_name
from qlora_trainer.weights.model_config import vocabulary_corrections
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.reading import same_values
from qlora_trainer.weights.side_files import files_to_copy, refuse_full_disk
from qlora_trainer.weights.tensors import TensorInfo, TensorSpec
from qlora_trainer.weights.turn_files import TOKENIZER_CONFIG, TaughtTurns, turn_files

MergeBase = Literal["dequantized", "original"]
OUTPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_NAMED = 8


@dataclass(frozen=True)
class MergeInputs:
    """Hold what was trained, and on what."""

    base: ModelDirectory  # the checkpoint to merge from
    fingerprint: BaseFingerprint  # of the base as trained
    adapter: StoredAdapter
    new_tokens: tuple[str, ...] = ()  # that the tokenizer was given

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
    tokens: MergedTokens | None = None  # trained rows of the embedding or head
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
        return self._with_files(files, changes).with_new_tokens()

    def with_new_tokens(self) -> Self:
        """Let the merged model's tokenizer have the new tokens of training.

        Returns:
            The plan with the files that change, if any do.
        """
        if not self.inputs.new_tokens:
            return self
        settings = self.changed.get(TOKENIZER_CONFIG)
        files = changed_tokenizer_files(
            self.inputs.base, self.inputs.new_tokens, None if settings is None else json.loads(settings)
        )
        names = " and ".join(map(repr, self.inputs.new_tokens[:_MOST_NAMED]))
        more = len(self.inputs.new_tokens) - _MOST_NAMED
        also = f" and {more} more" if more > 0 else ""
        return self._with_files(files, [f"{TOKENIZER_NAME}: with the new tokens {names}{also}"])

    def _with_files(self, files: Mapping[str, str], changes: Sequence[str]) -> Self:
        copied = [path for path in self.copied if str(path.relative_to(self.inputs.base.path)) not in files]
        changed = {**self.changed, **files}
        return dataclasses.replace(
            self, copied=copied, changed=changed, changes=tuple(dict.fromkeys([*self.changes, *changes]))
        )

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
    corrections = {**config_corrections(base), **_vocabulary(base, tensors)}
    remove_leftovers(output)
    needed = sum(plan.output.nbytes for plan in tensors) + sum(path.stat().st_size for path in copied)
    refuse_full_disk(output, needed, "The merged model")
    has_original = not (base.quant_states or base.facts.is_prequantized)
    plan = MergePlan(inputs, output, dtype, tensors, copied, corrections, has_original)
    return plan.with_new_tokens()


def _plan_tensors(inputs: MergeInputs, dtype: torch.dtype) -> list[TensorPlan]:
    """Match the checkpoint, the fingerprint and the adapter."""
    base = inputs.base
    trained = trained_weights(base, inputs.fingerprint, inputs.is_stored_transposed)
    recorded = dense_tensors(base, inputs.fingerprint)
    inputs.adapter.config.check_tensors(inputs.adapter.tensors, "The adapter")
    folds, biases = _by_stored_name(inputs)
    _refuse_tied(base, folds)
    tokens = _token_rows(inputs)

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
            tokens=tokens.get(name),
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


def _token_rows(inputs: MergeInputs) -> dict[str, MergedTokens]:
    """Return trained rows of embedding and head, by the checkpoint's names; a tied head may be stored again."""
    tensors, stored_as = inputs.base.tensors, inputs.fingerprint.stored_as
    rows = inputs.adapter.config.token_rows(inputs.adapter.tensors)
    found = {name_of(f"{path}.weight", tensors, stored_as, "has trained rows"): tokens for path, tokens in rows.items()}
    if len(found) == 1:
        ((name, tokens),) = found.items()
        found |= {each: tokens for each, info in tensors.items() if each != name and same_values(tensors[name], info)}
    return found


def _vocabulary(base: ModelDirectory, tensors: Sequence[TensorPlan]) -> dict[str, Any]:
    """Return the keys of config.json that say how many rows embedding and head have, where they get more."""
    heights = {plan.output.shape[0] for plan in tensors if plan.tokens}
    assert len(heights) < 2, f"embedding and LM head have one vocabulary, not {sorted(heights)}"
    changed = heights - {base.facts.vocabulary}
    return vocabulary_corrections(base.config_json, base.config(), changed.pop()) if changed else {}


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
    rows = plan.tokens.height(info.shape[0]) if plan.tokens else 0
    return TensorSpec(info.name, dtype, (rows, *info.shape[1:]) if plan.tokens else info.shape)


def _check_shapes(plan: TensorPlan) -> None:
    if plan.tokens is not None and plan.source.shape[1:] != plan.tokens.values.shape[1:]:
        raise MergeError(
            f"The adapter has rows of {plan.tokens.values.shape[1]} numbers for {plan.source.name}, whose shape is "
            f"{plan.source.shape}. It was made for another model."
        )
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
