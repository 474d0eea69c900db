"""Make transformers' config object of a parsed config.json, and read from it what is asked of a model most often.

AutoConfig.from_pretrained would read the file again at each call; its steps from the parsed file on are taken here.
Left out: configs that need code from the model directory, which is not run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING

from qlora_trainer.common.boundary import library_boundary
from qlora_trainer.common.errors import ModelError

_LENGTHENING = ("yarn", "linear", "dynamic")  # of rotary embeddings
_COUNTS = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size"),
    *("intermediate_size", "vocab_size", "max_position_embeddings"),
)
_FLOATS = {name: float(name) for name in ("NaN", "Infinity", "-Infinity")}


@dataclass(frozen=True)
class ModelFacts:
    """Hold what a config says of its model."""

    positions: int | None  # that the model was made for, scaled; None where the config does not say
    vocabulary: int | None  # rows of the embedding; None where the config does not say
    layer_kinds: tuple[str, ...]  # of each decoder layer, such as attention windows; all "layer" where they are alike
    is_prequantized: bool  # the weights are quantized already


def make_model_config(config_json: Mapping[str, Any], directory: Path) -> Any:
    """Make the config that AutoConfig.from_pretrained gives for a model directory.

    Args:
        config_json: what its config.json holds; not changed.
        directory: for messages, and what the config says of where it comes from.

    Returns:
        A new config object, which the caller may change.

    Raises:
        ModelError: no such model is known, or the values are not those of one.
    """
    values = _with_floats(config_json)
    kind = values.get("model_type")
    if kind == "mistral" and "layer_types" in values:
        kind = values["model_type"] = "ministral"  # as AutoConfig does, for attention that alternates
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ModelError(
            f"{directory / 'config.json'} names the model type {kind!r}, which transformers {transformers.__version__} "
            "does not know. Choose another model, or install a newer transformers."
        )
    counts = _impossible_counts(values, CONFIG_MAPPING[kind].attribute_map)
    if isinstance(text := values.get("text_config"), Mapping):
        counts |= {f"text_config.{key}": value for key, value in _impossible_counts(text, {}).items()}
    if counts:
        named = ", ".join(f"{key}: {value}" for key, value in counts.items())
        raise ModelError(f"{directory / 'config.json'} says {named}, and no such number may be less than 1.")

    def make(values: dict[str, Any]) -> Any:
        # A copy, as the config object keeps and changes what it is given.
        return CONFIG_MAPPING[kind].from_dict(_with_floats(values), name_or_path=str(directory))

    with library_boundary(f"{directory / 'config.json'} cannot be read as a model's config", config_json, make):
        return make(values)


def _impossible_counts(values: Mapping[str, Any], others: Mapping[str, str]) -> dict[str, int]:
    """Find the counts that are not positive, from which transformers would make a model without layers or rows.

    Args:
        values: of a config, or of its text part.
        others: {our name of a count: the name that the model's config has}.

    Returns:
        {key: count}; what is no whole number is left to transformers.
    """
    keys = {key for name in _COUNTS for key in (name, others.get(name, name))}
    return {key: value for key, value in values.items() if key in keys and type(value) is int and value < 1}


def read_facts(config: Any) -> ModelFacts:
    """Read from transformers' config what planning and data preparation ask of a model.

    Args:
        config: of the model; for one with several parts, the text part is read.

    Returns:
        The facts.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["layer"] * text.num_hidden_layers
    return ModelFacts(
        positions=scaled_positions(text),
        vocabulary=getattr(text, "vocab_size", None),
        layer_kinds=tuple(kinds),
        is_prequantized=getattr(config, "quantization_config", None) is not None,
    )


def scaled_positions(config: Any) -> int | None:
    """Return the positions that a model was made for, with those that scaling its rotary embedding adds.

    The rule is vLLM's, and that of transformers' own checks. YaRN reaches its factor times the original positions. For
    linear and dynamic scaling, max_position_embeddings is the original, unless the config names an original that is
    less. For llama3, longrope and Gemma 3, max_position_embeddings has the scaling in it.

    Args:
        config: transformers', of a text model.

    Returns:
        The positions; None where the config does not say.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or "gemma3" in config.model_type:
        return positions
    for each in rope_settings(config):
        kind, factor = each.get("rope_type", each.get("type")), each.get("factor")
        if kind not in _LENGTHENING or not isinstance(factor, int | float) or factor < 1:
            continue
        original = each.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        if kind == "yarn" or original is None or original >= positions:
            return int((original or positions) * factor)
    return positions


def rope_settings(config: Any) -> list[Mapping[str, Any]]:
    """Return the settings of a model's rotary embeddings.

    Args:
        config: transformers', of a text model.

    Returns:
        One mapping, or one for each kind of layer where they differ; none where the config has no such settings.
    """
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, Mapping):
        return []
    return [each for each in rope.values() if isinstance(each, Mapping)] or [rope]


def vocabulary_corrections(config_json: Mapping[str, Any], config: Any, rows: int) -> dict[str, Any]:
    """Find what to write in a config.json so that it says another size of the vocabulary.

    Args:
        config_json: what it holds; not changed.
        config: transformers' config of it.
        rows: of embedding and LM head.

    Returns:
        The keys with the values to write: of the part for text where the file has one, and of the whole where that
        says a size too.
    """
    text = config.get_text_config()
    name = text.attribute_map.get("vocab_size", "vocab_size")
    names = {"vocab_size", name, *(other for other, known in text.attribute_map.items() if known == name)}
    parts = [key for key, value in vars(config).items() if value is text and isinstance(config_json.get(key), Mapping)]
    found: dict[str, Any] = dict.fromkeys(names & config_json.keys() or ([] if parts else [name]), rows)
    for key in parts:
        part = config_json[key]
        found[key] = {**part, **dict.fromkeys(names & part.keys() or [name], rows)}
    return found


def _with_floats(value: Any) -> Any:
    """Copy nested JSON, with the floats JSON has no words for, which transformers writes as {"__float__": "NaN"}."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"} and (name := value["__float__"]) in _FLOATS:
            return _FLOATS[name]
        return {key: _with_floats(item) for key, item in value.items()}
    return [_with_floats(item) for item in value] if isinstance(value, list) else value
