"""List what the metadata keys of each architecture in a GGUF file become in config.json.

The meaning of a key is llama.cpp's, which reads it while it loads the model; the names on the right are those of
transformers' config. `metadata.restore_config` goes through a file's keys by these tables. Left out: the rope settings,
whose keys are read together (rope.py), and the split rule of the tokenizer (pre_tokenizer.py).
"""

from enum import Enum
from typing import Any


class Rule(Enum):
    """Say how a key is treated whose value is not simply that of one key of config.json."""

    ROPE = "one of the rope settings, read together"
    USED = "transformers makes the config of it"
    NO_MATTER = "nothing is computed with it"
    KEY_LENGTH = "the size of a head"
    VALUE_LENGTH = "equal to the size of a head"
    SCALE = "the scale of attention logits, as query_pre_attn_scalar"
    FALCON_HEADS = "one head of keys and values, or as many as of queries"
    FOUR_TIMES = "four times the hidden size"
    STATE_SIZE = "the inner size of a state space layer, as a factor of the hidden size"
    LAYER_TYPES = "which layers have a sliding window"


Table = dict[str, str | Rule]

_ROPE: Table = dict.fromkeys(
    (
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.attn_factor",
        "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.yarn_log_multiplier",
    ),
    Rule.ROPE,
)
_ATTENTION: Table = {
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": Rule.KEY_LENGTH,
    "attention.value_length": Rule.VALUE_LENGTH,
}
_SIZES: Table = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
}
_DENSE: Table = _SIZES | _ATTENTION | _ROPE
_RMS: Table = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_WINDOW: Table = {"attention.sliding_window": "sliding_window"}
_GEMMA: Table = (
    _DENSE
    | _RMS
    | _WINDOW
    | {"attention.scale": Rule.SCALE, "final_logit_softcapping": "final_logit_softcapping"}
    | {"attention.sliding_window_pattern": Rule.LAYER_TYPES}
)
_STATE: Table = dict.fromkeys(
    ("ssm.conv_kernel", "ssm.state_size", "ssm.group_count", "ssm.time_step_rank", "ssm.inner_size"), Rule.USED
)

# llama.cpp's name of the architecture -> key without that name -> transformers' key, or how the key is treated.
TABLES: dict[str, Table] = {
    "llama": _DENSE | _RMS,
    "qwen2": _DENSE | _RMS,
    "qwen3": _DENSE | _RMS,
    "phi3": _DENSE | _RMS | _WINDOW,
    "starcoder2": _DENSE | _WINDOW | {"attention.layer_norm_epsilon": "norm_epsilon"},
    "stablelm": _DENSE
    | {"attention.layer_norm_epsilon": "layer_norm_eps", "use_parallel_residual": "use_parallel_residual"},
    "nemotron": _DENSE | {"attention.layer_norm_epsilon": "norm_eps"},
    "gemma2": _GEMMA | {"attn_logit_softcapping": "attn_logit_softcapping"},
    "gemma3": _GEMMA | {"rope.freq_base_swa": Rule.ROPE},
    "gemma4": _SIZES
    | _RMS
    | _WINDOW
    | dict.fromkeys(("rope.freq_base", "rope.freq_base_swa"), Rule.ROPE)
    | dict.fromkeys(("rope.dimension_count", "rope.dimension_count_swa"), Rule.USED)
    | dict.fromkeys(("attention.value_length", "attention.value_length_swa"), Rule.USED)
    | {
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": Rule.USED,
        "attention.key_length_swa": "head_dim",
        "attention.shared_kv_layers": "num_kv_shared_layers",
        "attention.sliding_window_pattern": Rule.LAYER_TYPES,
        "embedding_length_per_layer_input": "hidden_size_per_layer_input",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "falcon": _DENSE
    | {
        "feed_forward_length": "ffn_hidden_size",
        "attention.head_count_kv": Rule.FALCON_HEADS,
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
    "lfm2": _DENSE
    | {
        "attention.head_count_kv": Rule.USED,
        "attention.layer_norm_rms_epsilon": "norm_eps",
        "shortconv.l_cache": "conv_L_cache",
    },
    "qwen35": _SIZES
    | _RMS
    | _STATE
    | dict.fromkeys(("block_count", "nextn_predict_layers"), Rule.USED)
    | dict.fromkeys(("rope.freq_base", "rope.dimension_count", "rope.dimension_sections"), Rule.USED)
    | {
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.value_length": Rule.VALUE_LENGTH,
        "full_attention_interval": Rule.USED,
    },
    "gpt2": {
        "vocab_size": "vocab_size",
        "context_length": "n_positions",
        "block_count": "n_layer",
        "embedding_length": "n_embd",
        "feed_forward_length": "n_inner",
        "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
    "bloom": {
        "vocab_size": "vocab_size",
        "context_length": Rule.NO_MATTER,  # its attention has no positions, only distances
        "block_count": "n_layer",
        "embedding_length": "hidden_size",
        "feed_forward_length": Rule.FOUR_TIMES,
        "attention.head_count": "n_head",
        "attention.head_count_kv": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
    "mamba": {
        "vocab_size": "vocab_size",
        "context_length": Rule.NO_MATTER,
        "block_count": "num_hidden_layers",
        "embedding_length": "hidden_size",
        "ssm.conv_kernel": "conv_kernel",
        "ssm.state_size": "state_size",
        "ssm.time_step_rank": "time_step_rank",
        "ssm.inner_size": Rule.STATE_SIZE,
        "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    },
}
# Read by transformers, and refused before any of their keys matters: mixtures of experts (layout.py), and what is no
# causal language model.
REFUSED = ("qwen2moe", "qwen3moe", "qwen35moe", "gpt-oss", "minimax-m2", "t5", "t5encoder", "deci")
# Sizes that transformers puts under names that the config does not have.
STRAY = {"gpt2": ("n_ctx", "feed_forward_length"), "falcon": ("num_key_value_heads",), "llama": ("sliding_window",)}
# A file without these is refused: llama.cpp cannot load it, and transformers takes another model's value.
REQUIRED = (
    "context_length",
    "block_count",
    "embedding_length",
    "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon",
)
# Rotates the first part of each head alone, where the file says so.
PARTIALLY_ROTATED = ("phi3", "stablelm", "nemotron")

# Of any architecture: nothing is computed with these.
NO_MATTER = {"pooling_type", "tensor_data_layout", "rope.scaling.finetuned"}
# Of any architecture: these values change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.head_count": (0,),
    "attention.head_count_kv": (0,),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "feed_forward_length": (0,),
    "final_logit_softcapping": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "residual_scale": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.factor": (0, 1),
    "rope.scaling.type": ("none",),
    "rope.scaling.yarn_log_multiplier": (0,),
    "ssm.dt_b_c_rms": (False,),
    "use_parallel_residual": (True,),
}

# Keys of the tokenizer: transformers makes the tokenizer of these, or importer.py and pre_tokenizer.py use them.
TOKENIZER = {
    "chat_template",
    *(f"ggml.{name}" for name in ("model", "pre", "tokens", "token_type", "scores", "merges", "precompiled_charsmap")),
    *(f"ggml.{name}_token_id" for name in ("bos", "eos", "eot", "eom", "unknown", "padding")),
    *(f"ggml.{name}" for name in ("add_bos_token", "add_eos_token", "add_space_prefix")),
}
# Keys of the tokenizer by which no token of a text changes: other templates, and tokens that a text may spell.
TOKENIZER_NO_MATTER = {
    "chat_templates",
    "huggingface.json",
    "rwkv.world",
    "ggml.token_type_count",
    "ggml.remove_extra_whitespaces",  # of T5 alone
    "ggml.add_sep_token",  # of encoders alone
    *(f"ggml.{name}_token_id" for name in ("seperator", "separator", "cls", "mask", "prefix", "suffix", "middle")),
    *(f"ggml.fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
}
# Beginnings of keys about the file itself: its container, its name and origin, and how it was quantized.
NOTES = ("GGUF", "general", "split", "quantize", "imatrix")
