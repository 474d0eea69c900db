"""What a run keeps on disk beside its checkpoints, what a resumed run may change, and what its last bits depend on.

A run directory holds config.yaml (resolved), metrics.jsonl, samples.json, report.html, checkpoints/ and, when training
has ended, adapter/: PEFT's two files, and base.json, which says what base the adapter belongs to. Imported models and
prepared data lie in the user's cache instead, shared by all runs.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qlora_kernels.processor import processor_fact
from qlora_kernels.products import library
from qlora_kernels.registry import kernel_choice
from qlora_trainer.runs.checkpoint import MANIFEST, load_checkpoint
from qlora_trainer.config.load import dump_config, load_config
from qlora_trainer.data.preparation.prepare import Prepared, prepare
from qlora_trainer.model.device import kernels_in_words
from qlora_trainer.common.atomic import write_text
from qlora_trainer.common.errors import CheckpointError, DiskError, FileMissingError
from qlora_trainer.model.fingerprint import BaseFingerprint
from qlora_trainer.model.source import max_positions, vocabulary_size
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.config.schema import RunConfig

RECORDED_PACKAGES = ("qlora-trainer", "torch", "bitsandbytes", "transformers", "accelerate", "tokenizers", "numpy")
CONFIG_NAME = "config.yaml"
BASE_NAME = "base.json"
MAX_BASE_BYTES = 64 * 2**20

# What a resumed run may change: memory, logging and where things lie. All else makes it another run.
# The data and the base are known by their contents, wherever they lie now.
_FREE_SECTIONS = ("data", "evaluation", "checkpoint")
_FREE_KEYS = {
    "model.device",
    "model.embeddings",
    "model.keep_quantized",
    "model.minimum_4bit_share",
    "model.name",
    "model.revision",
    "training.activations",
    "training.deterministic",
    "training.kept_layers",
    "training.offload_every",
    "training.evaluate_every",
    "training.micro_batch_tokens",
    "training.output_dir",
    "training.save_every",
}
_TOLD = {
    "data.packing": "a step's rows are summed in another order, so last bits may differ",
    "model.device": "its last bits may differ from an uninterrupted run's",
    "training.deterministic": "on CUDA sums are made in another order, so last bits may differ from here on",
    "training.micro_batch_tokens": "a step's rows are summed in another order, so last bits may differ",
}


class BaseRecord(NamedTuple):
    """What an adapter says of itself beyond PEFT's files: the base it was trained on, and when."""

    fingerprint: BaseFingerprint
    step: int
    run: str
    data: str | None = None  # the key of the prepared rows; adapters of earlier versions lack it


def user_cache() -> Path:
    """Where imported models and prepared data are kept: $XDG_CACHE_HOME/qlora-trainer, else ~/.cache/qlora-trainer."""
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "qlora-trainer"
    try:
        return Path.home() / ".cache" / "qlora-trainer"
    except RuntimeError as error:  # a container's user that no list of users names
        raise DiskError("This user has no home. Set HOME or XDG_CACHE_HOME to a folder that can be written.") from error


def read_run_config(directory: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A run directory's resolved config; FileMissingError where it is no run directory.

    The output directory is where the run lies now, wherever it was started.
    """
    if not (directory / CONFIG_NAME).is_file():
        raise FileMissingError(f"{directory} is not a run directory: it has no {CONFIG_NAME}.")
    config = load_config(directory / CONFIG_NAME, overrides)
    training = config.training.model_copy(update={"output_dir": str(directory.absolute())})
    return config.model_copy(update={"training": training})


def write_run_config(config: RunConfig, directory: Path) -> None:
    """Write config.yaml at once, so that a kill leaves the old one or the new one."""
    write_text(directory / CONFIG_NAME, dump_config(config))


def config_changes(saved: Mapping[str, Mapping[str, Any]], config: RunConfig) -> tuple[list[str], list[str]]:
    """How `config` differs from the one a checkpoint was made with.

    Returns (changes that would make it another run, notices on changes that may be made), each "key: was → is".
    """
    refused, notices = [], []
    for section, values in config.model_dump(mode="json").items():
        before, fields = saved.get(section, {}), type(getattr(config, section)).model_fields
        for name in sorted(values.keys() | before.keys()):
            # A checkpoint of an earlier version lacks newer keys: it was trained by their defaults.
            default = fields[name].default if name in fields else None
            key, was, now = f"{section}.{name}", before.get(name, default), values.get(name)
            if was == now:
                continue
            if section not in _FREE_SECTIONS and key not in _FREE_KEYS:
                refused.append(f"{key}: {was} → {now}")
            elif key in _TOLD:
                notices.append(f"{key} was {was} and is {now}: training goes on, but {_TOLD[key]}.")
    return refused, notices


def prepare_data(config: RunConfig, tokenizer: Any, model_directory: Path, progress: Progress = silent) -> Prepared:
    """The run's prepared rows, from the user's cache where they have been prepared before."""
    return prepare(
        config.data,
        tokenizer,
        max_positions=max_positions(model_directory),
        seed=config.training.seed,
        cache_dir=user_cache() / "data",
        vocab_size=vocabulary_size(model_directory),
        progress=progress,
    )


def write_base_record(directory: Path, record: BaseRecord) -> None:
    """Say beside an adapter's files which base it belongs to; PEFT ignores the file."""
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


def environment(device: torch.device, compute_dtype: torch.dtype) -> dict[str, Any]:
    """What the last bits of a run depend on, recorded with each checkpoint."""
    return {
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "kernels": kernel_choice(),
        "kernels_taken": kernels_in_words(device.type),
        "products": library() if device.type == "cpu" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in RECORDED_PACKAGES},
        "triton": _triton_version() if device.type == "cuda" else None,
    }


def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model, as Linux tells it; elsewhere what Python knows."""
    return processor_fact("model name", cpuinfo) or platform.processor() or platform.machine()


def environment_differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """One notice where a checkpoint comes from another machine or other versions; empty where all is the same.

    Checkpoints of earlier versions lack newer keys, of which nothing is said.
    """
    changed = [f"{key} was {saved[key]} and is {here[key]}" for key in here if key in saved and saved[key] != here[key]]
    if not changed:
        return []
    return [
        f"The checkpoint was written elsewhere or under other versions ({'; '.join(changed)}): training goes on, but "
        "its last bits may differ from an uninterrupted run's."
    ]
