"""Make the config of a GGUF file say what the file's metadata say, or refuse the file by the key.

transformers maps some of a file's keys and drops the others: rope scaling, partly rotated heads, windows, the scale of
attention. So its config is taken as a start only. Each key of the file is looked up in the tables of
metadata_table.py: it is set in the config, known not to matter, or named in an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig

from qlora_trainer.common.boundary import library_boundary
from qlora_trainer.common.errors import ModelError
from qlora_trainer.weights.gguf import metadata_table as table
from qlora_trainer.weights.gguf.metadata_table import Rule, Table
from qlora_trainer.weights.gguf.rope import FACTOR_TENSORS, ROPE_DIVISORS, read_rope, restore_divisors

_LARGE_LAYERS = {"gemma2": 46, "gemma3": 62}  # of the 27B, whose scale of attention is not by the size of a head
_PERIODS = {"gemma2": 2, "gemma3": 6, "gemma4": 6}  # the last layer of each period has no window
_NONE_AT_ZERO = ("attention.sliding_window", "final_logit_softcapping", "attn_logit_softcapping")
_WAY_OUT = "Use the model's safetensors directory or hub name."


@dataclass(frozen=True)
class Metadata:
    """Hold the metadata of a GGUF file."""

    architecture: str
    model: dict[str, Any]  # keys of the model, named without the architecture
    tokenizer: dict[str, Any]  # keys that begin with "tokenizer.", named without that
    others: list[str]  # keys that llama.cpp does not read

    def warnings(self) -> list[str]:
        """Warn of keys that neither the model nor its tokenizer has.

        Returns:
            Warnings for the user.
        """
        what = "Metadata of the GGUF file that say nothing of its model are not read"
        return [f"{what}: {', '.join(self.others[:5])}."] if self.others else []


@dataclass
class Changes:
    """Hold what the metadata say of transformers' config, and what of them cannot be said there."""

    path: Path
    metadata: Metadata
    values: dict[str, Any] = field(default_factory=dict)
    head_dim: int | None = None
    divisors: Tensor | None = None  # of the rotary frequencies
    used_tensors: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def key(self, name: str, usual: Any = None) -> Any:
        """Return a value of the file's metadata.

        Args:
            name: without the architecture.
            usual: where the file has none.

        Returns:
            The value.
        """
        return self.metadata.model.get(name, usual)

    def add_problem(self, name: str, value: Any) -> None:
        """Note a key that cannot be said in the config.

        Args:
            name: the key, without the architecture.
            value: the file's.
        """
        self.problems.append(f"{self.metadata.architecture}.{name} = {_short(value)}")


def read_metadata(reader: Any, path: Path) -> Metadata:
    """Read the metadata of a file, but for the long lists of its tokenizer.

    Args:
        reader: gguf's reader of the file.
        path: the file, for error messages.

    Returns:
        The metadata.

    Raises:
        ModelError: a value cannot be read, or the file holds no model.
    """
    with library_boundary(f"The metadata of {path} cannot be read"):
        architecture = str(reader.get_field("general.architecture").contents())
        model, tokenizer, others = {}, {}, []
        for name, entry in reader.fields.items():
            first, _, rest = name.partition(".")
            if first == architecture:
                model[rest] = entry.contents()
            elif first == "tokenizer":
                tokenizer[rest] = entry.contents() if len(entry.data) <= 1 else None
            elif first not in table.NOTES:
                others.append(name)
        kind = reader.get_field("general.type")
        content = "model" if kind is None else kind.contents()
    if content != "model":
        raise ModelError(f"{path} holds no model: its general.type is {content!r}. Name the file of the model.")
    return Metadata(architecture, model, tokenizer, others)


def read_changes(metadata: Metadata, reader: Any, path: Path) -> Changes:
    """Read what the metadata of a file say of its config.

    Args:
        metadata: of the file.
        reader: gguf's reader of the file.
        path: the file, for error messages.

    Returns:
        The values of the config that the metadata give.

    Raises:
        ModelError: a key is in no table, or its value cannot be said in transformers' config.
    """
    changes = Changes(path, metadata)
    keys = table.TABLES.get(metadata.architecture)
    if keys is None:
        return changes
    with library_boundary(f"The metadata of {path} cannot be read"):
        _refuse_tokenizer_keys(changes)
        _set_plain_keys(changes, keys)
        _set_heads(changes, keys)
        _set_windows(changes, keys)
        if Rule.ROPE in keys.values():
            tensors = {
                tensor.name: torch.from_numpy(np.array(tensor.data, dtype=np.float32))
                for tensor in reader.tensors
                if tensor.name in FACTOR_TENSORS
            }
            _set_rope(changes, tensors)
            changes.divisors = tensors.get(ROPE_DIVISORS)
    if changes.problems:
        raise ModelError(
            f"{path} has metadata that transformers' config of {metadata.architecture} cannot hold, so another model "
            f"than the file's would be trained: {'; '.join(sorted(changes.problems))}. {_WAY_OUT}"
        )
    return changes


def restore_config(config: PretrainedConfig, changes: Changes) -> PretrainedConfig:
    """Make transformers' config of a file say what the file's metadata say.

    Args:
        config: as transformers reads it from the file.
        changes: what the metadata say; gets the names of further tensors that are used.

    Returns:
        The config.

    Raises:
        ModelError: the architecture has no table, or the values make no config.
    """
    path, architecture = changes.path, changes.metadata.architecture
    if architecture in table.REFUSED:
        return config
    if architecture not in table.TABLES:
        raise ModelError(f"{path} holds a {architecture}, of whose metadata the meaning is not known here. {_WAY_OUT}")
    kind, values = type(config), config.to_dict()
    if architecture == "llama":
        kind = LlamaConfig  # transformers takes a file whose name is "mistral" for another class
        values["model_type"] = kind.model_type
    for stray in table.STRAY.get(architecture, ()):
        values.pop(stray, None)
    if architecture == "gemma4":
        # llama.cpp does not write which part of the heads is rotated; all of this architecture have transformers'.
        full = values["rope_parameters"]["full_attention"]
        changes.values["rope_parameters"]["full_attention"] = full | changes.values["rope_parameters"]["full_attention"]
    if (size := changes.head_dim) is not None and (
        "head_dim" in values or size != changes.key("embedding_length") // _heads(changes)
    ):
        values["head_dim"] = size
    values |= changes.values
    with library_boundary(f"The metadata of {path} make no config"):
        restored = kind.from_dict(values)
        if changes.divisors is None:
            return restored
        parameters = restore_divisors(restored, changes.divisors)
        if parameters is None:
            raise ModelError(
                f"{path} has {ROPE_DIVISORS}, which cannot be combined with its other rope settings. {_WAY_OUT}"
            )
        changes.used_tensors.add(ROPE_DIVISORS)
        return kind.from_dict(values | {"rope_parameters": parameters})


def stop_tokens(metadata: Metadata, config: PretrainedConfig, vocabulary: int) -> int | list[int] | None:
    """Return the tokens that end an answer: those that end a text, a turn and a message, each once.

    Args:
        metadata: of the file.
        config: transformers', which has the token that ends a text.
        vocabulary: how many tokens there are; an id beyond them is none, as llama.cpp takes it.

    Returns:
        The ids, the value of eos_token_id in generation_config.json.
    """
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    named = [metadata.tokenizer.get(f"ggml.{name}_token_id") for name in ("eot", "eom")]
    unique = [*dict.fromkeys(token for token in [*ends, *named] if token is not None and 0 <= token < vocabulary)]
    return unique if len(unique) > 1 else next(iter(unique), None)


def _refuse_tokenizer_keys(changes: Changes) -> None:
    for name, value in changes.metadata.tokenizer.items():
        if name not in table.TOKENIZER | table.TOKENIZER_NO_MATTER and not name.startswith("chat_template."):
            changes.problems.append(f"tokenizer.{name} = {_short(value)}")


def _set_plain_keys(changes: Changes, keys: Table) -> None:
    """Set what is one value of the config, and gather the keys that are in no table."""
    for name, value in changes.metadata.model.items():
        rule = keys.get(name)
        if name in table.NO_MATTER or (_is_neutral(name, value) and not isinstance(rule, str)):
            continue
        if name.startswith("expert_") and changes.key("expert_count", 0) == 0:
            continue
        if name == "attention.sliding_window" and rule is None and value >= changes.key("context_length", 0):
            continue
        if rule is None:
            changes.add_problem(name, value)
        elif isinstance(rule, str):
            if _is_list(value) and len({*value}) != 1:
                changes.add_problem(name, f"{_short(value)} (not the same in each layer)")
            else:
                value = value[0] if _is_list(value) else value
                # A softcap or a window of 0 is none; other sizes of 0 are as the file has them.
                changes.values[rule] = None if _is_neutral(name, value) and name in _NONE_AT_ZERO else value
    for name in table.REQUIRED:
        if name in keys and name not in changes.metadata.model:
            changes.problems.append(f"{changes.metadata.architecture}.{name} is missing")


def _set_heads(changes: Changes, keys: Table) -> None:
    """Set the size of heads, the number of heads of keys and values, and the scale of attention."""
    heads, hidden = _heads(changes), changes.key("embedding_length", 0)
    if (
        keys.get("attention.head_count_kv") == "num_key_value_heads"
        and "attention.head_count_kv" not in changes.metadata.model
    ):
        changes.values["num_key_value_heads"] = heads
    if keys.get("attention.head_count_kv") is Rule.FALCON_HEADS:
        # Of several, llama.cpp reorders the weights, which transformers does not undo.
        if (count := changes.key("attention.head_count_kv", 1)) != 1:
            changes.add_problem("attention.head_count_kv", count)
        changes.values |= {"num_kv_heads": 1, "multi_query": True, "new_decoder_architecture": False}
    length = changes.key("feed_forward_length", 4 * hidden)
    if keys.get("feed_forward_length") is Rule.FOUR_TIMES and length != 4 * hidden:
        changes.add_problem("feed_forward_length", length)
    if keys.get("ssm.inner_size") is Rule.STATE_SIZE and hidden:
        inner = changes.key("ssm.inner_size", 2 * hidden)
        changes.values["expand"] = inner // hidden
        if inner % hidden:
            changes.add_problem("ssm.inner_size", inner)
    if not heads:
        return
    size = changes.key("attention.key_length", hidden // heads)
    if keys.get("attention.key_length") is Rule.KEY_LENGTH:
        changes.head_dim = size
    values = changes.key("attention.value_length", size)
    if keys.get("attention.value_length") is Rule.VALUE_LENGTH and values != size:
        changes.add_problem("attention.value_length", f"{values} (keys have {size})")
    if keys.get("attention.scale") is Rule.SCALE:
        is_large = changes.key("block_count") == _LARGE_LAYERS[changes.metadata.architecture]
        scale = changes.key("attention.scale") or (hidden // heads if is_large else size) ** -0.5
        scalar = round(scale**-2)
        if abs(scalar - scale**-2) > 1e-3 * scalar:  # transformers' config has an integer
            changes.add_problem("attention.scale", scale)
        changes.values["query_pre_attn_scalar"] = scalar


def _set_windows(changes: Changes, keys: Table) -> None:
    """Set the sliding window, and which layers have it."""
    if "attention.sliding_window" not in keys:
        return
    architecture, window = changes.metadata.architecture, changes.key("attention.sliding_window")
    if architecture not in _PERIODS:
        changes.values["sliding_window"] = window or None
        return
    layers, pattern = changes.key("block_count", 0), changes.key("attention.sliding_window_pattern")
    if architecture == "gemma2" and window is None:
        window = 4096
    if not window:
        # No layer has a window, and the config wants a number.
        changes.values |= {"layer_types": ["full_attention"] * layers, "sliding_window": 4096}
        return
    changes.values["sliding_window"] = window
    if _is_list(pattern):
        slides = [bool(each) for each in pattern]
    else:
        period = int(pattern or _PERIODS[architecture])
        slides = [place % period < period - 1 for place in range(layers)]
    if len(slides) != layers:
        changes.add_problem("attention.sliding_window_pattern", f"{_short(pattern)} (of {layers} layers)")
    changes.values["layer_types"] = ["sliding_attention" if slide else "full_attention" for slide in slides]


def _set_rope(changes: Changes, tensors: Mapping[str, Tensor]) -> None:
    """Set the rope parameters."""
    architecture, heads = changes.metadata.architecture, _heads(changes)
    local = {"rope_type": "default", "rope_theta": float(changes.key("rope.freq_base_swa", 10000.0))}
    if architecture == "gemma4":
        full = {"rope_theta": float(changes.key("rope.freq_base", 10000.0))}
        changes.values["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
        return
    if not heads:
        return
    size, context = changes.head_dim or changes.key("embedding_length", 0) // heads, changes.key("context_length", 0)
    rope = read_rope(changes.metadata.model, size, context, tensors, architecture in table.PARTIALLY_ROTATED)
    changes.used_tensors |= rope.used
    changes.problems += [f"{architecture}.{problem}" for problem in rope.problems]
    changes.values["rope_parameters"] = rope.parameters
    if architecture == "gemma3":
        changes.values["rope_parameters"] = {"full_attention": rope.parameters, "sliding_attention": local}
    if architecture == "phi3" and rope.parameters["rope_type"] == "yarn":
        changes.add_problem("rope.scaling.type", "yarn")  # transformers takes it for longrope
    if architecture == "phi3" and rope.parameters["rope_type"] == "longrope":
        original = rope.parameters["original_max_position_embeddings"]
        changes.values["original_max_position_embeddings"] = original


def _heads(changes: Changes) -> int:
    """Return the number of heads; 0 where layers differ."""
    heads = changes.key("attention.head_count", 0)
    return 0 if _is_list(heads) else int(heads)


def _is_neutral(name: str, value: Any) -> bool:
    return {*(value if _is_list(value) else [value])} <= {*table.NEUTRAL.get(name, ())}


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _short(value: Any) -> str:
    text = "a list" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
