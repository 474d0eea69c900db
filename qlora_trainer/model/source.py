"""Find a base model by its name: a hub name, a directory of safetensors or a GGUF file becomes a directory.

Left out: finding it on the disk (weights/place.py), what is in the directory (weights/model_directory.py), and its
tokenizer (tokenizer.py).
"""

import os
from collections.abc import Sequence
from pathlib import Path

from qlora_trainer.common.atomic import refuse_unwritable
from qlora_trainer.common.errors import FileMissingError, ModelError, first_line
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.weights.gguf.importer import import_gguf
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.place import local_model

TOKENIZER_FILES = ("*.json", "*.model", "*.jinja", "*.txt")  # and the config
WEIGHT_FILES = (*TOKENIZER_FILES, "*.safetensors")  # no pickles
CONFIG_FILES = ("config.json",)
NOT_FETCHED = ("original/*", "onnx/*", "consolidated*.safetensors")  # the same weights again, in other formats


def resolve_model(
    name: str, revision: str | None, cache_dir: Path, progress: Progress = silent, files: Sequence[str] = WEIGHT_FILES
) -> ModelDirectory:
    """Open the model directory that `name` represents: a directory, a GGUF file (imported once), or a hub name.

    A path without a model raises FileMissingError or ModelError; a hub name that cannot be fetched ModelError; files
    that cannot be kept raise DiskError.

    Args:
        name: of the model.
        revision: of the hub's repository; None for its main branch.
        cache_dir: the user's, for imports of GGUF files.
        progress: is called during an import.
        files: patterns of those to fetch of a hub name.

    Returns:
        The directory.
    """
    path = local_model(name)
    if path is None:
        return ModelDirectory.open(_fetch(name, revision, files))
    return ModelDirectory.open(path if path.is_dir() else import_gguf(path, cache_dir, progress))


def _fetch(name: str, revision: str | None, files: Sequence[str]) -> Path:
    """Fetch the files of a hub model that match `files`, into the hub's own cache, where another run finds them."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    # The hub's errors derive from those of its HTTP library, which is another one in each of its major versions.
    http_errors = [k for k in HfHubHTTPError.__mro__ if issubclass(k, Exception) and k.__name__ == "HTTPError"]
    not_fetched: tuple[type[Exception], ...] = (HfHubHTTPError, LocalEntryNotFoundError, OSError, *http_errors)
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(files), ignore_patterns=list(NOT_FETCHED))
        )
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"The hub has no model {name}, or it needs a login (`hf auth login`), and there is no such directory here."
        ) from error
    except HFValidationError as error:
        raise FileMissingError(
            f"There is no directory {name}, and a hub name has the form owner/model, of the characters a-z, A-Z, "
            "0-9, -, _ and '.'."
        ) from error
    except not_fetched as error:
        if constants.HF_HUB_OFFLINE:
            raise ModelError(
                f"The model {name} is not in the hub's cache, and HF_HUB_OFFLINE is set, so it was not fetched. Unset "
                "it, or name a directory."
            ) from error
        refuse_unwritable(Path(constants.HF_HUB_CACHE), hub_variable())
        raise ModelError(
            f"The model {name} could not be fetched from the hub: {first_line(error)}. What has arrived is kept; try "
            "again when the network is there."
        ) from error


def hub_variable() -> str:
    """Name the environment variable that moves the hub's cache: the one that is set and comes first, else HF_HOME.

    Returns:
        Its name.
    """
    return next((name for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") if name in os.environ), "HF_HOME")
