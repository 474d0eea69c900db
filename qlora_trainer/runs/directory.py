"""Read and write a run directory's files other than its checkpoints, and prepare its rows.

A run directory holds config.yaml (resolved), metrics.jsonl, samples.json, report.html, checkpoints/ and, when training
has ended, adapter/: PEFT's two files, and base.json, which says what base the adapter belongs to. Imported models and
prepared data are kept in the user's cache instead, shared by all runs. Left out: checkpoints (checkpoint.py), what a
resumed run may change (resume_rules.py), and the metrics (metrics.py).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora_trainer.adapters.tokens.new_tokens import own_ids_with, vocabulary_with
from qlora_trainer.common.atomic import write_text
from qlora_trainer.common.boundary import read_bounded_json
from qlora_trainer.common.cache import user_cache
from qlora_trainer.common.errors import CheckpointError, FileMissingError
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.config.load import dump_config, load_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.preparation.prepare import Prepared, prepare
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.runs.checkpoint import MANIFEST, load_checkpoint
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.turn_files import base_stop_ids

if TYPE_CHECKING:
    from qlora_trainer.model.fingerprint import BaseFingerprint

RUN_CONFIG_NAME = "config.yaml"
BASE_NAME = "base.json"
SAMPLES_NAME = "samples.json"
MAX_RECORD_BYTES = 64 * 2**20
_SAMPLE_KEYS = {"prompt", "reference", "before", "after"}


class BaseRecord(NamedTuple):
    """Hold what an adapter records in addition to PEFT's files: the base, the step and the run it was trained in."""

    fingerprint: "BaseFingerprint"
    step: int
    run: str
    data: str  # the key of the prepared rows


def read_run_config(directory: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run directory's resolved config, with its present path as output directory.

    Args:
        directory: the run directory; it may have been moved since the run started.
        overrides: `section.key=value` of keys to set.

    Returns:
        The config.

    Raises:
        FileMissingError: it is not a run directory.
    """
    if not (directory / RUN_CONFIG_NAME).is_file():
        raise FileMissingError(f"{directory} is not a run directory: it has no {RUN_CONFIG_NAME}.")
    config = load_config(directory / RUN_CONFIG_NAME, overrides)
    return config.replace({"training.output_dir": str(directory.absolute())})


def write_run_config(config: RunConfig, directory: Path) -> None:
    """Write config.yaml atomically, so that a kill leaves the old one or the new one.

    Args:
        config: resolved.
        directory: the run directory.
    """
    write_text(directory / RUN_CONFIG_NAME, dump_config(config))


def run_renderer(config: RunConfig, tokenizer: Any, model: ModelDirectory) -> Renderer:
    """Make the renderer that renders a run's prompts as its rows were, and knows which tokens end an answer.

    Args:
        config: of the run.
        tokenizer: of the run's model.
        model: the directory of the run's model, whose own settings name tokens that end a text too.

    Returns:
        The renderer.
    """
    return Renderer(tokenizer, template_date=config.data.template_date, model_stops=base_stop_ids(model))


def prepare_data(config: RunConfig, tokenizer: Any, model: ModelDirectory, progress: Progress = silent) -> Prepared:
    """Prepare the run's rows, or take them from the user's cache if they have been prepared before.

    Args:
        config: of the run.
        tokenizer: of the run's model, with its new tokens.
        model: the directory of the run's model.
        progress: is called as rows are prepared.

    Returns:
        The rows and the report on them.
    """
    first = model.facts.vocabulary or 0  # virtual tokens have the ids after the vocabulary's
    return prepare(
        config.data,
        tokenizer,
        max_positions=config.adapter.positions_of_rows(model.facts.positions),
        seed=config.training.seed,
        cache_dir=user_cache() / "data",
        vocab_size=vocabulary_with(tokenizer, config.adapter, model.facts.vocabulary),
        own_ids=lambda: own_ids_with(model, [*config.adapter.new_tokens]),
        leading_ids=range(first, first + config.adapter.leading_tokens),
        progress=progress,
    )


def write_base_record(directory: Path, record: BaseRecord) -> None:
    """Write base.json next to an adapter's files, to record its base; PEFT ignores the file.

    Args:
        directory: of the adapter.
        record: to write.
    """
    content = {"run": record.run, "step": record.step, "base": record.fingerprint.to_json(), "data": record.data}
    write_text(directory / BASE_NAME, json.dumps(content, indent=1) + "\n")


def read_base_record(directory: Path) -> BaseRecord | None:
    """Read which base an adapter belongs to.

    Args:
        directory: of a final adapter or a checkpoint; a damaged checkpoint raises CheckpointError.

    Returns:
        The record; None for an adapter that was made by another program.

    Raises:
        CheckpointError: the record exists and cannot be read.
    """
    from qlora_trainer.model.fingerprint import BaseFingerprint  # imports bitsandbytes, which data does not need

    path = directory / BASE_NAME
    if (directory / MANIFEST).is_file():  # one of our checkpoints; a trainer_state.json alone may be any trainer's
        _, state = load_checkpoint(directory)
        base, step = BaseFingerprint.from_json(state["base"]), state["training"]["step"]
        return BaseRecord(base, step, directory.name, state["data"])
    if not path.is_file():
        return None
    advice = "Restore it. If you delete it, the adapter loads without any check of the base."
    content = read_bounded_json(path, dict, MAX_RECORD_BYTES, CheckpointError, advice)
    try:
        base, step = BaseFingerprint.from_json(content["base"]), int(content["step"])
        return BaseRecord(base, step, str(content["run"]), str(content["data"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} should say which base the adapter was trained on, but cannot be read: {error!r}. {advice}"
        ) from error


def write_samples(directory: Path, samples: list[dict[str, Any]]) -> None:
    """Write generated samples to samples.json, for the report of this run or of its resumption.

    Args:
        directory: the run directory.
        samples: objects with prompt, reference, before and after.
    """
    write_text(directory / SAMPLES_NAME, json.dumps(samples, indent=1, ensure_ascii=False) + "\n")


def read_samples(directory: Path) -> list[dict[str, Any]]:
    """Read the samples that `write_samples` wrote.

    Args:
        directory: the run directory.

    Returns:
        The samples; empty if none were written.

    Raises:
        CheckpointError: the file exists and holds something else.
    """
    path = directory / SAMPLES_NAME
    if not path.is_file():
        return []
    advice = "Restore or delete it: only the report's samples depend on it."
    samples = read_bounded_json(path, list, MAX_RECORD_BYTES, CheckpointError, advice)
    for number, sample in enumerate(samples, 1):
        is_whole = isinstance(sample, dict) and sample.keys() == _SAMPLE_KEYS
        if not is_whole or not all(isinstance(text, str | None) for text in sample.values()):
            raise CheckpointError(f"{path}: item {number} is no sample that was written here. {advice}")
    return samples
