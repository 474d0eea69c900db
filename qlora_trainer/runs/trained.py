"""Load a run's base with its trained adapter, for evaluation, generation and merging."""

import dataclasses
from pathlib import Path
from typing import Any

from qlora_trainer.adapters.inject import add_adapters, load_adapter_state
from qlora_trainer.adapters.peft_format import StoredAdapter, read_adapter
from qlora_trainer.adapters.tokens.new_tokens import run_tokenizer
from qlora_trainer.adapters.tokens.put_tokens import check_token_ids
from qlora_trainer.common.cache import user_cache
from qlora_trainer.common.errors import CheckpointError, DataError, FileMissingError
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.batching.loader import micro_batch_tokens
from qlora_trainer.data.preparation.prepare import ExampleSet, Prepared
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.data.types import Conversation
from qlora_trainer.model.fingerprint import BaseFingerprint
from qlora_trainer.model.forward import examine_forward
from qlora_trainer.model.load import Base
from qlora_trainer.model.quantized_copy import load_base
from qlora_trainer.model.source import resolve_model
from qlora_trainer.runs.checkpoint import newest_checkpoint
from qlora_trainer.runs.directory import (
    RUN_CONFIG_NAME,
    BaseRecord,
    prepare_data,
    read_base_record,
    read_run_config,
    run_renderer,
)
from qlora_trainer.training.evaluation import answer_prompts, eval_loss, eval_prompts, exact_match, perplexity
from qlora_trainer.weights.model_directory import ModelDirectory


@dataclasses.dataclass
class TrainedAdapter:
    """Hold a run's adapter and what belongs to it, without the base."""

    directory: Path
    config: RunConfig
    adapter: StoredAdapter
    source: str  # of the adapter, in words: final, or the step of its checkpoint
    fingerprint: BaseFingerprint  # of the base as it was trained
    data_key: str  # of the rows it was trained on


@dataclasses.dataclass
class Trained(TrainedAdapter):
    """Hold a run's base with its adapter, for evaluation and generation."""

    renderer: Renderer  # of prompts, as the rows were rendered
    base: Base
    warnings: list[str] = dataclasses.field(default_factory=list)


def read_trained(directory: Path) -> TrainedAdapter:
    """Read a run's adapter: the final one, or the newest checkpoint's if that has more steps.

    A finished run needs no checkpoints. If there is no adapter, or it is damaged, CheckpointError or AdapterError is
    raised.

    Args:
        directory: the run directory.

    Returns:
        The adapter with the run's config.

    Raises:
        CheckpointError: the run's config is not the one that the adapter was trained with.
    """
    config = read_run_config(directory)
    source, record = _newest_adapter(directory)
    adapter = read_adapter(source)
    if differences := adapter.differences(config.adapter):
        changes = "; ".join(
            f"{key} is {now} in {RUN_CONFIG_NAME} and {was} there" for key, (was, now) in differences.items()
        )
        raise CheckpointError(
            f"{directory / RUN_CONFIG_NAME} is not what the adapter in {source} was trained with: {changes}. Put back "
            "the adapter's values."
        )
    is_final = source == directory / "adapter"
    name = "the final adapter" if is_final else f"the checkpoint of step {record.step}; training has not ended"
    return TrainedAdapter(directory, config, adapter, name, record.fingerprint, record.data)


def open_trained(directory: Path, progress: Progress = silent, **model_settings: str | None) -> Trained:
    """Load a run's base with its adapter, as `read_trained` finds it.

    Args:
        directory: the run directory.
        progress: is called as files are fetched and loaded.
        **model_settings: values of the section model that replace the config's, such as compute_dtype="float32"; None
            replaces nothing.

    Returns:
        The base with its adapter, in evaluation mode.

    Raises:
        CheckpointError: the adapter belongs to another base.
    """
    run = read_trained(directory)
    given = {f"model.{key}": value for key, value in model_settings.items() if value}
    settings = run.config.replace(given).model
    model = resolve_model(settings.name, settings.revision, user_cache(), progress)
    tokenizer = run_tokenizer(model, run.config.adapter)
    base = load_base(model, settings, user_cache(), progress)
    if difference := run.fingerprint.difference(base.fingerprint):
        raise CheckpointError(f"The base {settings.name} is not the one this adapter was trained on: {difference}.")
    add_adapters(base.model, run.config.adapter.as_stored, run.config.training.seed, tokenizer)
    check_token_ids(base.model, run.adapter.config)
    load_adapter_state(base.model, run.adapter.tensors)
    base.model.eval()
    return Trained(**vars(run), renderer=run_renderer(run.config, tokenizer, model), base=base)


def newest_adapter(directory: Path) -> Path:
    """Find a run's adapter: the final one, or the newest valid checkpoint's if that has more steps.

    If there is none, or the newest is damaged, CheckpointError is raised.

    Args:
        directory: the run directory.

    Returns:
        The directory of PEFT's two files.
    """
    return _newest_adapter(directory)[0]


def _newest_adapter(directory: Path) -> tuple[Path, BaseRecord]:
    """Return the directory and record of the final adapter or newest valid checkpoint, whichever has more steps."""
    final = directory / "adapter"
    ended = read_base_record(final)
    try:
        newest = newest_checkpoint(directory)
    except CheckpointError:
        if ended is None:
            raise
        return final, ended
    if ended and ended.step >= newest.step:
        return final, ended
    record = read_base_record(newest.path)
    assert record is not None, "a checkpoint says which base it belongs to"
    return newest.path, record


def prepare_trained(
    run: TrainedAdapter, tokenizer: Any, model: ModelDirectory, progress: Progress = silent
) -> tuple[Prepared, list[str]]:
    """Prepare the run's rows as they are now; FileMissingError or DataError is raised if they cannot be read.

    Args:
        run: whose config names the data.
        tokenizer: of the run's model.
        model: the directory of the run's model.
        progress: is called as rows are prepared.

    Returns:
        (the rows; a warning if they are not those of training, else an empty list).
    """
    prepared = prepare_data(run.config, tokenizer, model, progress)
    if run.data_key == prepared.key:
        return prepared, []
    return prepared, [
        "The run's data changed since training, so rows that are now kept for evaluation may have been trained on, "
        "and the eval loss and answers are not those of before. Restore the data."
    ]


def evaluate_trained(trained: Trained, answers: int = 0, progress: Progress = silent) -> dict[str, float]:
    """Measure eval loss and perplexity, and if asked, exact match by generation.

    If the data changed since training, a warning is added to `trained.warnings`.

    Args:
        trained: the base with its adapter.
        answers: so many eval rows are answered; 0 for none, -1 for all.
        progress: is called as packs are measured and answers generated.

    Returns:
        eval_loss (nats per token), perplexity, rows and trained_tokens; with answers also exact_match (a share of 1)
        and answered (how many).

    Raises:
        DataError: the run has no eval rows.
    """
    prepared, reported = prepare_trained(trained, trained.renderer.tokenizer, trained.base.directory, progress)
    trained.warnings += [warning for warning in reported if warning not in trained.warnings]
    eval_set: ExampleSet = prepared.eval
    if not len(eval_set):
        raise DataError("The run has no eval rows (data.eval is 0), so there is nothing to evaluate on.")
    model = trained.base.model
    loss = eval_loss(model, eval_set, examine_forward(model), micro_batch_tokens(trained.config), progress)
    result = {
        "eval_loss": loss,
        "perplexity": perplexity(loss),
        "rows": len(eval_set),
        "trained_tokens": int(eval_set.trained_counts.sum()),
    }
    if answers:
        prompts = eval_prompts(trained.renderer, eval_set, None if answers < 0 else answers)
        limit, tokenizer = trained.config.evaluation.max_new_tokens, trained.renderer.tokenizer
        given = answer_prompts(model, tokenizer, prompts, max_new_tokens=limit, progress=progress)
        result |= {"exact_match": exact_match(given), "answered": len(given)}
    return result


def trained_on_plain_text(trained: Trained, progress: Progress = silent) -> bool:
    """Return True if the run trained to continue plain text, rather than to answer in turns.

    Args:
        trained: the base with its adapter.
        progress: is called as rows are prepared.

    Returns:
        True for plain text; False also if the run's data cannot be read.
    """
    try:
        prepared = prepare_data(trained.config, trained.renderer.tokenizer, trained.base.directory, progress)
    except (DataError, FileMissingError):
        return False
    return not isinstance(prepared.train.row(0), Conversation)
