"""From a run directory to a merged, verified model: choose the base, merge, and compare answers.

The trained model, computing in fp32, gives the reference: logits on sample rows, and the held-out loss. Then it is
dropped, and what was written is loaded in plain transformers and must give the same. On the dequantised base the
merged model is the trained function, so the bound is tight. The original base makes another function: its merge is
held to the same bound against original weights + adapter, and how far that is from what was trained is reported, with
the held-out losses of both.
"""

import dataclasses
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qlora_trainer.adapters.delta import lora_scaling
from qlora_trainer.adapters.inject import add_adapters, load_adapter_state
from qlora_trainer.data.packing import Example, make_packs
from qlora_trainer.data.preparation import ExampleSet
from qlora_trainer.directories import refuse_existing
from qlora_trainer.errors import DataError, FileMissingError, InsufficientMemoryError, MergeError
from qlora_trainer.evaluation import heldout_loss
from qlora_trainer.forward import examine_forward, logits
from qlora_trainer.merge_plan import MergeInputs
from qlora_trainer.merge_verification import (
    KL_BOUNDS,
    BaseChoice,
    LogitDifference,
    choose_base,
    compare_logits,
    verify_merge,
)
from qlora_trainer.merging import MergeReport, merge
from qlora_trainer.model import is_prequantized, load_dense_model
from qlora_trainer.progress import Progress, silent
from qlora_trainer.run_directory import prepare_data
from qlora_trainer.trained import Trained, open_trained
from qlora_trainer.training import micro_batch_tokens

SAMPLE_ROWS = 8
SAMPLE_TOKENS = 64  # of each row: logits are kept, (tokens, vocabulary) in fp32
FALLBACK_SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "To make bread, mix flour, water, salt and yeast, and let the dough rest.",
    "In 1905 a clerk in Bern wrote four papers that changed physics.",
)


@dataclasses.dataclass(frozen=True)
class Deployment:
    """What a merge did, and what was measured on the way."""

    report: MergeReport
    choice: BaseChoice
    difference_from_trained: LogitDifference | None  # of the base taken, before rounding; None for the dequantised one
    notices: list[str]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class _Measured:
    """A model's answers: logits (1, T, V) fp32 for each sample row, and its held-out loss."""

    logits: list[Tensor]
    loss: float | None


def merge_run(
    run_dir: Path,
    output: Path,
    *,
    dtype: torch.dtype = torch.float16,
    base: Literal["auto", "dequantized", "original"] = "auto",
    progress: Progress = silent,
) -> Deployment:
    """Merge a run's adapter into its base, verify it, and write it to `output`, a new or empty directory.

    Raises:
        MergeError: the merge or its verification failed; nothing was left.
        OutputExistsError, DiskError, CheckpointError, InsufficientMemoryError: as named.
    """
    refuse_existing(output)
    trained = open_trained(run_dir, compute_dtype="float32", progress=progress)
    heldout, rows, notices = _sample(trained, progress)
    as_trained = _measure(trained.base.model, trained, heldout, rows, progress)
    inputs = _inputs(trained)
    trained.base.model = None  # the original weights need its place
    gc.collect()

    on_original: _Measured | None = None
    if base != "dequantized":
        try:
            on_original = _measure_original(trained, heldout, rows, progress, required=base == "original")
        except InsufficientMemoryError as error:
            if base == "original":
                raise
            notices.append(f"The original base was not measured: {error}")
    if base == "auto":
        choice = choose_base(as_trained.loss, on_original.loss if on_original else None)
    else:
        losses = {"dequantized": as_trained.loss, "original": on_original.loss if on_original else None}
        choice = BaseChoice(base, {k: v for k, v in losses.items() if v is not None}, "it was asked for")
    reference = on_original if choice.base == "original" else as_trained
    assert reference is not None
    difference = compare_logits(as_trained.logits, reference.logits) if choice.base == "original" else None

    report = merge(
        inputs,
        output,
        dtype=dtype,
        base=choice.base,
        verify=lambda directory: verify_merge(
            directory,
            rows,
            reference.logits,
            lambda path: load_dense_model(path, trained.base.device),
            KL_BOUNDS[dtype],
            progress,
        ),
        provenance={
            "base_model": trained.config.model.name,
            "adapter": trained.source,
            "base_choice": dataclasses.asdict(choice),
            "difference_from_trained": dataclasses.asdict(difference) if difference else None,
        },
        progress=progress,
    )
    return Deployment(report, choice, difference, notices)


def _inputs(trained: Trained) -> MergeInputs:
    settings = trained.adapter.config
    return MergeInputs(
        base=trained.base.directory,
        fingerprint=trained.fingerprint,
        adapter=trained.adapter.tensors,
        scaling=lora_scaling(settings.r, settings.lora_alpha, settings.use_rslora),
        fan_in_fan_out=settings.fan_in_fan_out,
        device=trained.base.device,
    )


def _sample(trained: Trained, progress: Progress) -> tuple[ExampleSet | None, list[list[int]], list[str]]:
    """Held-out rows to measure on; token rows to compare on: held-out ones, else training's, else fixed sentences."""
    try:
        prepared = prepare_data(trained.config, trained.tokenizer, trained.base.directory, progress)
    except (DataError, FileMissingError) as error:
        rows = [trained.tokenizer(text)["input_ids"] for text in FALLBACK_SAMPLES]
        return None, rows, [f"The run's data could not be read, so nothing was measured on held-out rows. {error}"]
    examples: ExampleSet = prepared.heldout if len(prepared.heldout) else prepared.train
    rows = [examples[index].input_ids[:SAMPLE_TOKENS] for index in range(min(SAMPLE_ROWS, len(examples)))]
    if not len(prepared.heldout):
        return None, rows, ["The run has no held-out rows, so the two bases could not be measured against each other."]
    return prepared.heldout, rows, []


def _measure_original(
    trained: Trained, heldout: ExampleSet | None, rows: Sequence[list[int]], progress: Progress, *, required: bool
) -> _Measured | None:
    """Original weights + adapter, or None where there are no originals, or nothing to choose by."""
    if is_prequantized(trained.base.directory):
        if required:
            raise MergeError(
                f"{trained.base.directory} is prequantised: it holds no original weights to merge into. Merge into the "
                "dequantised base (--base dequantized), which is the function that was trained."
            )
        return None
    if heldout is None and not required:
        return None
    model = load_dense_model(trained.base.directory, trained.base.device)
    add_adapters(model, trained.config.adapter, trained.config.training.seed)
    load_adapter_state(model, trained.adapter.tensors)
    return _measure(model, trained, heldout, rows, progress)


@torch.no_grad()
def _measure(
    model: Any, trained: Trained, heldout: ExampleSet | None, rows: Sequence[list[int]], progress: Progress
) -> _Measured:
    forward = examine_forward(model)
    model.eval()
    device = next(model.parameters()).device
    kept = []
    for row in rows:
        pack = make_packs([Example(row, row)], len(row), forward.can_pack)[0]
        kept.append(logits(model, pack.to(device)).float().cpu())
    loss = heldout_loss(model, heldout, forward, micro_batch_tokens(trained.config), progress) if heldout else None
    return _Measured(kept, loss)
