"""From a run directory to a merged, verified model: choose the base, merge, and compare answers.

The trained function, in fp32, gives the reference: logits on sample rows, and the held-out loss. Then what was written
is run by plain transformers and must give the same. On the dequantised base the merged model is the trained function,
so the bound is tight. The original base makes another function: its merge is held to the same bound against original
weights + adapter, and how far that is from what was trained is reported, with the held-out losses of both; where it is
clearly worse it is refused.

No model is ever whole in memory, neither 4-bit nor dense: each pass reads the weights from disk (streamed_model.py), so
there are few passes, of many tokens. What is kept of a model's answers is what its output head takes. So memory is that
of the largest matrix in fp32, twice, and of the activations of a pass, whatever the number of layers and the size of
the vocabulary. Models whose tensors transformers renames or fuses while loading are the exception, and those whose code
takes weights without calling their modules: they are loaded whole, where there is room. Where the GPU is too small, all
is measured on the CPU.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch

from qlora_trainer.adapters.inject import add_adapters, load_adapter_state
from qlora_trainer.data.packing import Example, make_packs
from qlora_trainer.data.preparation import ExampleSet
from qlora_trainer.directories import refuse_existing
from qlora_trainer.errors import (
    CheckpointError,
    DataError,
    FileMissingError,
    InsufficientMemoryError,
    MergeError,
    first_line,
    memory_errors,
)
from qlora_trainer.evaluation import heldout_loss
from qlora_trainer.experts import has_experts
from qlora_trainer.fingerprint import config_identity
from qlora_trainer.forward import ForwardPlan, examine_forward, hidden_states, logits
from qlora_trainer.logit_comparison import Answers, LogitDifference, WholeAnswers, compare_logits
from qlora_trainer.merge_plan import MergeBase, MergeInputs, read_config
from qlora_trainer.merge_verification import (
    KL_BOUNDS,
    ROUTED_KL_BOUNDS,
    BaseChoice,
    check_original,
    choose_base,
    head_answers,
    row_answers,
    verify_merge,
)
from qlora_trainer.merging import MergeReport, merge, prepare_merge
from qlora_trainer.model import choose_device, give_back_memory, load_base_model, load_dense_model
from qlora_trainer.model_source import is_prequantized, load_tokenizer, resolve_model
from qlora_trainer.progress import Progress, silent
from qlora_trainer.run_directory import user_cache
from qlora_trainer.shard_writer import DEFAULT_SHARD_BYTES
from qlora_trainer.skeleton import layer_kinds
from qlora_trainer.streamed_model import can_stream, gives_answers, load_streamed_model, streaming_device
from qlora_trainer.tensor_io import checkpoint_tensors
from qlora_trainer.trained import TrainedAdapter, prepare_trained, read_trained
from qlora_trainer.training import micro_batch_tokens
from qlora_trainer.weights_as_trained import TrainedWeight, trained_weights

SAMPLE_ROWS = 8
SAMPLE_TOKENS = 64  # of each row
STREAMED_TOKENS = 4096  # of a pass that reads all weights
FALLBACK_SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "To make bread, mix flour, water, salt and yeast, and let the dough rest.",
    "In 1905 a clerk in Bern wrote four papers that changed physics.",
)


_ON_CPU = "The GPU has too little memory for measuring in fp32, so the merge ran on the CPU."


@dataclasses.dataclass(frozen=True)
class Deployment:
    """What a merge did, and what was measured on the way."""

    report: MergeReport
    choice: BaseChoice
    difference_from_trained: LogitDifference | None  # of the base taken, before rounding; None for the dequantised one
    notices: list[str]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass
class _Run:
    """A trained adapter, and the base it is merged into."""

    trained: TrainedAdapter
    model: str  # what the base is called
    directory: Path
    tokenizer: Any
    weights: dict[str, TrainedWeight]  # that were 4-bit, by the checkpoint's names
    device: torch.device
    streams: bool  # its passes read the weights as they go; else the model is loaded whole
    notices: list[str] = dataclasses.field(default_factory=list)

    @property
    def inputs(self) -> MergeInputs:
        return MergeInputs.from_adapter(self.directory, self.trained.fingerprint, self.trained.adapter, self.device)


@dataclasses.dataclass(frozen=True)
class _Sample:
    """What models are measured on."""

    rows: list[list[int]]  # tokens to compare logits on
    heldout: ExampleSet | None
    forward: ForwardPlan


@dataclasses.dataclass(frozen=True)
class _Measured:
    """A model's answers at every token of the sample rows, its held-out loss, and whether it has experts."""

    answers: Answers
    loss: float | None
    is_routed: bool


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
        model: another copy of the run's base, such as a prequantised one, to merge from; by default the run's own.
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
    run: _Run,
    output: Path,
    dtype: torch.dtype,
    base: Literal["auto", "dequantized", "original"],
    max_shard_bytes: int,
    progress: Progress,
) -> Deployment:
    if base == "original" and is_prequantized(run.directory):
        raise MergeError(
            f"{run.directory} is prequantised: it holds no original weights to merge into. Merge into the dequantised "
            "base (--base dequantized), which is the function that was trained."
        )
    _refuse_early(run, output, dtype, base, progress)
    sample, as_trained = _measure_trained(run, progress)
    on_original = _measure_original(run, sample, base, progress)
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
            lambda path: load_streamed_model(path, run.device) if run.streams else load_dense_model(path, run.device),
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
    return Deployment(report, choice, difference, run.notices)


def _open_run(run_dir: Path, model: str | None, progress: Progress) -> _Run:
    """The run's adapter, and what can be said of the base without reading its weights."""
    trained = read_trained(run_dir)
    settings = trained.config.model
    directory = resolve_model(model or settings.name, None if model else settings.revision, user_cache(), progress)
    config = config_identity(read_config(directory))
    if difference := trained.fingerprint.difference(dataclasses.replace(trained.fingerprint, config=config)):
        raise CheckpointError(
            f"The base {model or settings.name} is not the one this adapter was trained on: {difference}."
        )
    wanted = choose_device(settings.device)
    run = _Run(
        trained=trained,
        model=model or settings.name,
        directory=directory,
        tokenizer=load_tokenizer(directory),
        weights=trained_weights(
            directory, checkpoint_tensors(directory), trained.fingerprint, trained.adapter.config.fan_in_fan_out
        ),
        device=streaming_device(directory, wanted),
        streams=can_stream(directory),
    )
    if run.device != wanted:
        run.notices.append(_ON_CPU)
    return run


def _refuse_early(run: _Run, output: Path, dtype: torch.dtype, base: str, progress: Progress) -> None:
    """What can be refused without a pass over all weights: a merge that cannot be made, or another base's embedding."""
    plans = prepare_merge(run.inputs, output, dtype, "original" if base == "original" else "dequantized")[0]
    recorded = [plan.recorded for plan in plans if plan.recorded]
    for done, tensor in enumerate(recorded):
        progress("checking the base", done, len(recorded))
        tensor.check()


def _measure_trained(run: _Run, progress: Progress) -> tuple[_Sample, _Measured]:
    """What to measure on, and the trained function's answers; on the CPU where a GPU turns out to be too small."""
    told = len(run.notices)
    try:
        return _measure_trained_here(run, progress)
    except (torch.OutOfMemoryError, InsufficientMemoryError):
        if run.device.type == "cpu":
            raise
    give_back_memory()
    run.device = torch.device("cpu")
    run.notices[told:] = [_ON_CPU]  # what was told since will be told again
    return _measure_trained_here(run, progress)


def _measure_trained_here(run: _Run, progress: Progress) -> tuple[_Sample, _Measured]:
    sample = _sample(run, progress)
    measured = _measure(_with_adapter(run, "dequantized", progress), run, sample, progress)
    give_back_memory()
    return sample, measured


def _measure_original(run: _Run, sample: _Sample, base: str, progress: Progress) -> _Measured | None:
    """Original weights + adapter, or None where there are no originals, or nothing to choose by."""
    required = base == "original"
    if base == "dequantized" or is_prequantized(run.directory) or (sample.heldout is None and not required):
        return None
    try:
        return _measure(_with_adapter(run, "original", progress), run, sample, progress)
    except torch.OutOfMemoryError as error:
        if required:
            raise InsufficientMemoryError(
                f"Measuring the original base ran out of memory on {run.device} ({first_line(error)}). Free memory "
                "there, or merge with --base dequantized."
            ) from error
        run.notices.append(f"The original base was not measured: {first_line(error)}")
        return None
    finally:
        give_back_memory()


def _sample(run: _Run, progress: Progress) -> _Sample:
    """Held-out rows to measure on; token rows to compare on: held-out ones, else training's, else fixed sentences."""
    forward = _examine_forward(run, progress)
    try:
        prepared, told = prepare_trained(run.trained, run.tokenizer, run.directory, progress)
    except (DataError, FileMissingError) as error:
        run.notices.append(f"The run's data could not be read, so nothing was measured on held-out rows. {error}")
        return _Sample([run.tokenizer(text)["input_ids"] for text in FALLBACK_SAMPLES], None, forward)
    run.notices += told
    examples: ExampleSet = prepared.heldout if len(prepared.heldout) else prepared.train
    rows = [examples[index].input_ids[:SAMPLE_TOKENS] for index in range(min(SAMPLE_ROWS, len(examples)))]
    if not len(prepared.heldout):
        run.notices.append("The run has no held-out rows, so the two bases could not be measured against each other.")
        return _Sample(rows, None, forward)
    return _Sample(rows, prepared.heldout, forward)


def _examine_forward(run: _Run, progress: Progress) -> ForwardPlan:
    """By the first layers of each kind, which tell as much of packing and of the logits as all would."""
    kinds = layer_kinds(run.directory)
    layers = 1 + max(kinds.index(kind) for kind in set(kinds))
    progress("examining the model", 0, None)
    model = _load(run, "dequantized", progress, layers)
    if run.streams and not gives_answers(model):
        run.streams = False
        model = _load(run, "dequantized", progress)
    return examine_forward(model)


def _with_adapter(run: _Run, base: MergeBase, progress: Progress) -> Any:
    model = _load(run, base, progress)
    add_adapters(model, run.trained.config.adapter, run.trained.config.training.seed)
    load_adapter_state(model, run.trained.adapter.tensors)
    return model.eval()


def _load(run: _Run, base: MergeBase, progress: Progress, layers: int | None = None) -> Any:
    """The base in fp32, as it was trained or as its checkpoint has it; `layers` of it, where it can be streamed."""
    if run.streams:
        weights = run.weights if base == "dequantized" else None
        return load_streamed_model(run.directory, run.device, weights, layers=layers)
    if base == "original":
        return load_dense_model(run.directory, run.device)
    # With the base's own output head, which the merged model has, not with the approximation it was trained by.
    settings = run.trained.config.model.model_copy(
        update={
            "device": run.device.type,
            "compute_dtype": "float32",
            "output_head": "dense",
            "embeddings": "device",
        }
    )
    loaded = load_base_model(run.directory, settings, progress)
    if difference := run.trained.fingerprint.difference(loaded.fingerprint):
        raise CheckpointError(f"The base {run.model} is not the one this adapter was trained on: {difference}.")
    return loaded.model


@torch.no_grad()
def _measure(model: Any, run: _Run, sample: _Sample, progress: Progress) -> _Measured:
    """In one pass over the sample rows, by the training forward, and one for each pack of held-out rows."""
    progress("measuring answers", 0, None)
    answers, is_routed = _answers(model, sample), has_experts(model)
    if sample.heldout is None:
        return _Measured(answers, None, is_routed)
    # Whole logits of a large pack would take more memory than the weights.
    least = 0 if sample.forward.loss_path.own_logits else STREAMED_TOKENS
    most_tokens = max(micro_batch_tokens(run.trained.config), least)
    loss = heldout_loss(model, sample.heldout, sample.forward, most_tokens, progress)
    return _Measured(answers, loss, is_routed)


def _answers(model: Any, sample: _Sample) -> Answers:
    loss_path = sample.forward.loss_path
    if not sample.forward.can_pack:
        return row_answers(model, sample.rows, loss_path)
    examples = [Example(row, row) for row in sample.rows]
    (pack,) = make_packs(examples, sum(map(len, sample.rows)), packing=True)
    pack = pack.to(next(model.parameters()).device)
    if loss_path.own_logits:
        return WholeAnswers.of_rows([logits(model, pack).float()])
    return head_answers(model, hidden_states(model, pack)[0], loss_path)
