"""Decide what a resumed run may change, and record the environment that its last bits depend on.

A key that is free may change: memory, logging, where files are. Any other change makes it another run.
"""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qlora_kernels.processor import processor_fact
from qlora_kernels.products import library
from qlora_kernels.registry import kernel_choice
from qlora_trainer.common.units import dtype_name
from qlora_trainer.config.schema import PLAIN_OPTIONS, RunConfig
from qlora_trainer.model.device import kernels_in_words

RECORDED_PACKAGES = ("qlora-trainer", "torch", "bitsandbytes", "transformers", "accelerate", "tokenizers", "numpy")
# Keys that a resumed run may change: memory, logging and where files are. Any other change makes it another run.
# The data and the base are identified by their contents, so their paths may change.
_FREE_SECTIONS = ("data", "evaluation", "checkpoint")
_FREE_KEYS = {
    "model.device",
    "model.embeddings",
    "model.cache_quantized",
    "model.min_quantized_fraction",
    "model.name",
    "model.revision",
    "model.verify_bytes",
    "training.activation_checkpointing",
    "training.cpu_workers",
    "training.deterministic",
    "training.uncheckpointed_layers",
    "training.offload_every_n_layers",
    "training.evaluate_every",
    "training.micro_batch_tokens",
    "training.output_dir",
    "training.save_every",
}
_REPORTED = {
    "data.packing": "a step's rows are summed in another order, so last bits may differ",
    "model.device": "its last bits may differ from an uninterrupted run's",
    "training.cpu_workers": "a step's rows are summed in another order, so last bits may differ",
    "training.deterministic": "on CUDA sums are made in another order, so last bits may differ from here on",
    "training.micro_batch_tokens": "a step's rows are summed in another order, so last bits may differ",
}


def config_changes(saved: Mapping[str, Mapping[str, Any]], config: RunConfig) -> tuple[list[str], list[str]]:
    """Compare a config with the one that a checkpoint was made with.

    Args:
        saved: the checkpoint's config, by section and key.
        config: of the resumed run.

    Returns:
        (changes that would make it another run, each "key: was → is"; sentences that warn of allowed changes).
    """
    refused, warnings = [], []
    for section, values in config.model_dump(mode="json").items():
        for name in sorted(values.keys() | saved.get(section, {}).keys()):
            key = f"{section}.{name}"
            was, now = _saved_value(saved, config, key), values.get(name)
            if was == now:
                continue
            if section not in _FREE_SECTIONS and key not in _FREE_KEYS:
                refused.append(f"{key}: {was} → {now}")
            elif key in _REPORTED:
                warnings.append(f"{key} was {was} and is {now}: training goes on, but {_REPORTED[key]}.")
    return refused, warnings


def with_saved_options(saved: Mapping[str, Mapping[str, Any]], config: RunConfig) -> RunConfig:
    """Return the config with a checkpoint's memory-efficient options in place of those that it leaves open.

    Args:
        saved: the checkpoint's config, by section and key.
        config: of the resumed run.

    Returns:
        The config, which leaves none open.
    """
    left_open = [key for key in PLAIN_OPTIONS if config.value(key) == "auto"]
    return config.replace({key: _saved_value(saved, config, key) for key in left_open})


def _saved_value(saved: Mapping[str, Mapping[str, Any]], config: RunConfig, key: str) -> Any:
    """Return what a checkpoint was trained by: where it is older than the key, the plain option or the default."""
    section, _, name = key.partition(".")
    fields = type(getattr(config, section)).model_fields
    default = fields[name].default if name in fields else None
    return saved.get(section, {}).get(name, PLAIN_OPTIONS.get(key, default))


def environment(device: torch.device, compute_dtype: torch.dtype) -> dict[str, Any]:
    """Collect what the last bits of a run's numbers depend on, to be recorded with each checkpoint.

    Args:
        device: of the run.
        compute_dtype: of its activations.

    Returns:
        Processor, device, kernels, threads and versions by name; all values are text, numbers or None.
    """
    return {
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "compute_dtype": dtype_name(compute_dtype),
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
    """Read the processor's model from Linux; on other systems return what Python reports.

    Args:
        cpuinfo: Linux' description of the processors.

    Returns:
        The model's name, or only the kind of machine.
    """
    return processor_fact("model name", cpuinfo) or platform.processor() or platform.machine()


def environment_differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Warn if a checkpoint was written on another machine or with other versions.

    Keys that the checkpoint does not have are not compared.

    Args:
        saved: the checkpoint's environment.
        here: the present one.

    Returns:
        One warning; empty if all is the same.
    """
    changed = [f"{key} was {saved[key]} and is {here[key]}" for key in here if key in saved and saved[key] != here[key]]
    if not changed:
        return []
    return [
        f"The checkpoint was written elsewhere or under other versions ({'; '.join(changed)}): training goes on, but "
        "its last bits may differ from an uninterrupted run's."
    ]
