"""Measure base + adapter for a merge: logits on sample rows and eval loss, on both bases, in fp32.

No model is ever whole in memory, neither 4-bit nor dense: each pass reads the weights from disk (streamed_model.py), so
there are few passes, of many tokens. What is kept of a model's logits is what its LM head takes. So memory is that of
the largest matrix in fp32, twice, and of the activations of a pass, whatever the number of layers and the size of the
vocabulary. One model of the base is made, empty, and measured on both bases; another of its first layers says how the
forward goes, for which all weights would be read several times. Models whose tensors transformers renames or fuses
while loading are the exception, and those whose code takes weights without calling their modules: they are loaded
whole, where there is space. Where the GPU is too small, all is measured on the CPU.
"""

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from qlora_trainer.adapters.inject import add_adapters, load_adapter_state
from qlora_trainer.adapters.tokens.put_tokens import check_token_ids
from qlora_trainer.common.cache import user_cache
from qlora_trainer.common.errors import (
    CheckpointError,
    DataError,
    FileMissingError,
    InsufficientMemoryError,
    first_line,
)
from qlora_trainer.common.progress import Progress
from qlora_trainer.data.batching.loader import micro_batch_tokens
from qlora_trainer.data.batching.packing import make_packs
from qlora_trainer.data.preparation.prepare import ExampleSet
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.data.types import Example
from qlora_trainer.merging.check_prompts import CheckPrompt, asked_tokenizer, choose_prompts, fallback_prompts
from qlora_trainer.merging.logits import Logits, WholeLogits
from qlora_trainer.merging.merge_plan import MergeBase, MergePlan
from qlora_trainer.merging.rounding import rounded_head, rounded_weights
from qlora_trainer.merging.stream_plan import StreamPlan, plan_stream
from qlora_trainer.merging.streamed_model import (
    fill_model,
    has_finite_logits,
    load_streamed_model,
    read_original_weights,
    read_trained_weights,
)
from qlora_trainer.merging.trained_weights import with_offset
from qlora_trainer.merging.verify import logits_of_hidden, row_logits
from qlora_trainer.model.device import give_back_memory
from qlora_trainer.model.forward import ForwardPlan, examine_forward, hidden_states, logits
from qlora_trainer.model.load import load_base_model, load_dense_model
from qlora_trainer.model.modules.activation_range import ActivationRange, watched_activations
from qlora_trainer.model.modules.experts import has_experts
from qlora_trainer.runs.directory import run_renderer
from qlora_trainer.runs.trained import TrainedAdapter, prepare_trained
from qlora_trainer.runs.turns import taught_turns
from qlora_trainer.training.evaluation import eval_loss
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.turn_files import CHAT_TEMPLATE

SAMPLE_ROWS = 8
SAMPLE_TOKENS = 64  # of each row
STREAMED_TOKENS = 4096  # of a pass that reads all weights
FALLBACK_SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "To make bread, mix flour, water, salt and yeast, and let the dough rest.",
    "In 1905 a clerk in Bern wrote four papers that changed physics.",
)


ON_CPU = "The GPU has too little memory for measuring in fp32, so the merge ran on the CPU."


@dataclasses.dataclass
class MergeRun:
    """Hold a trained adapter, and the plan of its merge."""

    trained: TrainedAdapter
    model: str  # what the base is called
    plan: MergePlan
    tokenizer: Any
    device: torch.device
    stream: StreamPlan | None  # of the base, whose passes read its weights; None: it is loaded whole
    warnings: list[str] = dataclasses.field(default_factory=list)

    @property
    def base(self) -> ModelDirectory:
        """Return the checkpoint to merge from."""
        return self.plan.inputs.base


@dataclasses.dataclass(frozen=True)
class SampleRows:
    """Hold what models are measured on."""

    rows: list[list[int]]  # tokens to compare logits on
    eval: ExampleSet | None
    forward: ForwardPlan
    prompts: list[CheckPrompt]  # for plain transformers to answer
    left_out: int  # rows whose prompts spell a control token
    stops: Mapping[int, str]  # tokens that end an answer: id and text


@dataclasses.dataclass(frozen=True)
class Measured:
    """Hold a model's logits at every token of the sample rows, its eval loss, and its activations' range on both."""

    logits: Logits
    loss: float | None
    is_routed: bool  # it has experts
    activations: ActivationRange


def plan_streaming(run: MergeRun, device: torch.device) -> None:
    """Take a device with enough memory for measuring the run, and plan its base to be streamed where it can be.

    Args:
        run: gets the device, the plan and, where a GPU has too little memory, a warning.
        device: to measure on, where it has enough memory.
    """
    found = plan_stream(run.base, device, run.plan.trained)
    run.device = found.device
    run.stream = found if found.sources is not None else None
    if found.device != device:
        run.warnings.append(ON_CPU)


def measure_trained(run: MergeRun, progress: Progress) -> tuple[SampleRows, Measured]:
    """Measure the trained function; on the CPU where a GPU turns out to be too small.

    Args:
        run: what is merged; its streamed base has its adapter afterward.
        progress: is called as rows are measured.

    Returns:
        What was measured on, and the measurement.

    Raises:
        OutOfMemoryError: the CPU is too small too.
        InsufficientMemoryError: as said there, before memory ran out.
    """
    reported = len(run.warnings)
    try:
        return _measure_trained_here(run, progress)
    except (torch.OutOfMemoryError, InsufficientMemoryError):
        if run.device.type == "cpu":
            raise
    run.stream = None
    give_back_memory()
    run.warnings[reported:] = [ON_CPU]  # what was reported since will be reported again
    plan_streaming(run, torch.device("cpu"))
    return _measure_trained_here(run, progress)


def _measure_trained_here(run: MergeRun, progress: Progress) -> tuple[SampleRows, Measured]:
    sample = _sample(run, progress)
    measured = _measure(_with_adapter(run, "dequantized", progress), run, sample, progress)
    give_back_memory()
    return sample, measured


def measure_original(run: MergeRun, sample: SampleRows, base: str, progress: Progress) -> Measured | None:
    """Measure the original weights + adapter, after `measure_trained`.

    Args:
        run: what is merged.
        sample: what to measure on.
        base: what was asked for: auto, dequantized or original.
        progress: is called as rows are measured.

    Returns:
        The measurement, or None where there are no originals, or nothing to choose by.

    Raises:
        InsufficientMemoryError: memory ran out, and the original base was asked for.
    """
    required = base == "original"
    if base == "dequantized" or not run.plan.has_original or (sample.eval is None and not required):
        return None
    try:
        if run.stream is not None:
            read_original_weights(run.stream.model)
            return _measure(run.stream.model, run, sample, progress)
        return _measure(_with_adapter(run, "original", progress), run, sample, progress)
    except torch.OutOfMemoryError as error:
        if required:
            raise InsufficientMemoryError(
                f"Measuring the original base ran out of memory on {run.device} ({first_line(error)}). Free memory "
                "there, or merge with --base dequantized."
            ) from error
        run.warnings.append(f"The original base was not measured: {first_line(error)}")
        return None
    finally:
        give_back_memory()


def reference_model(run: MergeRun, base: MergeBase, progress: Progress) -> Any:
    """Return base + adapter in fp32 once more, after both bases were measured.

    Args:
        run: what is merged.
        base: which.
        progress: is called as a model is loaded.

    Returns:
        The streamed model, or one loaded whole.
    """
    if run.stream is None:
        return _with_adapter(run, base, progress)
    if base == "original":
        read_original_weights(run.stream.model)
    else:
        read_trained_weights(run.stream.model, run.plan.trained)
    return run.stream.model


@torch.no_grad()
def measure_rounded(run: MergeRun, sample: SampleRows, base: MergeBase, progress: Progress) -> Logits:
    """Measure base + adapter with its weights rounded to the merge's dtype, on the sample rows.

    Args:
        run: what is merged.
        sample: what to measure on.
        base: which.
        progress: is called when measuring begins.

    Returns:
        The logits.
    """
    model = reference_model(run, base, progress)
    progress("measuring what rounding costs", 0, None)
    with rounded_weights(model, run.plan.dtype):
        return rounded_head(_sample_logits(model, sample), run.plan.dtype)


def _sample(run: MergeRun, progress: Progress) -> SampleRows:
    """Choose eval rows to measure on, and rows to compare on: eval ones, else training's, else fixed sentences."""
    forward = _examine_forward(run, progress)
    renderer = run_renderer(run.trained.config, run.tokenizer, run.base)
    try:
        prepared, reported = prepare_trained(run.trained, run.tokenizer, run.base, progress)
    except (DataError, FileMissingError) as error:
        run.warnings.append(f"The run's data could not be read, so nothing was measured on eval rows. {error}")
        had_turns = (run.trained.directory / "adapter" / CHAT_TEMPLATE).is_file()  # as training found
        stops = _take_turns(run, renderer, had_turns)
        prompts = fallback_prompts(renderer, asked_tokenizer(run.plan), FALLBACK_SAMPLES, had_turns)
        run.warnings += _prompt_warnings(prompts)
        rows = [run.tokenizer(text)["input_ids"] for text in FALLBACK_SAMPLES]
        return SampleRows(rows, None, forward, prompts, 0, stops)
    run.warnings += reported
    stops = _take_turns(run, renderer, prepared.train.has_conversations())
    examples: ExampleSet = prepared.eval if len(prepared.eval) else prepared.train
    prompts, left_out = choose_prompts(renderer, asked_tokenizer(run.plan), examples)
    run.warnings += _prompt_warnings(prompts)
    rows = [examples[index].input_ids[:SAMPLE_TOKENS] for index in range(min(SAMPLE_ROWS, len(examples)))]
    if not len(prepared.eval):
        run.warnings.append("The run has no eval rows, so the two bases could not be measured against each other.")
    return SampleRows(rows, prepared.eval if len(prepared.eval) else None, forward, prompts, left_out, stops)


def _prompt_warnings(prompts: list[CheckPrompt]) -> list[str]:
    if not prompts:
        return ["No row has a prompt that plain transformers could be asked, so it answered none."]
    given = next((prompt.where for prompt in prompts if "ids" in prompt.asked), None)
    if given is None:
        return []
    return [
        f"The base's own template does not ask as training and evaluate do, such as the prompt of {given}, so a server "
        "will ask the merged model otherwise. The check took the tokens of training."
    ]


def _take_turns(run: MergeRun, renderer: Renderer, has_conversations: bool) -> Mapping[int, str]:
    """Let the merged files say what training taught about turns; return the tokens that end an answer."""
    taught = taught_turns(renderer, has_conversations)
    run.plan = run.plan.with_turns(taught)
    return taught.stop_tokens


def _examine_forward(run: MergeRun, progress: Progress) -> ForwardPlan:
    """Examine the first layers of each kind, which show as much of packing and of the logits as all would."""
    progress("examining the model", 0, None)
    if run.stream is not None:
        kinds = run.base.facts.layer_kinds
        layers = 1 + max(kinds.index(kind) for kind in set(kinds))
        model = load_streamed_model(run.base, run.device, run.plan.trained, layers=layers)
        if has_finite_logits(model):
            return examine_forward(model)
        run.stream = None
    return examine_forward(_load_whole(run, "dequantized", progress))


def _with_adapter(run: MergeRun, base: MergeBase, progress: Progress) -> Any:
    model = _load_whole(run, base, progress) if run.stream is None else fill_model(run.stream)
    add_adapters(model, run.trained.config.adapter, run.trained.config.training.seed, run.tokenizer)
    check_token_ids(model, run.trained.adapter.config)
    load_adapter_state(model, run.trained.adapter.tensors)
    return model.eval()


def _load_whole(run: MergeRun, base: MergeBase, progress: Progress) -> Any:
    """Load the base in fp32, as it was trained or as its checkpoint has it."""
    if base == "original":
        return load_dense_model(run.base, run.device)
    # With the base's own LM head, which the merged model has, not with the approximation it was trained by.
    as_merged = {
        "model.device": run.device.type,
        "model.compute_dtype": "float32",
        "model.lm_head": "dense",
        "model.embeddings": "device",
    }
    loaded = load_base_model(run.base, run.trained.config.replace(as_merged).model, user_cache(), progress)
    if difference := run.trained.fingerprint.difference(loaded.fingerprint):
        raise CheckpointError(f"The base {run.model} is not the one this adapter was trained on: {difference}.")
    for path, recorded in run.trained.fingerprint.tensors.items():  # the merge takes its offset too
        layer = loaded.model.get_submodule(path)
        layer.take(with_offset(layer.nf4_weight, recorded))
    return loaded.model


@torch.no_grad()
def _measure(model: Any, run: MergeRun, sample: SampleRows, progress: Progress) -> Measured:
    """Measure in one pass over the sample rows, by the training forward, and one for each pack of eval rows."""
    progress("measuring logits", 0, None)
    # Others reach as far as fp32, which is measured in.
    is_narrow = run.plan.dtype == torch.float16
    with watched_activations(model) if is_narrow else nullcontext(ActivationRange()) as seen:
        found, is_routed = _sample_logits(model, sample), has_experts(model)
        loss = None if sample.eval is None else _eval_loss(model, run, sample, sample.eval, progress)
    return Measured(found, loss, is_routed, seen)


def _eval_loss(model: Any, run: MergeRun, sample: SampleRows, rows: ExampleSet, progress: Progress) -> float:
    # Whole logits of a large pack would take more memory than the weights.
    least = 0 if sample.forward.loss_path.own_logits else STREAMED_TOKENS
    most_tokens = max(micro_batch_tokens(run.trained.config), least)
    return eval_loss(model, rows, sample.forward, most_tokens, progress)


def _sample_logits(model: Any, sample: SampleRows) -> Logits:
    loss_path = sample.forward.loss_path
    if not sample.forward.can_pack:
        return row_logits(model, sample.rows, loss_path)
    examples = [Example(row, row) for row in sample.rows]
    (pack,) = make_packs(examples, sum(map(len, sample.rows)), packing=True)
    pack = pack.to(next(model.parameters()).device)
    if loss_path.own_logits:
        return WholeLogits.of_rows([logits(model, pack).float()])
    return logits_of_hidden(model, hidden_states(model, pack)[0], loss_path)
