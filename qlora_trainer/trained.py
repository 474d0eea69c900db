"""A run's base with its trained adapter: what evaluation, generation and merging start from."""

import dataclasses
from pathlib import Path
from typing import Any

from qlora_trainer.adapters.inject import add_adapters, load_adapter_state
from qlora_trainer.adapters.peft_format import Adapter, read_adapter
from qlora_trainer.checkpoint import load_checkpoint, newest_checkpoint
from qlora_trainer.config import RunConfig
from qlora_trainer.data.messages import Conversation
from qlora_trainer.data.preparation import ExampleSet
from qlora_trainer.data.rendering import Renderer
from qlora_trainer.errors import CheckpointError, DataError, FileMissingError
from qlora_trainer.evaluation import answer_questions, exact_match, heldout_loss, perplexity, questions
from qlora_trainer.fingerprint import BaseFingerprint
from qlora_trainer.forward import examine_forward
from qlora_trainer.model import Base, load_base_model, load_tokenizer, resolve_model
from qlora_trainer.progress import Progress, silent
from qlora_trainer.run_directory import prepare_data, read_run_config, user_cache
from qlora_trainer.training import micro_batch_tokens


@dataclasses.dataclass
class Trained:
    """A run's base and its adapter, for evaluation, generation and merging."""

    directory: Path
    config: RunConfig
    tokenizer: Any
    base: Base
    adapter: Adapter
    source: str  # what the adapter was taken from, for people
    fingerprint: BaseFingerprint  # of the base as it was trained


def open_trained(directory: Path, compute_dtype: str | None = None, progress: Progress = silent) -> Trained:
    """Load a run's base with its adapter: the final one, or of an unfinished run the newest checkpoint's."""
    config = read_run_config(directory)
    newest = newest_checkpoint(directory)
    _, state = load_checkpoint(newest.path)
    final = directory / "adapter"
    source = final if (final / "adapter_config.json").is_file() else newest.path
    adapter = read_adapter(source)
    model_settings = config.model.model_copy(update={"compute_dtype": compute_dtype or config.model.compute_dtype})
    path = resolve_model(model_settings.name, model_settings.revision, user_cache(), progress)
    tokenizer = load_tokenizer(path)
    base = load_base_model(path, model_settings, progress)
    trained_on = BaseFingerprint.from_json(state["base"])
    if difference := trained_on.difference(base.fingerprint):
        raise CheckpointError(f"The base {config.model.name} is not the one this adapter was trained on: {difference}.")
    add_adapters(base.model, config.adapter, config.training.seed)
    load_adapter_state(base.model, adapter.tensors)
    base.model.eval()
    name = "the final adapter" if source == final else f"the checkpoint of step {newest.step}; training has not ended"
    return Trained(directory, config, tokenizer, base, adapter, name, trained_on)


def evaluate_trained(trained: Trained, answers: int = 0, progress: Progress = silent) -> dict[str, float]:
    """Held-out loss, perplexity, and with `answers` (-1 for all rows) exact match by generation.

    Raises:
        DataError: the run has no held-out rows.
    """
    prepared = prepare_data(trained.config, trained.tokenizer, trained.base.directory, progress)
    heldout: ExampleSet = prepared.heldout
    if not len(heldout):
        raise DataError("The run has no held-out rows (data.heldout is 0), so there is nothing to evaluate on.")
    model = trained.base.model
    loss = heldout_loss(model, heldout, examine_forward(model), micro_batch_tokens(trained.config), progress)
    result = {
        "heldout_loss": loss,
        "perplexity": perplexity(loss),
        "rows": len(heldout),
        "label_tokens": int(heldout.learned_counts.sum()),
    }
    if answers:
        renderer = Renderer(trained.tokenizer)
        asked = questions(renderer, heldout, None if answers < 0 else answers)
        limit = trained.config.evaluation.max_new_tokens
        given = answer_questions(model, trained.tokenizer, asked, max_new_tokens=limit, progress=progress)
        result |= {"exact_match": exact_match(given), "answered": len(given)}
    return result


def learned_plain_text(trained: Trained, progress: Progress = silent) -> bool:
    """Whether the run learned to continue plain text rather than to answer in turns; no, where its data is gone."""
    try:
        prepared = prepare_data(trained.config, trained.tokenizer, trained.base.directory, progress)
    except (DataError, FileMissingError):
        return False
    return not isinstance(prepared.train.row(0), Conversation)
