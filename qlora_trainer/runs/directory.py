"""What a run keeps on disk next to its checkpoints, what a resumed run may change, and what its last bits depend on.

A run directory holds config.yaml (resolved), metrics.jsonl, samples.json, report.html, checkpoints/ and, when training
has ended, adapter/: PEFT's two files, and base.json, which says what base the adapter belongs to. Imported models and
prepared data lie in the user's cache instead, shared by all runs.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qlora_trainer.common.atomic import write_text
from qlora_trainer.common.cache import user_cache
from qlora_trainer.common.errors import CheckpointError, FileMissingError
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.config.load import dump_config, load_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.preparation.prepare import Prepared, prepare
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.model.fingerprint import BaseFingerprint
from qlora_trainer.runs.checkpoint import MANIFEST, load_checkpoint
from qlora_trainer.weights.model_directory import ModelDirectory

RUN_CONFIG_NAME = "config.yaml"
BASE_NAME = "base.json"
MAX_BASE_BYTES = 64 * 2**20


class BaseRecord(NamedTuple):
    """What an adapter says of itself beyond PEFT's files: the base it was trained on, and when."""

    fingerprint: BaseFingerprint
    step: int
    run: str
    data: str | None = None  # the key of the prepared rows; adapters of earlier versions lack it


def read_run_config(directory: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A run directory's resolved config; FileMissingError where it is no run directory.

    The output directory is where the run lies now, wherever it was started.
    """
    if not (directory / RUN_CONFIG_NAME).is_file():
        raise FileMissingError(f"{directory} is not a run directory: it has no {RUN_CONFIG_NAME}.")
    config = load_config(directory / RUN_CONFIG_NAME, overrides)
    return config.replace({"training.output_dir": str(directory.absolute())})


def write_run_config(config: RunConfig, directory: Path) -> None:
    """Write config.yaml at once, so that a kill leaves the old one or the new one."""
    write_text(directory / RUN_CONFIG_NAME, dump_config(config))


def run_renderer(config: RunConfig, tokenizer: Any) -> Renderer:
    """Make what renders the prompts of a run as its rows were rendered, and says which tokens end an answer."""
    return Renderer(tokenizer, template_date=config.data.template_date)


def prepare_data(config: RunConfig, tokenizer: Any, model: ModelDirectory, progress: Progress = silent) -> Prepared:
    """The run's prepared rows, from the user's cache where they have been prepared before."""
    return prepare(
        config.data,
        tokenizer,
        max_positions=model.facts.positions,
        seed=config.training.seed,
        cache_dir=user_cache() / "data",
        vocab_size=model.facts.vocabulary,
        progress=progress,
    )


def write_base_record(directory: Path, record: BaseRecord) -> None:
    """Say next to an adapter's files which base it belongs to; PEFT ignores the file."""
    content = {"run": record.run, "step": record.step, "base": record.fingerprint.to_json(), "data": record.data}
    write_text(directory / BASE_NAME, json.dumps(content, indent=1) + "\n")


def read_base_record(directory: Path) -> BaseRecord | None:
    """The base that an adapter of ours belongs to, from a final adapter or a checkpoint; None for another's adapter.

    Raises:
        CheckpointError: the record is there and cannot be read, or the checkpoint is damaged.
    """
    path = directory / BASE_NAME
    if (directory / MANIFEST).is_file():  # one of our checkpoints; a trainer_state.json alone may be any trainer's
        _, state = load_checkpoint(directory)
        base, step = BaseFingerprint.from_json(state["base"]), state["training"]["step"]
        return BaseRecord(base, step, directory.name, state["data"])
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > MAX_BASE_BYTES:
            raise ValueError(f"it has more than {MAX_BASE_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        base, step = BaseFingerprint.from_json(content["base"]), int(content["step"])
        return BaseRecord(base, step, str(content["run"]), content.get("data"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} should say which base the adapter was trained on, but cannot be read: {error!r}. Restore it; "
            "without it the adapter is taken as it is, for whatever base."
        ) from error


def write_samples(directory: Path, samples: list[dict[str, Any]]) -> None:
    """Keep generated samples in the run directory, for the report of this run or of its resumption."""
    write_text(directory / "samples.json", json.dumps(samples, indent=1, ensure_ascii=False) + "\n")


def read_samples(directory: Path) -> list[dict[str, Any]]:
    """What `write_samples` kept; empty where there is none."""
    path = directory / "samples.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
