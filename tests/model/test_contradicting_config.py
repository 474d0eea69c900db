"""A config that contradicts the weights is put right in what is written, or refused with what to write into it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FuyuConfig

from qlora_trainer.common.cache import user_cache
from qlora_trainer.common.errors import ModelError
from qlora_trainer.config.schema import ModelConfig, RunConfig
from qlora_trainer.merging.merge_run import merge_run
from qlora_trainer.model.load import config_corrections, load_base_model, plan_base
from qlora_trainer.model.quantized_copy import load_base, quantize_checkpoint
from qlora_trainer.runs.start import start_run
from qlora_trainer.weights.model_directory import ModelDirectory

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def head_elsewhere(directory: Path) -> Tensor:
    """The head by the rule of vLLM and of transformers 4: the embedding where the config ties them."""
    tensors = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    ties = json.loads((directory / "config.json").read_text()).get("tie_word_embeddings", True)
    return tensors[EMBEDDING if ties else HEAD]


def change(directory: Path, tensors: dict[str, Tensor | None], config: dict[str, Any]) -> Path:
    """Change tensors, None for one that is taken out, and keys of config.json."""
    stored = load_file(directory / "model.safetensors") | tensors
    kept = {name: tensor for name, tensor in stored.items() if tensor is not None}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((directory / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps({k: v for k, v in written.items() if v is not None}))
    return directory


@pytest.fixture
def tied(tiny_models: Callable[[str], Path], tmp_path: Path) -> Path:
    """A model whose config ties the head, and whose file has another one."""
    directory = Path(shutil.copytree(tiny_models("llama_tied"), tmp_path / "tied"))
    embedding = load_file(directory / "model.safetensors")[EMBEDDING]
    torch.manual_seed(1)
    return change(directory, {HEAD: torch.randn_like(embedding) * 0.1}, {})


def test_a_merge_has_the_head_that_was_trained_by_every_loaders_rule(
    tied: Path, tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run = start_run(tiny_config(model={"name": str(tied)}, training={"max_steps": 2}, evaluation={"samples": 0}))
    (warning,) = [each for each in run.warnings if "tie_word_embeddings" in each]
    assert str(tied / "config.json") in warning
    assert HEAD in warning
    run.train(lambda record: None)
    trained = run.base.model.get_output_embeddings().weight
    merged = merge_run(run.directory, tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(head_elsewhere(tmp_path / "merged").float(), trained.float())
    assert any("tie_word_embeddings: False" in each for each in merged.warnings)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(theirs.get_output_embeddings().weight, trained.float())


def test_a_copy_in_4_bits_says_what_its_weights_are_and_is_the_same_base(tied: Path, tmp_path: Path) -> None:
    directory = ModelDirectory.open(tied)
    report = quantize_checkpoint(directory, tmp_path / "copy", device=torch.device("cpu"))
    assert any("tie_word_embeddings" in warning for warning in report.warnings)
    assert torch.equal(head_elsewhere(tmp_path / "copy"), load_file(tied / "model.safetensors")[HEAD])
    settings = ModelConfig(name=str(tied), device="cpu")
    base = load_base_model(directory, settings, user_cache())
    copied = load_base_model(ModelDirectory.open(tmp_path / "copy"), settings, user_cache())
    assert base.fingerprint.difference(copied.fingerprint) is None
    kept = load_base(directory, settings.model_copy(update={"cache_quantized": True}), user_cache())
    assert any("tie_word_embeddings" in warning for warning in kept.warnings)
    assert base.fingerprint.difference(kept.fingerprint) is None


@pytest.mark.parametrize("family", ["llama_tied", "gemma2", "gpt2", "llama", "gemma3"])
def test_a_config_that_agrees_with_its_weights_is_left_alone(
    family: str, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    assert config_corrections(ModelDirectory.open(tiny_models(family))) == {}
    if family == "llama_tied":  # stored twice, and equal
        directory = Path(shutil.copytree(tiny_models(family), tmp_path / "twice"))
        stored = load_file(directory / "model.safetensors")[EMBEDDING]
        change(directory, {HEAD: stored.clone()}, {})
        assert config_corrections(ModelDirectory.open(directory)) == {}
        assert plan_base(ModelDirectory.open(directory))[0].warnings == []


def test_a_class_that_ties_by_default_is_put_right_too(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    """Gemma's config.json need not have the key."""
    directory = Path(shutil.copytree(tiny_models("gemma2"), tmp_path / "gemma"))
    embedding = load_file(directory / "model.safetensors")[EMBEDDING]
    change(directory, {HEAD: embedding.flip(0).contiguous()}, {"tie_word_embeddings": None})
    assert config_corrections(ModelDirectory.open(directory)) == {"tie_word_embeddings": False}


@pytest.fixture
def parts_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such configs are of models that take images too, which are refused."""
    monkeypatch.setattr("qlora_trainer.model.load.refuse_multi_modal", lambda *_: None)


@pytest.mark.usefixtures("parts_allowed")
def test_a_config_in_parts_is_put_right_where_its_whole_ties_the_head(tmp_path: Path) -> None:
    """Transformers goes by the key of the whole, whatever the part for text says."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 64}
    config = FuyuConfig(**sizes, tie_word_embeddings=True, text_config={**sizes, "tie_word_embeddings": False})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert config_corrections(ModelDirectory.open(tmp_path)) == {}
    change(tmp_path, {HEAD: torch.ones(128, 64)}, {})
    assert config_corrections(ModelDirectory.open(tmp_path)) == {"tie_word_embeddings": False}
    _, model = plan_base(ModelDirectory.open(tmp_path))
    model.tie_weights()  # as its config says, which no longer ties them
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("tensors", "config", "key"),
    [
        ({HEAD: None}, {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({}, {"vocab_size": 333}, "vocab_size"),
    ],
)
def test_what_no_loader_could_know_is_refused_with_the_line_that_mends_it(
    tensors: dict[str, Tensor | None], config: dict[str, Any], key: str, tiny_llama: Path, tmp_path: Path
) -> None:
    directory = change(Path(shutil.copytree(tiny_llama, tmp_path / "model")), tensors, config)
    with pytest.raises(ModelError, match=f'write "{key}"') as caught:
        plan_base(ModelDirectory.open(directory))
    assert str(directory / "config.json") in str(caught.value)
    line = str(caught.value).partition("write ")[2].partition(" there")[0]
    change(directory, {}, json.loads(f"{{{line}}}"))
    assert plan_base(ModelDirectory.open(directory))[0].warnings == []
