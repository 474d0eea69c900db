"""Open a model directory once: its config, its tensors and its files, each read when it is first asked for, and kept.

What works on a base takes a ModelDirectory, not a path, so that no file is listed or parsed twice. What was read stays
as it was, also where a file changes meanwhile: open the directory again to see that.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from qlora_trainer.common.boundary import library_boundary
from qlora_trainer.common.errors import FileMissingError, ModelError
from qlora_trainer.common.file_identity import FileIdentity
from qlora_trainer.weights.listing import list_tensors, read_json_object, weight_statistics
from qlora_trainer.weights.model_config import ModelFacts, make_model_config, read_facts
from qlora_trainer.weights.tensors import TensorInfo, changed

CONFIG_NAME = "config.json"
GENERATION_CONFIG = "generation_config.json"


class ModelDirectory:
    """Represent a model directory: safetensors, or the import of a GGUF file. Open it by `ModelDirectory.open`.

    Args:
        path: the directory, taken as it is; `open` checks it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a model directory; nothing in it is read yet.

        Args:
            path: the directory.

        Returns:
            The directory, to be passed on.

        Raises:
            FileMissingError: there is no such directory.
            ModelError: it holds an adapter, which loaders would apply.
        """
        if not path.is_dir():
            raise FileMissingError(f"There is no model directory {path}.")
        if (path / "adapter_config.json").exists():
            raise ModelError(
                f"{path} holds adapter_config.json: it is an adapter, or a merged model with an adapter left "
                "in it, which loaders would apply again. Name the directory of the base model."
            )
        return cls(path)

    def __str__(self) -> str:
        """Return the path, as messages name the directory.

        Returns:
            The path.
        """
        return str(self.path)

    @functools.cached_property
    def config_json(self) -> Mapping[str, Any]:
        """Return what config.json holds.

        Returns:
            Its keys and values.

        Raises:
            ModelError: it cannot be read, or names files that are not read here.
        """
        path = self.path / CONFIG_NAME
        config = read_json_object(path)
        if config.get("transformers_weights"):
            raise ModelError(f"{path} names its own weight file, which is not read here.")
        if "configuration_files" in config:
            raise ModelError(f"{path} names other config files, which are not read here.")
        return config

    @functools.cached_property
    def generation_json(self) -> Mapping[str, Any]:
        """Return what generation_config.json holds, or what transformers would take from config.json in its place.

        A file that cannot be read raises ModelError.

        Returns:
            Its keys and values.
        """
        path = self.path / GENERATION_CONFIG
        if path.is_file():
            return read_json_object(path)
        config = self.config_json
        text = config.get("text_config")
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        values = {key: config.get(key, text.get(key) if isinstance(text, dict) else None) for key in keys}
        return {key: value for key, value in values.items() if value is not None}

    def config(self) -> Any:
        """Make transformers' config of the model, a new one at each call, which the caller may change.

        A config.json that cannot be read, or is of a model that transformers does not know, raises ModelError.

        Returns:
            The config.
        """
        return make_model_config(self.config_json, self.path)

    @functools.cached_property
    def facts(self) -> ModelFacts:
        """Return what the config says of the model; errors are those of `config`.

        Returns:
            The facts.
        """
        config = self.config()
        with library_boundary(f"{self.path / CONFIG_NAME} cannot be read as a model's config"):
            return read_facts(config)

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return every tensor by name, in the order they lie on disk; errors are those of `list_tensors`.

        Returns:
            The tensors by name.
        """
        return list_tensors(self.path, self.config)

    @functools.cached_property
    def quant_states(self) -> Mapping[str, Mapping[str, TensorInfo]]:
        """Return what is stored next to each prequantized weight, as `weight_statistics` does.

        Returns:
            By the weight's name, its tensors by key.
        """
        return weight_statistics(self.tensors)

    @property
    def file_identity(self) -> tuple[FileIdentity, ...]:
        """Return what identifies the files of weights, as they were when the tensors were listed.

        Returns:
            The identities, sorted by path.
        """
        found = {info.source.identity.path: info.source.identity for info in self.tensors.values()}
        return tuple(found[path] for path in sorted(found))

    def refuse_changed(self) -> None:
        """Refuse a directory in which a file of weights is no longer the one whose tensors were listed.

        Raises:
            ModelError: a file is another one.
        """
        for file in self.file_identity:
            if not file.is_current():
                raise changed(Path(file.path))

    def read(
        self,
        name: str,
        rows: slice | None = None,  # of the first dimension; step 1
    ) -> Tensor:
        """Read a tensor, or some of its rows, as `TensorInfo.read` does.

        Args:
            name: the checkpoint's.
            rows: None for all.

        Returns:
            The tensor on the CPU; do not write into it.
        """
        return self.tensors[name].read(rows)
