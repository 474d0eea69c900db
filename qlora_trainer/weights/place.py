"""Find a base model on the disk by its name, without torch, so that a wrong path is reported at once.

Left out: fetching from the hub and importing GGUF files (model/source.py).
"""

from pathlib import Path

from qlora_trainer.common.errors import FileMissingError, ModelError


def local_model(name: str) -> Path | None:
    """Find the file or directory that a model's name represents.

    Args:
        name: of the model.

    Returns:
        A GGUF file, or a directory with a config.json; None for a hub name.

    Raises:
        FileMissingError: it looks like a path and does not exist.
        ModelError: the directory holds an adapter or no config.
    """
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return path
    if path.is_dir():
        if (path / "adapter_config.json").exists():
            raise ModelError(
                f"{path} holds an adapter, not a base model. Name the base as model.name, and this directory as "
                "adapter.init_from to start from it."
            )
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} has no config.json, so it is not a transformers model directory.")
        return path
    if path.suffix == ".gguf" or path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        hint = "" if path.suffix == ".gguf" or name.count("/") > 1 else " A hub name has the form owner/model."
        raise FileMissingError(f"There is no model at {name}.{hint}")
    return None
