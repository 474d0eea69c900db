"""Tiny random models of every family the project lists, as directories that the trainer loads like any other."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_tokenizers import tiny_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    Starcoder2Config,
)

from qlora_trainer.common.cache import user_cache
from qlora_trainer.config.schema import ModelConfig
from qlora_trainer.model.load import Base, load_base_model
from qlora_trainer.weights.model_directory import ModelDirectory

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, object]]] = {
    "llama": (LlamaConfig, {}),
    "llama_tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, {"sliding_window": 6, "head_dim": 16}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 0]}),
    "gemma2": (Gemma2Config, {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}),
    "phi3": (Phi3Config, {"sliding_window": None}),
    # Conv1D layers, stored (I, O), and trained positions; its own dropout, on by default, would hide what differs.
    "gpt2": (GPT2Config, {"n_inner": 128, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
}

# Families that only tests/test_architectures.py takes through a whole run: FAMILIES are those of every test.
EXPERTS = {"num_experts_per_tok": 2, "head_dim": 16}
MORE_FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, object]]] = {
    "olmo2": (Olmo2Config, {}),
    "granite": (
        GraniteConfig,
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 4.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.5,
            "tie_word_embeddings": True,
        },
    ),
    "cohere": (CohereConfig, {"logit_scale": 0.25, "use_qk_norm": True}),
    "starcoder2": (
        Starcoder2Config,
        {"sliding_window": 6, "attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    ),
    "gpt_neox": (GPTNeoXConfig, {}),
    "falcon": (FalconConfig, {"ffn_hidden_size": 128}),  # as the 7B: one head of keys and values for all queries
    "falcon_grouped": (  # as the 40B: groups of queries, each with its head of keys and values
        FalconConfig,
        {"ffn_hidden_size": 128, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "mixtral": (MixtralConfig, {**EXPERTS, "sliding_window": 6, "num_local_experts": 4}),
    "qwen3_moe": (Qwen3MoeConfig, {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 64, "mlp_only_layers": [1]}),
}


def make_model_directory(
    directory: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, seed: int = 0, **shape: int
) -> Path:
    """A model of the family with random weights, large enough that tokens and positions matter, and a tokenizer."""
    tokenizer = tiny_tokenizer("smollm2")
    config_class, changes = (FAMILIES | MORE_FAMILIES)[family]
    vocab_size = -(-len(tokenizer) // 64) * 64
    # A config keeps keys that its class does not know, and these models have no such heads.
    is_grouped = config_class not in (GPT2Config, GPTNeoXConfig, FalconConfig)
    shared = {key: value for key, value in SHAPE.items() if is_grouped or key != "num_key_value_heads"}
    config = config_class(**{**shared, "vocab_size": vocab_size, **changes, **shape})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.12)
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def load(directory: Path, **settings: object) -> Base:
    """Load a model directory as a run does, with these keys of the config's section `model`."""
    return load_base_model(ModelDirectory.open(directory), ModelConfig(name=str(directory), **settings), user_cache())


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Have `change` alter the tensors of a model directory of one file, which is written anew."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def scale_tensor(directory: Path, name: str, factor: float) -> None:
    """Multiply one tensor of a model directory."""
    change_tensors(directory, lambda tensors: tensors.update({name: tensors[name] * factor}))


def make_model_beyond_float16(directory: Path, where: str = "MLP") -> Path:
    """A Llama whose weights fit float16 and whose activations do not; in fp32 and bfloat16 it computes.

    "MLP": the product inside an MLP, which is no module's output, and what comes of it; "hidden": the states alone.
    """
    make_model_directory(directory, hidden_size=64, intermediate_size=96)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1e5
    if where == "MLP":
        tensors["model.layers.0.mlp.gate_proj.weight"] *= 300
        tensors["model.layers.0.mlp.up_proj.weight"] *= 1000
    assert max(float(tensor.abs().max()) for tensor in tensors.values()) < torch.finfo(torch.float16).max
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
