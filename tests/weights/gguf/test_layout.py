"""Tensors get the names and the layout that transformers gives them, all of them, or the file is refused."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf_files import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KEY_HEADS,
    TOKENS,
    add_tokenizer,
    finish,
    tiny_weights,
    write_gguf,
)
from merge_runs import stored as stored_tensors
from transformers import AutoModelForCausalLM

from benchmarks.common import plain_checkpoint
from qlora_trainer.common.errors import ModelError
from qlora_trainer.common.progress import silent
from qlora_trainer.weights.gguf.importer import import_gguf


def write_convolutional_gguf(path: Path) -> Path:
    """An LFM2 of one convolution and one attention layer, which transformers reads by its newer tables."""
    generator = np.random.default_rng(0)
    writer = GGUFWriter(path, "lfm2")
    writer.add_context_length(256)
    writer.add_block_count(2)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_rope_freq_base(50000.0)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv([0, KEY_HEADS])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_shortconv_l_cache(3)
    add_tokenizer(writer)
    shapes = {"token_embd.weight": (len(TOKENS), HIDDEN), "token_embd_norm.weight": (HIDDEN,)}
    for block in ("blk.0", "blk.1"):
        shapes |= {f"{block}.{norm}.weight": (HIDDEN,) for norm in ("attn_norm", "ffn_norm")}
        shapes |= {f"{block}.{name}.weight": (INTERMEDIATE, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes[f"{block}.ffn_down.weight"] = (HIDDEN, INTERMEDIATE)
    shapes["blk.0.shortconv.in_proj.weight"] = (3 * HIDDEN, HIDDEN)
    shapes["blk.0.shortconv.out_proj.weight"] = (HIDDEN, HIDDEN)
    shapes["blk.0.shortconv.conv.weight"] = (HIDDEN, 3)
    shapes["blk.1.attn_q.weight"] = shapes["blk.1.attn_output.weight"] = (HIDDEN, HIDDEN)
    shapes["blk.1.attn_k.weight"] = shapes["blk.1.attn_v.weight"] = (KEY_HEADS * HEAD_DIM, HIDDEN)
    shapes["blk.1.attn_q_norm.weight"] = shapes["blk.1.attn_k_norm.weight"] = (HEAD_DIM,)
    for name, shape in shapes.items():
        values = generator.normal(size=shape).astype(np.float32)
        if len(shape) == 2 and shape[1] % 32 == 0:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    return finish(writer, path)


def test_architecture_read_by_weight_conversions_has_the_values_transformers_reads(tmp_path: Path) -> None:
    path = write_convolutional_gguf(tmp_path / "lfm2.gguf")
    directory = import_gguf(path, tmp_path / "cache", silent)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).state_dict()
    stored = stored_tensors(directory)
    assert stored.keys() == reference.keys() - {"lm_head.weight"}
    for name, tensor in stored.items():
        assert torch.equal(tensor, reference[name].to(tensor.dtype)), name
    assert stored["model.layers.0.conv.conv.weight"].shape == (HIDDEN, 1, 3)
    plain = plain_checkpoint(directory, tmp_path / "plain")
    _, loading = AutoModelForCausalLM.from_pretrained(plain, output_loading_info=True)
    assert not any(loading.values())


def test_unknown_architecture_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_weights(), architecture="rwkv6")
    with pytest.raises(ModelError, match=r"(?s)rwkv6.*it reads: .*gemma3, .*llama, .*phi3, .*qwen3"):
        import_gguf(path, tmp_path / "cache", silent)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    path = write_gguf(tmp_path / "tiny.gguf", tiny_weights(), leave_out=name)
    with pytest.raises(ModelError, match=f"lacks 1 of the 11 tensors.*{name}"):
        import_gguf(path, tmp_path / "cache", silent)


def test_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    weights = tiny_weights()
    weights["model.norm.weight"] = np.ones(32, np.float32)
    path = write_gguf(tmp_path / "tiny.gguf", weights)
    with pytest.raises(
        ModelError, match=r"output_norm\.weight has shape \(32,\), but .*model\.norm\.weight has \(64,\)"
    ):
        import_gguf(path, tmp_path / "cache", silent)
