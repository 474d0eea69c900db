"""A token that ends answers and would not stop llama.cpp is named, with the way out."""

import json
import logging
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFWriter
from tiny_models import make_model_directory
from tiny_runs import quiet
from tiny_tokenizers import tiny_tokenizer

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.merging.llama_cpp import stops_unknown_to_llama_cpp
from qlora_trainer.merging.merge_run import merge_run
from qlora_trainer.runs.start import start_run


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model whose text ends with a token that llama.cpp knows by the file alone."""
    make_model_directory(tmp_path / "model")
    tokenizer = tiny_tokenizer("qwen2_5")
    tokenizer.add_special_tokens({"eos_token": "<over>"})
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def end_of_text(directory: Path) -> int:
    tokens = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    return next(token["id"] for token in tokens if token["content"] == "<over>")


def test_stops_that_llama_cpp_knows_by_spelling_or_as_the_end_of_text_are_not_named(directory: Path) -> None:
    known = {7: "<|im_end|>", 8: "</s>", 9: "<end_of_turn>", 10: "<|eot_id|>", end_of_text(directory): "<over>"}
    assert stops_unknown_to_llama_cpp(directory, known) == []


def test_a_stop_that_llama_cpp_does_not_know_is_named_and_the_advice_puts_it_into_the_file(directory: Path) -> None:
    (said,) = stops_unknown_to_llama_cpp(directory, {7: "<|im_end|>", 1: "<|user|>", 2: "<|observation|>"})
    assert "<|user|> (1) and <|observation|> (2)" in said
    assert "<|im_end|>" not in said

    converted, named = directory / "model.gguf", directory / "new.gguf"
    writer = GGUFWriter(converted, "llama")
    writer.add_token_list(["a", "<|user|>", "<|observation|>"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    command, *arguments = shlex.split(said[said.index("gguf-new-metadata") :])
    places = {"MODEL.gguf": str(converted), "NEW.gguf": str(named)}
    program = [sys.executable, "-m", f"gguf.scripts.{command.replace('-', '_')}"]
    done = subprocess.run([*program, *(places.get(part, part) for part in arguments)], check=False)
    assert done.returncode == 0
    fields = GGUFReader(named).fields
    assert [fields[f"tokenizer.ggml.{key}_token_id"].contents() for key in ("eot", "eom")] == [1, 2]


def test_reading_the_end_of_text_prints_nothing_about_the_tokenizer(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    ends = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<other>", "type_id": 0}}]
    content["post_processor"] = {"type": "TemplateProcessing", "single": ends, "pair": ends, "special_tokens": {}}
    path.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        stops_unknown_to_llama_cpp(directory, {1: "<|user|>"})
    assert caplog.records == []


def test_a_merge_warns_of_an_end_of_answers_that_llama_cpp_does_not_know(
    tiny_config: Callable[..., RunConfig], own_base: Path, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        path = own_base / name
        path.write_text(path.read_text().replace("<|im_end|>", "<|over|>"))
    settings = json.loads((own_base / "tokenizer_config.json").read_text())
    (own_base / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|im_start|>"}))
    run = start_run(tiny_config(model={"name": str(own_base)}))
    assert run.train(quiet)
    done = merge_run(run.directory, tmp_path / "merged", base="dequantized")
    (said,) = [warning for warning in done.warnings if "llama.cpp" in warning]
    assert said.startswith("llama.cpp will not stop at ")
    assert "<|over|>" in said.partition(",")[0]
