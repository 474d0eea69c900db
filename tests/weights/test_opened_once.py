"""A model directory is opened once: its config is what transformers reads, and a run lists and reads it only once."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, make_model_directory
from transformers import AutoConfig, AutoTokenizer

from qlora_trainer.common.errors import FileMissingError, ModelError
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.model.load import load_dense_model
from qlora_trainer.model.tokenizer import load_tokenizer
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.weights import model_directory
from qlora_trainer.weights.model_directory import ModelDirectory

_opened: list[list[str]] = []  # one list for each `opened_files` that is going on


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and _opened and isinstance(arguments[0], str | Path):
        for paths in _opened:
            paths.append(str(arguments[0]))


sys.addaudithook(_note)  # cannot be taken back; does nothing outside of `opened_files`


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Collect the paths of files that Python code opens, transformers' own included."""
    paths: list[str] = []
    _opened.append(paths)
    try:
        yield paths
    finally:
        _opened.remove(paths)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_is_the_one_transformers_reads(family: str, tiny_models: Callable[[str], Path]) -> None:
    theirs = AutoConfig.from_pretrained(tiny_models(family))
    ours = ModelDirectory.open(tiny_models(family)).config()
    assert type(ours) is type(theirs)
    assert vars(ours) == vars(theirs)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral", "layer_types": ["sliding_attention", "full_attention"]},
        {"rms_norm_eps": {"__float__": "Infinity"}, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"auto_map": {"AutoConfig": "configuration_own.OwnConfig"}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    ],
    ids=["ministral", "infinite", "with code", "prequantized"],
)
def test_odd_configs_too_are_the_ones_transformers_reads(
    changes: dict[str, object], tiny_llama: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    theirs, ours = AutoConfig.from_pretrained(tmp_path), ModelDirectory.open(tmp_path).config()
    assert type(ours) is type(theirs)
    assert vars(ours) == vars(theirs)


def test_a_config_may_be_changed_and_the_next_is_new(tiny_llama: Path) -> None:
    directory = ModelDirectory.open(tiny_llama)
    first = directory.config()
    first.num_hidden_layers = 77
    first.rope_parameters["rope_theta"] = 1.0
    assert directory.config().num_hidden_layers == directory.config_json["num_hidden_layers"] != 77
    assert vars(directory.config()) == vars(AutoConfig.from_pretrained(tiny_llama))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, r"config\.json cannot be read: .*No such file"),
        ("{", "is not JSON"),
        ("[]", "should hold a JSON object"),
        ('{"model_type": "unheard-of"}', "names the model type 'unheard-of', which transformers .* does not know"),
        ('{"hidden_size": 4}', "names the model type None"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "cannot be read as a model's config: .*hidden_size"),
        ('{"model_type": "llama", "transformers_weights": "x"}', "names its own weight file"),
        ('{"model_type": "llama", "configuration_files": ["config.4.0.0.json"]}', "names other config files"),
    ],
)
def test_a_config_that_is_no_models_is_named_with_its_file(content: str | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=reason) as caught:
        ModelDirectory.open(tmp_path).config()
    assert str(tmp_path / "config.json") in str(caught.value)


def test_facts_are_those_of_the_config(tiny_models: Callable[[str], Path]) -> None:
    facts = ModelDirectory.open(tiny_models("gpt2")).facts
    config = AutoConfig.from_pretrained(tiny_models("gpt2"))
    assert (facts.positions, facts.vocabulary) == (config.n_positions, config.vocab_size)
    assert facts.layer_kinds == ("layer",) * config.n_layer
    assert not facts.is_prequantized
    windows = AutoConfig.from_pretrained(tiny_models("gemma3")).layer_types
    assert ModelDirectory.open(tiny_models("gemma3")).facts.layer_kinds == tuple(windows) != ("layer",) * len(windows)


def test_what_is_no_model_directory_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    with pytest.raises(FileMissingError, match="no model directory"):
        ModelDirectory.open(tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="it is an adapter"):
        ModelDirectory.open(tmp_path)


def test_a_tokenizer_is_the_one_that_transformers_loads(tiny_models: Callable[[str], Path]) -> None:
    for family in ("llama", "gpt2", "gemma3"):
        ours = load_tokenizer(ModelDirectory.open(tiny_models(family)))
        theirs = AutoTokenizer.from_pretrained(tiny_models(family))
        assert type(ours) is type(theirs)
        text = "Hello, wörld!\n  x+1 🙂"
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.special_tokens_map == theirs.special_tokens_map


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_run_reads_the_config_and_lists_the_tensors_once(
    family: str,
    tiny_config: Callable[..., RunConfig],
    tiny_models: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From its start over training to its checkpoints, counted where files are opened, by whomever.

    Of a tokenizer with more than 100,000 tokens transformers itself reads config.json once more, to see whether it is
    an early Mistral's.
    """
    directory = tiny_models(family)
    listed: list[Path] = []
    list_tensors = model_directory.list_tensors

    def counted(path: Path, *rest: Any) -> object:
        listed.append(path)
        return list_tensors(path, *rest)

    monkeypatch.setattr(model_directory, "list_tensors", counted)
    config = tiny_config(
        model={"name": str(directory)}, data={"eval": 0.2}, evaluation={"samples": 1}, training={"max_steps": 2}
    )
    with opened_files() as paths:
        run = start_run(config)
        assert run.train(lambda record: None)
    assert paths.count(str(directory / "config.json")) == 1
    assert listed == [directory]
    with opened_files() as paths:
        resume_run(run.directory)
    assert paths.count(str(directory / "config.json")) == 1
    assert listed == [directory] * 2


def test_every_model_that_is_made_from_a_directory_reads_its_config_once(tmp_path: Path) -> None:
    """transformers' own loader too, which is given the config."""
    directory = make_model_directory(tmp_path / "m")
    with opened_files() as paths:
        load_dense_model(ModelDirectory.open(directory), torch.device("cpu"))
    assert paths.count(str(directory / "config.json")) == 1


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("family", "positions", "rope", "expected"),
    [  # as vLLM derives the length of a model
        ("qwen2", 64, YARN | {"original_max_position_embeddings": 64}, 256),  # as Qwen's instructions write it
        ("qwen2", 64, YARN, 256),
        ("qwen2", 256, YARN | {"original_max_position_embeddings": 64}, 256),  # as DeepSeek writes it
        ("qwen2", 64, {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, 128),
        ("llama", 64, {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 128),
        ("llama", 128, {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 64}, 128),
        ("llama", 64, {"rope_type": "linear", "factor": 1.5, "rope_theta": 1e4}, 96),
        ("llama", 256, LLAMA3 | {"original_max_position_embeddings": 64}, 256),
        ("phi3", 256, {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}, 256),
        ("llama", 64, {"rope_type": "default", "rope_theta": 1e4}, 64),
        ("gemma3", 256, {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}, 256),
        ("gpt2", 64, None, 64),
    ],
)
def test_positions_count_what_scaling_adds_and_count_it_once(
    family: str,
    positions: int,
    rope: dict[str, object] | None,
    expected: int,
    tiny_models: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    config = json.loads((tiny_models(family) / "config.json").read_text())
    config |= {"n_positions" if family == "gpt2" else "max_position_embeddings": positions}
    if family == "phi3":
        config["original_max_position_embeddings"] = 64
    if rope:
        config.pop("rope_parameters", None)
        config["rope_scaling" if "type" in rope else "rope_parameters"] = rope
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ModelDirectory.open(tmp_path).facts.positions == expected


def test_rows_are_as_long_as_the_scaled_model_takes_them(
    tiny_config: Callable[..., RunConfig], tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_models("qwen2"), tmp_path / "base"))
    config = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": 32}
    config["rope_parameters"] = YARN | {"original_max_position_embeddings": 32}
    (base / "config.json").write_text(json.dumps(config))
    run = start_run(tiny_config(model={"name": str(base)}, data={"max_length": 256}))
    assert run.prepared.report.max_length == 128
