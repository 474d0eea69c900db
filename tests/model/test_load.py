"""Promises of loading a base: every linear layer but the head is 4-bit and frozen, in the memory said, or a message."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from cards import pretend_free_memory
from marks import slow_but
from prequantized import prequantized
from safetensors.torch import load_file
from tiny_models import FAMILIES, change_tensors, load, make_model_directory
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    Emu3Config,
    FuyuConfig,
    Gemma3Config,
    GraniteMoeConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from qlora_trainer.common.errors import InsufficientMemoryError, ModelError
from qlora_trainer.model.empty import refuse_multi_modal
from qlora_trainer.model.load import check_mergeable, load_dense_model, plan_base
from qlora_trainer.model.modules.nf4_linear import NF4Linear, quantized_fraction
from qlora_trainer.weights.model_directory import ModelDirectory

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", slow_but(sorted(FAMILIES), "gpt2", "llama", "llama_tied"))
def test_every_linear_but_the_lm_head_is_nf4_and_all_is_frozen(family: str, tiny_models: Callable[[str], Path]) -> None:
    base = load(tiny_models(family))
    head = base.model.get_output_embeddings()
    linears = [name for name, m in base.model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    assert linears == []
    assert not any(isinstance(m, bnb.nn.Linear4bit) for m in base.model.modules())
    assert isinstance(head, nn.Linear)
    assert base.quantized_fraction == 1.0
    assert not any(p.requires_grad for p in base.model.parameters())
    assert all(p.dtype == torch.float32 for p in base.model.parameters())


def test_a_tied_head_stays_tied_and_dense(tiny_models: Callable[[str], Path]) -> None:
    model = load(tiny_models("llama_tied")).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_experts_that_stay_16_bit_are_refused_with_their_share(tmp_path: Path) -> None:
    """Granite's lie fused on disk too, so there is no tensor for each matrix."""
    config = GraniteMoeConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, num_local_experts=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    with pytest.raises(ModelError, match=r"Only \d+\.\d% .*min_quantized_fraction"):
        load(tmp_path / "moe")
    base = load(tmp_path / "moe", min_quantized_fraction=0.0)
    attention = sum(m.in_features * m.out_features for m in base.model.modules() if isinstance(m, NF4Linear))
    experts = 4 * 3 * 64 * 128
    share, others = quantized_fraction(base.model)
    # The router, 4 x 64, may count or not; the share must not look better than it is.
    assert share == pytest.approx(attention / (attention + experts), abs=0.01)
    assert "experts" in others[0]


def broken_config(directory: Path) -> Path:
    (directory / "config.json").write_text("{")
    return directory


def unknown_architecture(directory: Path) -> Path:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "not-a-model"}))
    return directory


def missing_tensor(directory: Path) -> Path:
    change_tensors(directory, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    return directory


def other_shape(directory: Path) -> Path:
    change_tensors(directory, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32).bfloat16()}))
    return directory


def cut_short(directory: Path) -> Path:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return directory


@pytest.mark.parametrize("damage", [broken_config, unknown_architecture, missing_tensor, other_shape, cut_short])
def test_an_unreadable_model_directory_ends_with_an_error_message(
    tmp_path: Path, damage: Callable[[Path], Path]
) -> None:
    directory = damage(make_model_directory(tmp_path / "m"))
    for opener in (load, lambda path: load_dense_model(ModelDirectory.open(path), CPU)):
        with pytest.raises(ModelError) as caught:
            opener(directory)
        assert str(directory) in str(caught.value)


def test_too_little_memory_is_reported_before_loading(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_free_memory(monkeypatch, lambda device: 10_000)
    with pytest.raises(InsufficientMemoryError, match="Choose a smaller base"):
        load(tiny_llama)


@pytest.mark.slow
def test_the_memory_a_base_needs_is_what_it_takes(
    tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte: the model, its largest tensor with the copies that are made of it on its way, and the one after."""
    packed = prequantized(tiny_models("llama"), tmp_path / "nf4")
    mixed = tmp_path / "mixed"  # its weights are quantized from fp32, and its embedding is loaded in that
    shutil.copytree(tiny_models("llama"), mixed)
    change_tensors(mixed, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].float()}))
    fused = tmp_path / "fused"  # its largest tensor is stored as (I, O)
    make_model_directory(fused, "gpt2", n_inner=4096)
    plain = (tiny_models("gpt2"), tiny_models("llama_tied"), tiny_models("qwen2"), packed)
    free: dict[str, int] = {}
    for directory, copies in (*((directory, 0) for directory in plain), (mixed, 4 / 2), (fused, 1)):
        largest = max(info.nbytes for info in ModelDirectory.open(directory).tensors.values())
        needed = load(directory).bytes + int(largest * (2 + copies))
        with monkeypatch.context() as patch:
            free["cpu"] = needed
            pretend_free_memory(patch, lambda device: free[device.type])
            load(directory)
            free["cpu"] = needed - 1
            with pytest.raises(InsufficientMemoryError):
                load(directory)


def test_what_could_be_trained_but_not_merged_is_refused_before_training(tiny_llama: Path) -> None:
    plan, _ = plan_base(ModelDirectory.open(tiny_llama))
    check_mergeable(plan, ["model.layers.0.mlp.up_proj"])
    with pytest.raises(ModelError, match=r"no tensor of its own for 1 weight.*model\.layers\.0\.mlp\.both\.weight"):
        check_mergeable(plan, ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.both"])


def test_a_model_with_a_vision_tower_is_refused(tmp_path: Path) -> None:
    Gemma3Config().save_pretrained(tmp_path / "m")
    assert AutoConfig.from_pretrained(tmp_path / "m").model_type == "gemma3"
    with pytest.raises(ModelError, match=r"several kinds of input \(gemma3, with a part for vision\)"):
        load(tmp_path / "m")


@pytest.mark.parametrize("config", [FuyuConfig(), Emu3Config()], ids=["fuyu", "emu3"])
def test_a_model_that_takes_images_without_a_tower_of_its_own_is_refused(tmp_path: Path, config: Any) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"several kinds of input \({config.model_type}\)"):
        plan_base(ModelDirectory.open(tmp_path))


def test_of_all_causal_language_models_those_that_take_text_alone_are_not_refused(tiny_llama: Path) -> None:
    directory, refused = ModelDirectory.open(tiny_llama), set()
    kinds = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {"gemma4_assistant"}  # whose config has no defaults
    for kind in kinds:
        try:
            refuse_multi_modal(CONFIG_MAPPING[kind](), directory)
        except ModelError:
            refused.add(kind)
    several = kinds & {*MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    decoders = {"moshi", "musicgen", "musicgen_melody", "trocr", "whisper"}  # of audio or images
    assert len(several) > 10
    assert refused == several | decoders
    assert len(kinds - refused) > 100


def test_weights_are_quantized_from_the_checkpoints_own_values(tiny_llama: Path) -> None:
    """bf16 weights in the checkpoint, fp32 compute: the codes are those of the bf16 values, as everywhere else."""
    source = load_file(tiny_llama / "model.safetensors")
    base = load(tiny_llama)
    assert base.fingerprint.source_dtype == "bfloat16"
    layers = {name: m for name, m in base.model.named_modules() if isinstance(m, NF4Linear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        packed, state = bnb.functional.quantize_4bit(
            source[f"{name}.weight"], blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        assert torch.equal(layer.packed, packed.reshape(-1)), name
        assert torch.equal(layer.absmax, state.absmax)
        assert torch.equal(layer.offset, state.offset)
