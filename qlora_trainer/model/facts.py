"""Read facts of a model from its config.json: positions, vocabulary, layer kinds, quantization.

Left out: anything about its weights (weights/model_directory.py).
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from qlora_trainer.common.errors import ModelError, first_line


def read_config(directory: Path) -> Any:
    """transformers' config of a model directory; ModelError where it cannot be read."""
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{directory / 'config.json'} cannot be read as a model's config: {first_line(error)}"
        ) from error


def max_positions(directory: Path) -> int | None:
    """How many positions the model was made for, or None where its config does not say."""
    config = read_config(directory).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def vocabulary_size(directory: Path) -> int | None:
    """Rows of the model's embedding, or None where its config does not say."""
    return getattr(read_config(directory).get_text_config(), "vocab_size", None)


def is_prequantized(directory: Path) -> bool:
    """Whether a model directory holds weights that are quantized already."""
    return getattr(read_config(directory), "quantization_config", None) is not None


def refuse_multi_modal(config: Any, directory: Path) -> None:
    """transformers gives some of them whole as causal language models; the adapter would train the vision tower too."""
    towers = [kind for kind in ("vision", "audio") if getattr(config, f"{kind}_config", None) is not None]
    if towers:
        raise ModelError(
            f"{directory} holds a model of several kinds of input ({config.model_type}, with a part for "
            f"{' and '.join(towers)}). Only text models are trained here: choose one "
            "that takes text alone."
        )


def layer_kinds(directory: Path) -> list[str]:
    """The kind of each decoder layer, where the config tells them apart (attention windows); else all the same."""
    config = read_config(directory).get_text_config()
    return list(getattr(config, "layer_types", None) or ["layer"] * config.num_hidden_layers)


def keep_layers(config: Any, layers: int) -> None:
    """Cut the config to its first `layers` layers, and every list that has an entry a layer with it."""
    before = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers
