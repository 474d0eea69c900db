"""What tests of whole runs share: a display that shows nothing, a config changed by hand, the adapter that came out."""

from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor


def quiet(record: dict[str, Any]) -> None:
    """A display that shows nothing."""


def edit_config(directory: Path, section: str, **fields: Any) -> None:
    """Change a run's config.yaml by hand."""
    path = directory / "config.yaml"
    raw = yaml.safe_load(path.read_text())
    raw[section] |= fields
    path.write_text(yaml.safe_dump(raw))


def final_adapter(directory: Path) -> dict[str, Tensor]:
    """The tensors of a run's adapter."""
    return load_file(directory / "adapter" / "adapter_model.safetensors")


def no_load(*args: object, **kwargs: object) -> None:
    """Take the place of what loads a base, where a mistake is to be found before."""
    raise AssertionError("the base was loaded, though the mistake could be found before")
