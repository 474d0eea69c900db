"""What a config.json says of its model is read by its meaning, and what cannot be is refused by key and value."""

from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, MistralConfig

from qlora_trainer.common.errors import ModelError
from qlora_trainer.weights.model_config import make_model_config, read_facts, rope_settings, vocabulary_corrections

LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 70, "max_position_embeddings": 64}
COUNTS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size")


@pytest.mark.parametrize("key", [*COUNTS, "head_dim", "vocab_size", "max_position_embeddings"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_count_that_is_not_positive_is_refused_by_key_and_value(key: str, value: int) -> None:
    with pytest.raises(ModelError, match=f"config.json says {key}: {value}, .* less than 1"):
        make_model_config({**LLAMA, key: value}, Path("model"))


def test_counts_are_known_by_the_names_of_their_model_and_inside_the_text_part() -> None:
    with pytest.raises(ModelError, match="n_layer: -1"):
        make_model_config({"model_type": "gpt2", "n_layer": -1}, Path("model"))
    with pytest.raises(ModelError, match=r"text_config\.num_hidden_layers: -1"):
        make_model_config({"model_type": "gemma3", "text_config": {"num_hidden_layers": -1}}, Path("model"))


def test_all_counts_that_are_not_positive_are_named_at_once() -> None:
    with pytest.raises(ModelError, match="num_hidden_layers: -1, vocab_size: 0"):
        make_model_config({**LLAMA, "num_hidden_layers": -1, "vocab_size": 0}, Path("model"))


def test_a_config_is_that_of_the_named_model_and_the_files_values_stay() -> None:
    values = {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "eos_token_id": [1, 2]}
    before = repr(values)
    config = make_model_config(values, Path("a/model"))
    assert isinstance(config, LlamaConfig)
    assert (config.name_or_path, config.eos_token_id) == ("a/model", [1, 2])
    config.rope_parameters["rope_theta"] = 1.0
    assert repr(values) == before
    assert isinstance(make_model_config({"model_type": "gpt2"}, Path("model")), GPT2Config)


def test_a_config_that_is_refused_leaves_the_files_values_as_they_were() -> None:
    values = {**LLAMA, "hidden_size": 65, "rope_scaling": {"type": "linear", "factor": 2.0}}
    before = repr(values)
    with pytest.raises(ModelError, match="The key at fault is hidden_size: 65"):
        make_model_config(values, Path("model"))
    assert repr(values) == before


def test_attention_that_alternates_in_a_mistral_is_ministrals() -> None:
    plain = make_model_config({"model_type": "mistral"}, Path("model"))
    assert isinstance(plain, MistralConfig)
    kinds = ["full_attention", "sliding_attention"]
    mixed = make_model_config({"model_type": "mistral", "layer_types": kinds, "num_hidden_layers": 2}, Path("model"))
    assert mixed.model_type == "ministral"
    assert read_facts(mixed).layer_kinds == tuple(kinds)


@pytest.mark.parametrize(("word", "number"), [("Infinity", float("inf")), ("-Infinity", float("-inf"))])
def test_floats_that_json_has_no_words_for_are_read(word: str, number: float) -> None:
    config = make_model_config({**LLAMA, "limit": [{"__float__": word}], "other": {"__float__": "x"}}, Path("model"))
    assert config.limit == [number]
    assert config.other == {"__float__": "x"}


@pytest.mark.parametrize("kind", [None, 3, "no-such-model", ["llama"]])
def test_a_model_that_is_not_known_is_refused_with_its_name(kind: object) -> None:
    with pytest.raises(ModelError, match=r"names the model type .* does not know"):
        make_model_config({"model_type": kind}, Path("model"))


def test_facts_say_what_the_config_says() -> None:
    facts = read_facts(make_model_config(LLAMA, Path("model")))
    assert facts.positions == 64
    assert facts.vocabulary == 70
    assert facts.layer_kinds == ("layer", "layer")
    assert not facts.is_prequantized
    quantized = make_model_config({**LLAMA, "quantization_config": {"quant_method": "bitsandbytes"}}, Path("model"))
    assert read_facts(quantized).is_prequantized


def test_settings_of_rotary_embeddings_are_one_or_one_for_each_kind_of_layer() -> None:
    one = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    assert rope_settings(LlamaConfig(rope_parameters=one)) == [one]
    two = {"sliding_attention": {"rope_type": "default"}, "full_attention": one}
    config = LlamaConfig()
    config.rope_parameters = two
    assert rope_settings(config) == [{"rope_type": "default"}, one]
    config.rope_parameters = None
    assert rope_settings(config) == []


@pytest.mark.parametrize(
    ("config_json", "corrections"),
    [
        (LLAMA, {"vocab_size": 90}),
        ({"model_type": "xlm", "n_words": 70}, {"n_words": 90}),
        ({"model_type": "gpt2"}, {"vocab_size": 90}),
        (
            {"model_type": "gemma3", "text_config": {"vocab_size": 70, "num_hidden_layers": 2}},
            {"text_config": {"vocab_size": 90, "num_hidden_layers": 2}},
        ),
        (
            {"model_type": "fuyu", "vocab_size": 70, "text_config": {"model_type": "persimmon", "vocab_size": 70}},
            {"vocab_size": 90, "text_config": {"model_type": "persimmon", "vocab_size": 90}},
        ),
        ({"model_type": "fuyu", "vocab_size": 70}, {"vocab_size": 90}),
    ],
    ids=str,
)
def test_a_longer_vocabulary_is_written_wherever_the_config_says_its_size(
    config_json: dict[str, Any], corrections: dict[str, Any]
) -> None:
    found = vocabulary_corrections(config_json, make_model_config(config_json, Path("model")), 90)
    assert found == corrections
    assert read_facts(make_model_config({**config_json, **found}, Path("model"))).vocabulary == 90
