"""Write small GGUF files: of a one-layer Llama, and of a random model of any architecture."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGES = ["h e", "l l", "he ll", "Ġ w"]


def byte_alphabet() -> list[str]:
    """The 256 characters by which byte-level BPE spells bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(hidden))]


HIDDEN, HEADS, KEY_HEADS, HEAD_DIM, INTERMEDIATE = 64, 4, 2, 16, 96
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "he", "ll", "hell", "Ġw"]


def tiny_weights(seed: int = 0, untied: bool = False, vocabulary: int = len(TOKENS)) -> dict[str, np.ndarray]:
    """A one-layer Llama's weights by the checkpoint's names, in the checkpoint's layout."""
    generator = np.random.default_rng(seed)
    shapes = {
        "model.embed_tokens.weight": (vocabulary, HIDDEN),
        "model.layers.0.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        "model.layers.0.self_attn.k_proj.weight": (KEY_HEADS * HEAD_DIM, HIDDEN),
        "model.layers.0.self_attn.v_proj.weight": (KEY_HEADS * HEAD_DIM, HIDDEN),
        "model.layers.0.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        "model.layers.0.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "model.layers.0.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        "model.layers.0.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        "model.layers.0.input_layernorm.weight": (HIDDEN,),
        "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
        "model.norm.weight": (HIDDEN,),
    }
    if untied:
        shapes["lm_head.weight"] = (vocabulary, HIDDEN)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
    "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp keeps them: the two halves of each head's rotary pairs, alternating."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def add_tokenizer(
    writer: GGUFWriter,
    tokens: Sequence[str] = TOKENS,
    merges: Sequence[str] = MERGES,
    add_keys: Callable[[GGUFWriter], None] | None = None,
) -> None:
    writer.add_tokenizer_model("gpt2")
    (add_keys or (lambda writer: writer.add_tokenizer_pre("smollm")))(writer)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)


def finish(writer: GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_gguf(
    path: Path,
    weights: dict[str, np.ndarray],
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    architecture: str = "llama",
    leave_out: str | None = None,
    rope_divisors: np.ndarray | None = None,
    kind_of_file: str = "model",
    tokens: Sequence[str] = TOKENS,
    merges: Sequence[str] = MERGES,
    add_keys: Callable[[GGUFWriter], None] | None = None,
) -> Path:
    writer = GGUFWriter(path, architecture)
    writer.add_type(kind_of_file)
    writer.add_name("tiny")
    writer.add_context_length(256)
    writer.add_block_count(1)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(50000.0)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    add_tokenizer(writer, tokens, merges, add_keys)
    if rope_divisors is not None:
        writer.add_tensor("rope_freqs.weight", rope_divisors)
    for name, weight in weights.items():
        if name == leave_out:
            continue
        values = weight
        if ".q_proj." in name:
            values = interleaved(weight, HEADS)
        if ".k_proj." in name:
            values = interleaved(weight, KEY_HEADS)
        if weight.ndim == 1 or kind == GGMLQuantizationType.F32:
            writer.add_tensor(GGUF_NAMES[name], values)
        else:
            writer.add_tensor(GGUF_NAMES[name], gguf.quants.quantize(values, kind), raw_dtype=kind)
    return finish(writer, path)


def write_model(
    path: Path,
    architecture: str,
    config: PretrainedConfig,
    keys: Mapping[str, object],
    factors: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Write a random model of any architecture as llama.cpp's converter does; return the model."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    names = gguf.get_tensor_name_map(
        {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[architecture], config.num_hidden_layers
    )
    writer = GGUFWriter(path, architecture)
    for key, value in keys.items():
        add_key(writer, key if key.startswith(("tokenizer.", "general.", "other.")) else f"{architecture}.{key}", value)
    add_tokenizer(writer)
    for name, values in (factors or {}).items():
        writer.add_tensor(name, values)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.1) + (parameter.ndim == 1))
            values = parameter.numpy()
            if architecture == "llama" and ".q_proj." in name:
                values = interleaved(values, config.num_attention_heads)
            if architecture == "llama" and ".k_proj." in name:
                values = interleaved(values, config.num_key_value_heads)
            if name.endswith("A_log"):
                values = -np.exp(values)
            if name.endswith("conv1d.weight"):
                values = values[:, 0]
            if architecture == "gpt2" and values.ndim == 2 and ".h." in name:
                values = np.ascontiguousarray(values.T)
            if parameter.ndim == 1 and "norm.weight" in name and architecture in ("gemma2", "gemma3", "nemotron"):
                values = values + np.float32(1)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values)
    finish(writer, path)
    return model


def add_key(writer: GGUFWriter, name: str, value: object) -> None:
    """Add a key of metadata, of the type that llama.cpp's converter gives it."""
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)
