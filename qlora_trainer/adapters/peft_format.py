"""Read and write adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

An adapter from elsewhere is data from strangers, so reading is strict where other loaders are lenient. Safetensors and
JSON only, never pickle. What would make the adapter another function than ours (scalings that we have not, modules
saved whole, initializations that changed the base) is refused by name instead of ignored. What a kind's files hold is
its own matter (kinds/).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qlora_trainer.adapters.file_config import Differences, FileConfig
from qlora_trainer.adapters.kinds.table import FILES, file_type
from qlora_trainer.common.atomic import write_text
from qlora_trainer.common.boundary import read_bounded_json
from qlora_trainer.common.errors import AdapterError, DiskError, FileMissingError
from qlora_trainer.common.units import counted
from qlora_trainer.config.schema import AdapterConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MAX_TENSORS = 100_000
MAX_CONFIG_BYTES = 2**20
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class StoredAdapter:
    """Hold an adapter as read from its files."""

    config: FileConfig
    tensors: dict[str, Tensor]  # PEFT's names and shapes; fp32 on the CPU

    @property
    def paths(self) -> list[str]:
        """List the paths of the adapted modules in the base model, in the order of the file.

        Returns:
            The paths.
        """
        return self.config.adapted_paths(self.tensors)

    def differences(self, wanted: AdapterConfig) -> Differences:
        """Find settings that make this adapter's numbers another function.

        Args:
            wanted: a run's section `adapter`.

        Returns:
            (the adapter's value, the run's) by config key.
        """
        return self.config.differences(self.tensors, wanted)


def write_adapter(directory: Path, tensors: Mapping[str, Tensor], config: FileConfig) -> None:
    """Write the adapter's two files into an existing directory.

    Lists of target modules are written sorted. The config comes last, so that a directory with a config has its
    weights. Tensors that do not fit the config, or hold values that are not finite, are refused by an AdapterError.

    Args:
        directory: to write to.
        tensors: with names and shapes as in StoredAdapter.
        config: of the adapter.

    Raises:
        DiskError: a write failed.
    """
    _check_tensors(tensors, config, origin="The adapter to be saved")
    weights = directory / ADAPTER_WEIGHTS
    try:
        weights.touch()
        mode = weights.stat().st_mode & 0o777  # what the umask leaves; safetensors would make it 0600
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
        weights.chmod(mode)
        write_text(
            directory / ADAPTER_CONFIG, json.dumps(config.as_json(), indent=2, sort_keys=True) + "\n"
        )  # last: it makes it whole
    except (OSError, SafetensorError) as error:
        raise DiskError(f"The adapter could not be written to {directory}: {error}. Free some space.") from error


def read_adapter(directory: Path) -> StoredAdapter:
    """Read an adapter in PEFT's format, ours or another's.

    Where there is no adapter, FileMissingError is raised; where it is of a kind not supported here, or not what an
    adapter should be, AdapterError.

    Args:
        directory: that has its files.

    Returns:
        The adapter.
    """
    _check_files(directory)
    config = read_config(directory / ADAPTER_CONFIG)
    tensors = _read_tensors(directory / ADAPTER_WEIGHTS, config)
    return StoredAdapter(config, {name: tensor.float() for name, tensor in config.in_order(tensors).items()})


def read_config(path: Path) -> FileConfig:
    """Read adapter_config.json; kinds that cannot be trained here are refused by name, all problems at once.

    Args:
        path: of the file.

    Returns:
        The config.

    Raises:
        AdapterError: the file is not what it should be.
    """
    raw = read_bounded_json(path, dict, MAX_CONFIG_BYTES, AdapterError, "Fetch or save the adapter again.")
    found = file_type(raw)
    if found is None:
        known = " and ".join(FILES) if len(FILES) < 3 else ", ".join(FILES)
        verb = "is" if len(FILES) == 1 else "are"
        raise AdapterError(
            f"{path} is an adapter of type {raw.get('peft_type')!r}; only {known} {verb} supported. Use PEFT for it."
        )
    config, problems = found.from_raw(raw)
    if config is None:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise AdapterError(f"{path} describes an adapter that cannot be used here:\n{lines}")
    return config


def _check_files(directory: Path) -> None:
    if not (directory / ADAPTER_CONFIG).is_file():
        raise FileMissingError(
            f"{directory} is not an adapter: it has no {ADAPTER_CONFIG}. Give the directory of a PEFT adapter, such as "
            "a run's adapter/ or one of its checkpoints."
        )
    if not (directory / ADAPTER_WEIGHTS).is_file():
        if (directory / "adapter_model.bin").exists():
            raise AdapterError(
                f"{directory} has its weights in adapter_model.bin, a pickle, which can run code when it is read. Ask "
                "for the adapter as safetensors, or load it with PEFT where you trust it and save it again."
            )
        raise FileMissingError(f"{directory} has no {ADAPTER_WEIGHTS}; the adapter is incomplete.")


def _read_tensors(path: Path, config: FileConfig) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) > MAX_TENSORS:
                raise AdapterError(
                    f"{path} holds {counted(len(names), 'tensor')}, more than the {MAX_TENSORS} that are read."
                )
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise AdapterError(f"{path} is not a safetensors file, or is damaged: {error}") from error
    _check_tensors(tensors, config, origin=str(path))
    return tensors


def _check_tensors(tensors: Mapping[str, Tensor], config: FileConfig, origin: str) -> None:
    """Raise AdapterError unless these are the tensors of such an adapter, finite and of 32 or 16 bits."""
    config.check_tensors(tensors, origin)
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise AdapterError(f"{origin}: {name} is {tensor.dtype}; float32, float16 or bfloat16 is expected.")
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{origin}: {name} holds values that are not finite; the adapter is broken.")
