"""Translate a GGUF file's tensors into the model's own checkpoint: their names, and the layout of their values.

llama.cpp renames tensors, interleaves the rows of rotary heads, and adds one to some norms. transformers knows all of
that by architecture, in two kinds of tables (older ones with processors of numpy arrays, newer ones with weight
conversions). Both are used here for one tensor at a time; transformers' own loader takes the whole model into memory.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import Tensor

from qlora_trainer.common.errors import ModelError
from qlora_trainer.common.quiet import quiet_transformers
from qlora_trainer.common.transformers_internals import (
    gguf_conversion_architectures,
    gguf_conversion_mapping,
    gguf_table,
    gguf_table_architectures,
    renamed,
    tied_weight_names,
)
from qlora_trainer.common.units import counted

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Translation:
    """Say what one GGUF tensor becomes: its name and shape in the checkpoint, and how its values are converted."""

    name: str
    shape: tuple[int, ...]
    convert: Callable[[np.ndarray], Tensor]  # dequantized float32 values -> float32, in the checkpoint's layout


def translations_of(
    config: "PretrainedConfig", path: Path, architecture: str, names: list[str]
) -> dict[str, Translation]:
    """Translate the tensors of a model that was imported before, as `translate_tensors` does.

    Args:
        config: transformers', of the imported model.
        path: the import's directory, for error messages.
        architecture: llama.cpp's name of it, such as "llama".
        names: the file's tensors.

    Returns:
        GGUF tensor name -> what it becomes.
    """
    with quiet_transformers(), torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return translate_tensors(architecture, names, model, path)


def translate_tensors(
    architecture: str, names: list[str], model: "PreTrainedModel", path: Path
) -> dict[str, Translation]:
    """Translate the names of a file's tensors, and check that they are exactly the model's, each once.

    Args:
        architecture: llama.cpp's name of it, such as "llama".
        names: the file's tensors.
        model: may be on meta.
        path: the file, for error messages.

    Returns:
        GGUF tensor name -> what it becomes.

    Raises:
        ModelError: tensors of the model are missing or double, or it is a mixture of experts.
    """
    if architecture in gguf_conversion_architectures():
        translations = _newer_translations(architecture, names, model)
    else:
        translations = _table_translations(architecture, names, model)
    if any(".experts." in name for name in model.state_dict()):
        raise ModelError(
            f"{path} holds a mixture of experts ({architecture}). Its experts cannot be taken from GGUF here; use the "
            "safetensors directory or hub name of the model."
        )
    tied = set(tied_weight_names(model))
    expected = {name for name in model.state_dict() if name not in tied}
    made = Counter(translation.name for translation in translations.values())
    if missing := sorted(expected - set(made)):
        raise ModelError(
            f"{path} lacks {len(missing):,} of the {counted(len(expected), 'tensor')} of a {architecture} "
            f"model, such as "
            f"{', '.join(missing[:3])}. It may be damaged, or of a variant that transformers does not know."
        )
    if doubled := sorted(name for name in expected if made[name] > 1):
        raise ModelError(
            f"{path} holds more than one tensor for {', '.join(doubled[:3])}. Download it again, or use the model's "
            "safetensors directory."
        )
    return {gguf_name: found for gguf_name, found in translations.items() if found.name in expected}


def _table_translations(architecture: str, names: list[str], model: "PreTrainedModel") -> dict[str, Translation]:
    """Translate by transformers' older tables, which have a processor of numpy arrays for each architecture."""
    process, name_map = gguf_table(architecture, model)

    def convert(values: np.ndarray, gguf_name: str) -> Tensor:
        side_output: dict[str, dict[str, Tensor]] = {"tensors": {}}
        result = process(weights=values, name=gguf_name, tensor_key_mapping=name_map, parsed_parameters=side_output)
        # One processor (GPT-2's, for its head) puts its tensor into parsed_parameters instead of returning it.
        if not result.name:
            return next(iter(side_output["tensors"].values()))
        return torch.from_numpy(np.ascontiguousarray(result.weights))  # the very array where nothing is to be done

    shapes = _shapes(model)
    return {
        name: Translation(name_map[name], shapes[name_map[name]], partial(convert, gguf_name=name))
        for name in names
        if name in name_map
    }


def _newer_translations(architecture: str, names: list[str], model: "PreTrainedModel") -> dict[str, Translation]:
    """Translate by transformers' newer weight conversions."""
    renamings, converters = gguf_conversion_mapping(architecture, model.config)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    def convert(values: np.ndarray, operations: list[Any], name: str) -> Tensor:
        tensor = torch.tensor(values)
        for operation in operations:
            (tensor,) = operation.convert({name: tensor}, [name], [name], full_layer_name=name).values()
        return tensor

    shapes = _shapes(model)
    translations = {}
    for gguf_name in names:
        name, pattern = renamed(gguf_name, renamings, converters)
        operations = by_pattern[pattern].operations if pattern is not None else []
        if name in shapes:
            translations[gguf_name] = Translation(
                name, shapes[name], partial(convert, operations=operations, name=name)
            )
    return translations


def _shapes(model: "PreTrainedModel") -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def readable_architectures() -> list[str]:
    """List the architectures of GGUF files that transformers can translate.

    Returns:
        llama.cpp's names, sorted.
    """
    return sorted((gguf_table_architectures() | gguf_conversion_architectures()) - {"general", "tokenizer"})
