"""A model directory is opened once: its config is what transformers reads, and a run lists and reads it only once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from spying import opened_files
from tiny_models import FAMILIES, make_model_directory
from tiny_runs import quiet
from transformers import AutoConfig

from qlora_trainer.common.errors import FileMissingError, ModelError
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.model.load import load_dense_model
from qlora_trainer.runs.report.summary import write_run_report
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.runs.trained import evaluate_trained, open_trained
from qlora_trainer.weights import model_directory
from qlora_trainer.weights.model_directory import ModelDirectory


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
        (None, r"config\.json is missing"),
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


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_run_reads_the_config_and_lists_the_tensors_once(
    family: str,
    tiny_config: Callable[..., RunConfig],
    tiny_models: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From its start to its report, once more where it is resumed and where it is evaluated, by whomever it is opened.

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

    def begin() -> None:
        run = start_run(config)
        run.answer_samples("before")
        assert not run.train(quiet, stop_after=1)
        write_run_report(run)

    def go_on() -> None:
        run = resume_run(output)
        assert run.train(quiet)
        write_run_report(run)

    output = Path(config.training.output_dir)
    for part in (begin, go_on, lambda: evaluate_trained(open_trained(output), answers=1)):
        listed.clear()
        with opened_files() as paths:
            part()
        assert paths.count(str(directory / "config.json")) == 1
        assert listed == [directory]


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
