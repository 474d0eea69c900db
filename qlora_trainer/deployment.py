"""From a run directory to a merged, verified model: choose the base, merge, and compare answers.

The trained model, computing in fp32, gives the reference: logits on sample rows, and the held-out loss. Then it is
dropped, and what was written is run by plain transformers and must give the same. On the dequantised base the merged
model is the trained function, so the bound is tight. The original base makes another function: its merge is held to
the same bound against original weights + adapter, and how far that is from what was trained is reported, with the
held-out losses of both; where it is clearly worse it is refused.

Dense fp32 models are never whole in memory: each pass reads their weights from disk, so there are few passes, of many
tokens. Where the GPU is too small for the fp32 reference, all is measured on the CPU.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qlora_trainer.adapters.inject import add_adapters, load_adapter_state
from qlora_trainer.data.packing import Example, make_packs
from qlora_trainer.data.preparation import ExampleSet
from qlora_trainer.directories import refuse_existing
from qlora_trainer.errors import DataError, FileMissingError, InsufficientMemoryError, MergeError, first_line
from qlora_trainer.evaluation import heldout_loss
from qlora_trainer.forward import ForwardPlan, examine_forward, logits
from qlora_trainer.merge_plan import MergeInputs
from qlora_trainer.merge_verification import (
    KL_BOUNDS,
    BaseChoice,
    LogitDifference,
    check_original,
    choose_base,
    compare_logits,
    row_logits,
    verify_merge,
)
from qlora_trainer.merging import MergeReport, merge
from qlora_trainer.model import give_back_memory
from qlora_trainer.model_source import is_prequantized
from qlora_trainer.progress import Progress, silent
from qlora_trainer.streamed_model import check_streaming, load_streamed_model, resident
from qlora_trainer.trained import Trained, open_trained, prepare_trained
from qlora_trainer.training import micro_batch_tokens

SAMPLE_ROWS = 8
SAMPLE_TOKENS = 64  # of each row: logits are kept, (tokens, vocabulary) in fp32
STREAMED_TOKENS = 4096  # of a pass that reads all weights
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
class _Sample:
    """What models are measured on."""

    rows: list[list[int]]  # tokens to compare logits on
    heldout: ExampleSet | None
    forward: ForwardPlan
    notices: list[str]


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
        MergeError: the merge or its verification failed, or the original base was asked for and is clearly worse;
            nothing was left.
        OutputExistsError, DiskError, CheckpointError, InsufficientMemoryError: as named.
    """
    refuse_existing(output)
    trained, sample, as_trained = _measure_trained(run_dir, progress)
    trained.base.model = None  # the others need its place
    give_back_memory()
    device = trained.base.device
    check_streaming(trained.base.directory, device)

    on_original: _Measured | None = None
    if base != "dequantized":
        try:
            on_original = _measure_original(trained, sample, progress, required=base == "original")
        except torch.OutOfMemoryError as error:
            if base == "original":
                raise InsufficientMemoryError(
                    f"Measuring the original base ran out of memory on {device} ({first_line(error)}). Free memory "
                    "there, or merge with --base dequantized."
                ) from error
            sample.notices.append(f"The original base was not measured: {first_line(error)}")
    give_back_memory()
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
        difference = compare_logits(as_trained.logits, on_original.logits)

    report = merge(
        MergeInputs.from_adapter(trained.base.directory, trained.fingerprint, trained.adapter, device),
        output,
        dtype=dtype,
        base=choice.base,
        verify=lambda directory: verify_merge(
            directory,
            sample.rows,
            reference.logits,
            lambda path: load_streamed_model(path, device),
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
    return Deployment(report, choice, difference, sample.notices)


def _measure_trained(run_dir: Path, progress: Progress) -> tuple[Trained, _Sample, _Measured]:
    """The run's model in fp32, and its answers; on the CPU where the GPU it was trained on in 16 bits is too small."""
    if torch.cuda.is_available():
        with contextlib.suppress(InsufficientMemoryError, torch.OutOfMemoryError):
            return _measure_trained_on(None, run_dir, progress)
        give_back_memory()
        trained, sample, measured = _measure_trained_on("cpu", run_dir, progress)
        sample.notices.append("The GPU has too little memory for measuring in fp32, so the merge ran on the CPU.")
        return trained, sample, measured
    return _measure_trained_on(None, run_dir, progress)


def _measure_trained_on(device: str | None, run_dir: Path, progress: Progress) -> tuple[Trained, _Sample, _Measured]:
    # With the base's own output head, which the merged model has, not with the approximation it was trained by.
    trained = open_trained(
        run_dir, progress=progress, device=device, compute_dtype="float32", output_head="dense", embeddings="device"
    )
    sample = _sample(trained, progress)
    measured = _measure(trained.base.model, sample, micro_batch_tokens(trained.config), progress)
    return trained, sample, measured


def _sample(trained: Trained, progress: Progress) -> _Sample:
    """Held-out rows to measure on; token rows to compare on: held-out ones, else training's, else fixed sentences."""
    forward = examine_forward(trained.base.model)
    try:
        prepared = prepare_trained(trained, progress)
    except (DataError, FileMissingError) as error:
        rows = [trained.tokenizer(text)["input_ids"] for text in FALLBACK_SAMPLES]
        told = f"The run's data could not be read, so nothing was measured on held-out rows. {error}"
        return _Sample(rows, None, forward, [told])
    examples: ExampleSet = prepared.heldout if len(prepared.heldout) else prepared.train
    rows = [examples[index].input_ids[:SAMPLE_TOKENS] for index in range(min(SAMPLE_ROWS, len(examples)))]
    if not len(prepared.heldout):
        told = "The run has no held-out rows, so the two bases could not be measured against each other."
        return _Sample(rows, None, forward, [*trained.notices, told])
    return _Sample(rows, prepared.heldout, forward, [*trained.notices])


def _measure_original(trained: Trained, sample: _Sample, progress: Progress, *, required: bool) -> _Measured | None:
    """Original weights + adapter, or None where there are no originals, or nothing to choose by."""
    if is_prequantized(trained.base.directory):
        if required:
            raise MergeError(
                f"{trained.base.directory} is prequantised: it holds no original weights to merge into. Merge into the "
                "dequantised base (--base dequantized), which is the function that was trained."
            )
        return None
    if sample.heldout is None and not required:
        return None
    model = load_streamed_model(trained.base.directory, trained.base.device)
    add_adapters(model, trained.config.adapter, trained.config.training.seed)
    load_adapter_state(model, trained.adapter.tensors)
    # Whole logits of a large pack would take more memory than the weights.
    least = 0 if sample.forward.loss_path.own_logits else STREAMED_TOKENS
    return _measure(model, sample, max(micro_batch_tokens(trained.config), least), progress)


@torch.no_grad()
def _measure(model: Any, sample: _Sample, most_tokens: int, progress: Progress) -> _Measured:
    """In one pass over the sample rows, by the training forward, and one for each pack of held-out rows."""
    model.eval()
    if sample.forward.can_pack:
        lengths = [len(row) for row in sample.rows]
        (pack,) = make_packs([Example(row, row) for row in sample.rows], sum(lengths), packing=True)
        device = next(model.parameters()).device
        found = list(logits(model, pack.to(device)).float().cpu().split(lengths, dim=1))
    else:
        found = row_logits(model, sample.rows)
    if sample.heldout is None:
        return _Measured(found, None)
    with resident(model.get_output_embeddings()):  # the loss multiplies by its weight
        return _Measured(found, heldout_loss(model, sample.heldout, sample.forward, most_tokens, progress))
