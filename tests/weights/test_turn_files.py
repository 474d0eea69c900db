"""Promises of the files on turns: as transformers reads them, a model stops where it was taught to."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, GenerationConfig

from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.turn_files import TaughtTurns, base_stop_ids, turn_files, write_turn_files

CONFIG = {"model_type": "qwen2", "bos_token_id": 5, "eos_token_id": 7, "pad_token_id": 7}
TAUGHT = TaughtTurns({7: "<|endoftext|>", 9: "<|im_end|>"})


def base(directory: Path, generation: dict[str, Any] | None, config: dict[str, Any]) -> ModelDirectory:
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return ModelDirectory.open(directory)


@pytest.mark.parametrize(
    ("generation", "config", "had", "stops"),
    [
        ({"eos_token_id": 7, "temperature": 0.6}, CONFIG, [7], [7, 9]),
        ({"eos_token_id": [8, 7], "_from_model_config": True}, CONFIG, [8, 7], [8, 7, 9]),
        ({"eos_token_id": [9, 7]}, CONFIG, [9, 7], [9, 7]),
        ({"temperature": 0.6}, CONFIG, [], [7, 9]),
        (None, CONFIG, [7], [7, 9]),
        (None, CONFIG | {"eos_token_id": [7, 9]}, [7, 9], [7, 9]),
        (None, {"model_type": "qwen2"}, [], [7, 9]),
    ],
)
def test_stop_tokens_are_the_bases_and_those_taught_as_transformers_reads_them(
    generation: dict[str, Any] | None, config: dict[str, Any], had: list[int], stops: list[int], tmp_path: Path
) -> None:
    directory = base(tmp_path, generation, config)
    assert base_stop_ids(directory) == had
    files, changes = turn_files(directory, TAUGHT)
    assert len(files) == len(changes) == (had != stops)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    if (tmp_path / "generation_config.json").exists():
        read = GenerationConfig.from_pretrained(tmp_path)
    else:
        read = GenerationConfig.from_model_config(AutoConfig.from_pretrained(tmp_path))
    assert read.eos_token_id == stops
    assert read.temperature == (generation or {}).get("temperature")
    if generation is None and files:
        assert (read.bos_token_id, read.pad_token_id) == (config.get("bos_token_id"), config.get("pad_token_id"))
    assert files == {} or "_from_model_config" not in files["generation_config.json"]
    assert changes == [] or "<|im_end|> (9)" in changes[0]


def test_one_stop_token_of_a_base_without_any_is_a_number(tmp_path: Path) -> None:
    files, _ = turn_files(base(tmp_path, {}, CONFIG), TaughtTurns({9: "<|im_end|>"}))
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": 9}


def test_an_adapters_directory_gets_the_files_changed_or_not(tmp_path: Path) -> None:
    directory = base(tmp_path, {"eos_token_id": [7, 9], "top_k": 3}, CONFIG)
    output = tmp_path / "adapter"
    output.mkdir()
    write_turn_files(directory, TaughtTurns(TAUGHT.stop_tokens, {"default": "A\n", "tool_use": "B"}), output)
    assert json.loads((output / "generation_config.json").read_text()) == {"eos_token_id": [7, 9], "top_k": 3}
    assert (output / "chat_template.jinja").read_text() == "A\n"
    assert (output / "additional_chat_templates" / "tool_use.jinja").read_text() == "B"
