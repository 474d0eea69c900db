"""What a run keeps on disk beside its checkpoints, and what its last bits depend on.

A run directory holds config.yaml (resolved), metrics.jsonl, samples.json, report.html, checkpoints/ and, when training
has ended, adapter/. Imported models and prepared data lie in the user's cache instead, shared by all runs.
"""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.config import RunConfig, load_config
from qlora_trainer.data.preparation import Prepared, prepare
from qlora_trainer.directories import write_text
from qlora_trainer.errors import FileMissingError
from qlora_trainer.model import max_positions
from qlora_trainer.progress import Progress, silent

RECORDED_PACKAGES = ("torch", "bitsandbytes", "transformers", "tokenizers", "numpy")


def user_cache() -> Path:
    """Where imported models and prepared data are kept: $XDG_CACHE_HOME/qlora-trainer, else ~/.cache/qlora-trainer."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "qlora-trainer"


def read_run_config(directory: Path) -> RunConfig:
    """A run directory's resolved config; FileMissingError where it is no run directory."""
    if not (directory / "config.yaml").is_file():
        raise FileMissingError(f"{directory} is not a run directory: it has no config.yaml.")
    return load_config(directory / "config.yaml")


def prepare_data(config: RunConfig, tokenizer: Any, model_directory: Path, progress: Progress = silent) -> Prepared:
    """The run's prepared rows, from the user's cache where they have been prepared before."""
    return prepare(
        config.data,
        tokenizer,
        max_positions=max_positions(model_directory),
        seed=config.training.seed,
        cache_dir=user_cache() / "data",
        progress=progress,
    )


def write_samples(directory: Path, samples: list[dict[str, str]]) -> None:
    """Keep generated samples in the run directory, for the report of this run or of its resumption."""
    write_text(directory / "samples.json", json.dumps(samples, indent=1, ensure_ascii=False) + "\n")


def read_samples(directory: Path) -> list[dict[str, str]]:
    """What `write_samples` kept; empty where there is none."""
    path = directory / "samples.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def environment(device: torch.device) -> dict[str, Any]:
    """What the last bits of a run depend on, recorded with each checkpoint."""
    return {
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in RECORDED_PACKAGES},
    }


def environment_differences(saved: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """One notice where a checkpoint comes from another machine or other versions; empty where all is the same."""
    changed = [f"{key} was {saved.get(key)} and is {value}" for key, value in here.items() if saved.get(key) != value]
    if not changed:
        return []
    return [
        f"The checkpoint was written elsewhere or under other versions ({'; '.join(changed)}): training goes on, but "
        "its last bits may differ from an uninterrupted run's."
    ]
