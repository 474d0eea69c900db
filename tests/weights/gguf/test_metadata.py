"""The config of an imported GGUF file says what its metadata say: the imported model computes what the file's does."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import TOKENS, write_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    NemotronConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
    Starcoder2Config,
)

from qlora_trainer.common.errors import ModelError
from qlora_trainer.common.progress import silent
from qlora_trainer.weights.gguf.importer import import_gguf, import_warnings
from qlora_trainer.weights.gguf.metadata_table import NEUTRAL
from qlora_trainer.weights.model_directory import ModelDirectory

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": len(TOKENS),
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KEYS: dict[str, object] = {
    "context_length": 256,
    "block_count": 3,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}
RMS: dict[str, object] = {"attention.layer_norm_rms_epsilon": 1e-3}
NORM: dict[str, object] = {"attention.layer_norm_epsilon": 1e-3}
SCALING = "rope.scaling."
YARN: dict[str, object] = {f"{SCALING}type": "yarn", f"{SCALING}factor": 4.0, f"{SCALING}original_context_length": 64}
FACTORS = {
    "rope_factors_long.weight": np.array([1.0, 2.0, 4.0, 8.0, 9.0, 10.0], np.float32),
    "rope_factors_short.weight": np.array([1.0, 1.5, 2.0, 2.5, 2.5, 3.0], np.float32),
}
DIVISORS = np.linspace(1.0, 3.0, 8, dtype=np.float32)


@dataclass
class Kind:
    """A file's architecture, keys and tensors beyond those of all, and the settings of the model that it holds."""

    architecture: str
    config: type[PretrainedConfig]
    settings: dict[str, Any]
    keys: Mapping[str, object]
    factors: dict[str, np.ndarray] = field(default_factory=dict)


def rope(kind: str = "default", theta: float = 10000.0, **settings: object) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **settings}}


def of_layers(full: dict[str, Any], local_theta: float = 10000.0) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": local_theta}
    return {"rope_parameters": {"full_attention": full["rope_parameters"], "sliding_attention": local}}


EPSILON = {"rms_norm_eps": 1e-3}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8} | EPSILON
GEMMA_KEYS = RMS | {"attention.key_length": 32, "attention.value_length": 32, "attention.sliding_window": 8}
WINDOWS = ["sliding_attention", "sliding_attention", "full_attention"]
KINDS = {
    "linear scaling": Kind(
        "llama",
        LlamaConfig,
        rope("linear", factor=4.0) | EPSILON,
        RMS | {f"{SCALING}type": "linear", f"{SCALING}factor": 4.0},
    ),
    "a factor without a type": Kind(
        "llama", LlamaConfig, rope("linear", factor=2.5) | EPSILON, RMS | {f"{SCALING}factor": 2.5}
    ),
    "the old key of linear scaling": Kind(
        "qwen2", Qwen2Config, rope("linear", factor=8.0) | EPSILON, RMS | {"rope.scale_linear": 8.0}
    ),
    "yarn": Kind(
        "qwen2",
        Qwen2Config,
        rope("yarn", 1e6, factor=4.0, original_max_position_embeddings=64) | EPSILON,
        RMS | YARN | {"rope.freq_base": 1e6},
    ),
    "yarn with its own speeds": Kind(
        "llama",
        LlamaConfig,
        rope("yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=16.0, beta_slow=2.0) | EPSILON,
        RMS | YARN | {f"{SCALING}yarn_beta_fast": 16.0, f"{SCALING}yarn_beta_slow": 2.0},
    ),
    "yarn with its own attention factor": Kind(
        "qwen3",
        Qwen3Config,
        rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=64,
            attention_factor=0.5 * (1 + 0.1 * float(np.log(4.0))),
        )
        | {"head_dim": 32}
        | EPSILON,
        RMS | YARN | {f"{SCALING}attn_factor": 0.5, "attention.key_length": 32, "attention.value_length": 32},
    ),
    "no size of heads": Kind("qwen3", Qwen3Config, rope() | {"head_dim": 16} | EPSILON, RMS),
    "divisors of no formula": Kind(
        "llama",
        LlamaConfig,
        rope(
            "longrope",
            short_factor=DIVISORS.tolist(),
            long_factor=DIVISORS.tolist(),
            attention_factor=1.0,
            factor=1.0,
            original_max_position_embeddings=256,
        )
        | EPSILON,
        RMS,
        {"rope_freqs.weight": DIVISORS},
    ),
    "linear scaling of the layers without a window": Kind(
        "gemma3",
        Gemma3TextConfig,
        of_layers(rope("linear", 1e6, factor=8.0)) | GEMMA | {"layer_types": ["sliding_attention"] * 3},
        GEMMA_KEYS | {"rope.freq_base": 1e6, f"{SCALING}type": "linear", f"{SCALING}factor": 8.0},
    ),
    "windows by a period": Kind(
        "gemma3",
        Gemma3TextConfig,
        of_layers(rope(theta=5e5), 2e4) | GEMMA | {"layer_types": WINDOWS, "final_logit_softcapping": 5.0},
        GEMMA_KEYS
        | {"rope.freq_base": 5e5, "rope.freq_base_swa": 2e4, "attention.sliding_window_pattern": 3}
        | {"final_logit_softcapping": 5.0},
    ),
    "no window": Kind(
        "gemma3",
        Gemma3TextConfig,
        of_layers(rope(theta=5e5)) | GEMMA | {"layer_types": ["full_attention"] * 3},
        {key: value for key, value in GEMMA_KEYS.items() if key != "attention.sliding_window"}
        | {"rope.freq_base": 5e5},
    ),
    "windows by layer, softcaps and a scale": Kind(
        "gemma2",
        Gemma2Config,
        rope()
        | GEMMA
        | {"layer_types": WINDOWS, "attn_logit_softcapping": 9.0, "final_logit_softcapping": 4.0}
        | {"query_pre_attn_scalar": 64},
        GEMMA_KEYS
        | {"attention.sliding_window_pattern": [True, True, False], "attention.scale": 0.125}
        | {"attn_logit_softcapping": 9.0, "final_logit_softcapping": 4.0},
    ),
    "rope base": Kind(
        "starcoder2",
        Starcoder2Config,
        rope(theta=999999.0) | {"norm_epsilon": 1e-3, "sliding_window": 8},
        NORM | {"rope.freq_base": 999999.0, "attention.sliding_window": 8},
    ),
    "partly rotated heads": Kind(
        "stablelm",
        StableLmConfig,
        rope(theta=1e5, partial_rotary_factor=0.5) | {"layer_norm_eps": 1e-3},
        NORM | {"rope.freq_base": 1e5, "rope.dimension_count": 8, "use_parallel_residual": False},
    ),
    "partly rotated heads and a window": Kind(
        "phi3",
        Phi3Config,
        rope(partial_rotary_factor=0.75) | {"sliding_window": 8} | EPSILON,
        RMS | {"rope.dimension_count": 12, "attention.sliding_window": 8},
    ),
    "factors of each frequency": Kind(
        "phi3",
        Phi3Config,
        rope(
            "longrope",
            partial_rotary_factor=0.75,
            short_factor=FACTORS["rope_factors_short.weight"].tolist(),
            long_factor=FACTORS["rope_factors_long.weight"].tolist(),
            attention_factor=1.25,
            factor=4.0,
            original_max_position_embeddings=64,
        )
        | {"original_max_position_embeddings": 64}
        | EPSILON,
        RMS | {"rope.dimension_count": 12, f"{SCALING}original_context_length": 64, f"{SCALING}attn_factor": 1.25},
        FACTORS,
    ),
    "partly rotated heads and linear scaling": Kind(
        "nemotron",
        NemotronConfig,
        rope("linear", factor=2.0, partial_rotary_factor=0.25) | {"norm_eps": 1e-3},
        NORM | {"rope.dimension_count": 4, f"{SCALING}type": "linear", f"{SCALING}factor": 2.0},
    ),
}


def imported(path: Path, cache: Path) -> tuple[Path, torch.nn.Module]:
    directory = import_gguf(path, cache, silent)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32).eval()
    stored = {name: info.read() for name, info in ModelDirectory.open(directory).tensors.items()}
    missing, unexpected = model.load_state_dict(stored, strict=False)
    assert not unexpected
    assert missing in ([], ["lm_head.weight"])
    return directory, model


@pytest.mark.parametrize("name", KINDS)
def test_imported_model_computes_what_the_metadata_say(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    path = tmp_path / "model.gguf"
    config = kind.config(**{**SHAPE, **kind.settings})
    model = write_model(path, kind.architecture, config, {**KEYS, **kind.keys}, kind.factors)
    directory, ours = imported(path, tmp_path / "cache")
    tokens = torch.arange(100)[None]
    with torch.no_grad():
        wanted, found = model(tokens).logits, ours(tokens).logits
    assert torch.allclose(found, wanted, atol=1e-5), float((found - wanted).abs().max())
    assert import_warnings(directory) == []


def test_sizes_of_a_gpt2_are_those_of_the_file(tmp_path: Path) -> None:
    config = GPT2Config(
        n_embd=64, n_layer=1, n_head=4, n_inner=96, n_positions=128, vocab_size=len(TOKENS), layer_norm_epsilon=1e-3
    )
    keys = {"context_length": 128, "block_count": 1, "embedding_length": 64, "feed_forward_length": 96}
    model = write_model(tmp_path / "model.gguf", "gpt2", config, keys | NORM | {"attention.head_count": 4})
    directory, ours = imported(tmp_path / "model.gguf", tmp_path / "cache")
    tokens = torch.arange(100)[None]
    assert torch.allclose(ours(tokens).logits, model(tokens).logits, atol=1e-5)
    written = json.loads((directory / "config.json").read_text())
    assert (written["n_positions"], written["n_inner"]) == (128, 96)
    assert "n_ctx" not in written


def test_sizes_of_a_mamba_are_those_of_the_file(tmp_path: Path) -> None:
    settings = {"hidden_size": 64, "num_hidden_layers": 1, "layer_norm_epsilon": 1e-3, "vocab_size": len(TOKENS)}
    config = MambaConfig(**settings, state_size=8, expand=3, conv_kernel=3, time_step_rank=5)
    keys = {"context_length": 256, "embedding_length": 64, "feed_forward_length": 0, "block_count": 1} | RMS
    state = {"ssm.conv_kernel": 3, "ssm.inner_size": 192, "ssm.state_size": 8, "ssm.time_step_rank": 5}
    model = write_model(tmp_path / "model.gguf", "mamba", config, keys | state | {"attention.head_count": 0})
    _, ours = imported(tmp_path / "model.gguf", tmp_path / "cache")
    tokens = torch.arange(60)[None]
    assert torch.allclose(ours(tokens).logits, model(tokens).logits, atol=1e-4)


def test_norm_of_a_falcon_is_that_of_the_file(tmp_path: Path) -> None:
    settings = {**SHAPE, "ffn_hidden_size": 96, "layer_norm_epsilon": 1e-3, "num_hidden_layers": 1}
    keys = KEYS | NORM | {"block_count": 1, "attention.head_count_kv": 1, "tensor_data_layout": "jploski"}
    model = write_model(tmp_path / "model.gguf", "falcon", FalconConfig(**settings), keys)
    _, ours = imported(tmp_path / "model.gguf", tmp_path / "cache")
    tokens = torch.arange(60)[None]
    assert torch.allclose(ours(tokens).logits, model(tokens).logits, atol=1e-5)


def write_llama(path: Path, **keys: object) -> Path:
    config = LlamaConfig(**{**SHAPE, "num_hidden_layers": 1})
    named = {name.replace("__", "."): value for name, value in keys.items()}
    write_model(path, "llama", config, KEYS | RMS | {"block_count": 1} | named)
    return path


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("attention__new_trick", 3, "llama.attention.new_trick = 3"),
        ("rope__dimension_count", 8, r"llama.rope.dimension_count = 8 \(the heads have 16\)"),
        ("rope__scaling__type", "spiral", "llama.rope.scaling.type = spiral"),
        ("rope__scaling__attn_factor", 2.0, "llama.rope.scaling.attn_factor = 2"),
        ("attention__sliding_window", 32, "llama.attention.sliding_window = 32"),
        ("attention__value_length", 8, r"llama.attention.value_length = 8 \(keys have 16\)"),
        ("attention__causal", False, "llama.attention.causal = False"),
        (
            "attention__head_count_kv",
            [2, 1],
            r"llama.attention.head_count_kv = \[2, 1\] \(not the same in each layer\)",
        ),
        ("logit_scale", 0.25, "llama.logit_scale = 0.25"),
        ("expert_count", 8, "llama.expert_count = 8"),
        ("tokenizer__ggml__trick", True, "tokenizer.ggml.trick = True"),
    ],
)
def test_a_key_that_is_in_no_table_refuses_by_name_and_value(
    tmp_path: Path, key: str, value: object, shown: str
) -> None:
    path = write_llama(tmp_path / "model.gguf", **{key: value})
    with pytest.raises(ModelError, match=rf"model\.gguf .*{shown}.* Use the model's safetensors directory"):
        import_gguf(path, tmp_path / "cache", silent)
    assert not (tmp_path / "cache" / "gguf-3").exists() or not list((tmp_path / "cache" / "gguf-3").iterdir())


def test_several_keys_are_named_at_once_and_a_missing_one_too(tmp_path: Path) -> None:
    config = LlamaConfig(**{**SHAPE, "num_hidden_layers": 1})
    write_model(tmp_path / "model.gguf", "llama", config, KEYS | {"block_count": 1, "logit_scale": 2.0, "odd": 1})
    with pytest.raises(
        ModelError,
        match=r"llama\.attention\.layer_norm_rms_epsilon is missing; llama\.logit_scale = 2\.0; llama\.odd = 1",
    ):
        import_gguf(tmp_path / "model.gguf", tmp_path / "cache", silent)


def test_values_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    neutral = {name.replace(".", "__"): values[-1] for name, values in NEUTRAL.items() if name not in KEYS}
    neutral |= {"attention__sliding_window": 256, "pooling_type": 3, "rope__scaling__finetuned": True}
    neutral |= {"tokenizer__ggml__fim_pre_token_id": 5, "tokenizer__ggml__add_sep_token": False}
    directory = import_gguf(write_llama(tmp_path / "model.gguf", **neutral), tmp_path / "cache", silent)
    config = AutoConfig.from_pretrained(directory)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert import_warnings(directory) == []


def test_a_file_with_the_name_of_another_architecture_is_read_as_its_own(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model.gguf", general__name="mistral")
    config = AutoConfig.from_pretrained(import_gguf(path, tmp_path / "cache", silent))
    assert config.model_type == "llama"
    assert getattr(config, "sliding_window", None) is None


def test_keys_of_another_program_are_named_in_a_warning(tmp_path: Path) -> None:
    directory = import_gguf(
        write_llama(tmp_path / "model.gguf", other__quantized_by="someone"), tmp_path / "cache", silent
    )
    assert import_warnings(directory) == [
        "Metadata of the GGUF file that say nothing of its model are not read: other.quantized_by."
    ]
