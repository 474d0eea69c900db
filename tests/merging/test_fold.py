"""Promises of the merge: what it writes is the model that was trained, whole, or nothing at all."""

import functools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from gguf_files import tiny_weights, write_gguf
from marks import slow_but
from merge_runs import (
    LLAMA,
    ROWS,
    Run,
    altered,
    by_hand,
    check_logits,
    make_base,
    merge_to,
    on_base,
    stored,
    train,
    verifier,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2Model, LlamaConfig, Qwen2Config

from qlora_trainer.common.errors import MergeError
from qlora_trainer.common.progress import silent
from qlora_trainer.merging import fold as merging
from qlora_trainer.merging.streamed_model import load_streamed_model
from qlora_trainer.weights import reading
from qlora_trainer.weights.gguf.importer import import_gguf
from qlora_trainer.weights.gguf.reader import GGUFWeights
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.reading import row_blocks


@pytest.mark.parametrize("tied", slow_but([True, False], False))
def test_merged_fp16_is_the_fp32_sum_cast_once_bit_for_bit(tmp_path: Path, llama: Run, tied: bool) -> None:
    run = llama if tied else train(make_base(tmp_path / "base", LlamaConfig(**LLAMA, tie_word_embeddings=False)))
    report = merge_to(run.inputs, tmp_path / "merged")
    source, merged = stored(run.inputs.base.path), stored(tmp_path / "merged")
    assert merged.keys() == source.keys()
    assert ("lm_head.weight" in merged) is not tied
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, by_hand(run, name, source[name]).half()), name
    assert (report.folded, report.dequantized, report.tensors) == (14, 14, len(source))


def test_blocks_of_rows_give_the_bits_of_whole_tensors(
    tmp_path: Path, llama: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_to(llama.inputs, tmp_path / "whole", dtype=torch.float32)
    blocks = functools.partial(merging.row_blocks, block_elements=1)
    assert len(blocks((640, 64))) == 2
    for module in (merging, reading):
        monkeypatch.setattr(module, "row_blocks", blocks)
    merge_to(llama.inputs, tmp_path / "blocks", dtype=torch.float32)
    whole, by_blocks = stored(tmp_path / "whole"), stored(tmp_path / "blocks")
    assert all(torch.equal(whole[name], by_blocks[name]) for name in whole)


def test_a_gpt2_saved_without_its_prefix_is_mapped_and_transposed(tmp_path: Path) -> None:
    """The hub's gpt2 calls its tensors h.0…, transformers' module is transformer.h.0…; Conv1D stores (I, O)."""
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=128)
    whole = make_base(tmp_path / "whole", config, torch.float32)
    GPT2Model.from_pretrained(whole).save_pretrained(tmp_path / "base")
    assert "h.0.attn.c_attn.weight" in ModelDirectory.open(tmp_path / "base").tensors
    run = train(tmp_path / "base")
    assert run.inputs.is_stored_transposed
    merge_to(run.inputs, tmp_path / "merged", dtype=torch.float32)
    check_logits(run, tmp_path / "merged", kl=1e-10)


def test_the_original_base_is_the_checkpoints_own_weights_plus_the_adapter(tmp_path: Path, llama: Run) -> None:
    report = merge_to(llama.inputs, tmp_path / "merged", base="original")
    assert report.base == "original"
    with pytest.raises(AssertionError):
        check_logits(llama, tmp_path / "merged", kl=1e-3)  # another function than the one trained
    name = "model.layers.1.mlp.down_proj"
    lora_A, lora_B = (llama.inputs.adapter.tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
    source = stored(llama.inputs.base.path)[f"{name}.weight"].float()
    assert torch.equal(stored(tmp_path / "merged")[f"{name}.weight"], (source + 2.0 * (lora_B @ lora_A)).half())


def test_trained_biases_replace_those_of_the_base(tmp_path: Path) -> None:
    run = train(make_base(tmp_path / "base", Qwen2Config(**LLAMA)), bias="all")
    assert sum(name.endswith(".bias") for name in run.inputs.adapter.tensors) == 6
    merge_to(run.inputs, tmp_path / "merged", verify=verifier(run))
    path = "model.layers.0.self_attn.q_proj"
    merged, source = stored(tmp_path / "merged")[f"{path}.bias"], stored(run.inputs.base.path)[f"{path}.bias"]
    assert torch.equal(merged, run.inputs.adapter.tensors[f"base_model.model.{path}.base_layer.bias"].half())
    assert not torch.equal(merged, source.half())


def test_overflow_is_refused_by_name_and_flushes_are_counted(tmp_path: Path) -> None:
    directory = make_base(tmp_path / "base", LlamaConfig(**LLAMA), torch.float32)
    file = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["model.norm.weight"][:3] = torch.tensor([1e-9, -1e-9, 0.0])
    save_file(tensors, file, metadata={"format": "pt"})
    run = train(directory)
    without_embedding = merge_to(run.inputs, tmp_path / "small").flushed_to_zero
    expected = sum(
        int(((weight := by_hand(run, name, tensor)) != 0).sum()) - int((weight.half() != 0).sum())
        for name, tensor in tensors.items()
    )
    assert without_embedding == expected >= 2

    tensors["model.norm.weight"][5] = 70144.0
    save_file(tensors, file, metadata={"format": "pt"})
    run = train(directory)
    with pytest.raises(MergeError, match=r"model\.norm\.weight has a value of 70144, .*bfloat16"):
        merge_to(run.inputs, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merge_to(run.inputs, tmp_path / "merged", dtype=torch.bfloat16)
    assert stored(tmp_path / "merged")["model.norm.weight"][5] == 70144.0


def test_tensors_that_are_no_floats_stay_as_they_are(tmp_path: Path, llama: Run) -> None:
    directory = tmp_path / "base"
    shutil.copytree(llama.inputs.base.path, directory)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    extra = {"steps": torch.tensor(12345678901), "mask": torch.tensor([True, False, True])}
    save_file(extra, directory / "extra.safetensors")
    index["weight_map"] |= dict.fromkeys(extra, "extra.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    merge_to(on_base(llama.inputs, directory), tmp_path / "merged")
    merged = stored(tmp_path / "merged")
    assert all(
        merged[name].dtype == tensor.dtype and torch.equal(merged[name], tensor) for name, tensor in extra.items()
    )


def test_files_next_to_the_weights_are_copied_and_the_config_barely_touched(tmp_path: Path, llama: Run) -> None:
    directory = tmp_path / "base"
    shutil.copytree(llama.inputs.base.path, directory)
    kept = {
        "tokenizer.json": b'{"b":1,  "a": "\xc3\xa9"}\r\n',
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": b"{{ x }}",
        "tokenizer.model": bytes(range(256)),
        "merges.txt": b"a b\n",
        "LICENSE": b"free",
        "additional_chat_templates/tool.jinja": b"{{ tools }}",
    }
    left = {"README.md": b"x", "trainer_state.json": b"{}", "optimizer.pt": b"x", "pytorch_model.bin": b"x"}
    for name, content in (kept | left).items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    config = json.loads((directory / "config.json").read_text())
    config = {"z_first": 1, "quantization_config": {"quant_method": "stale"}} | config | {"größe": 0.1}
    (directory / "config.json").write_text(json.dumps(config))

    inputs = on_base(llama.inputs, directory)
    merge_to(inputs, tmp_path / "merged", provenance={"run": "r1"})
    for name, content in kept.items():
        assert (tmp_path / "merged" / name).read_bytes() == content
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    expected = {key: value for key, value in config.items() if key != "quantization_config"}
    assert config["dtype"] == "bfloat16"
    assert written == expected | {"dtype": "float16", "torch_dtype": "float16"}
    assert list(written)[: len(expected)] == list(expected)
    generation = (directory / "generation_config.json").read_bytes()
    assert (tmp_path / "merged" / "generation_config.json").read_bytes() == generation
    record = json.loads((tmp_path / "merged" / "qlora_merge.json").read_text())
    assert (record["base"], record["dtype"], record["run"]) == ("dequantized", "float16", "r1")
    names = {str(path.relative_to(tmp_path / "merged")) for path in (tmp_path / "merged").rglob("*") if path.is_file()}
    ours = {"config.json", "generation_config.json", "qlora_merge.json", "model.safetensors"}
    assert names == kept.keys() | ours


@pytest.mark.parametrize("untied", slow_but([True, False], True))
def test_of_a_gguf_base_neither_embedding_nor_head_is_ever_decoded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untied: bool
) -> None:
    """Nothing of it is mapped: what is read is decoded. Neither the merge nor its verification reads more than rows."""
    directory = import_gguf(write_gguf(tmp_path / "base.gguf", tiny_weights(untied=untied)), tmp_path / "cache", silent)
    run = train(directory)
    vocabulary = run.model.config.vocab_size
    for module in (merging, reading):
        monkeypatch.setattr(module, "row_blocks", functools.partial(row_blocks, block_elements=1, minimum_rows=64))
    read_most: dict[str, int] = {}
    read = GGUFWeights.read

    def count(self: GGUFWeights, name: str, rows: slice | None = None) -> Tensor:
        found = read(self, name, rows)
        read_most[name] = max(read_most.get(name, 0), len(found))
        return found

    monkeypatch.setattr(GGUFWeights, "read", count)
    inputs = on_base(run.inputs, directory)  # opened where reading is counted
    streamed = load_streamed_model(inputs.base, torch.device("cpu"))
    with torch.no_grad():
        streamed(input_ids=torch.tensor(ROWS[:1]))
    merge_to(inputs, tmp_path / "merged", dtype=torch.float32)
    merge_to(inputs, tmp_path / "original", dtype=torch.float32, base="original")
    by_tokens = [name for name, info in ModelDirectory.open(directory).tensors.items() if info.shape[0] == vocabulary]
    assert len(by_tokens) == 1 + untied
    assert all(0 < read_most[name] < 0.5 * vocabulary for name in by_tokens)
    check_logits(run, tmp_path / "merged", kl=1e-10)


def test_what_is_not_finite_is_refused_by_name(tmp_path: Path, llama: Run) -> None:
    """In the adapter, and so in one block of one weight, whatever the dtype."""
    key = "base_model.model.model.layers.1.mlp.gate_proj.lora_B.weight"
    for value in (math.nan, math.inf):
        spoiled = llama.inputs.adapter.tensors[key].clone()
        spoiled[-1, 0] = value
        for dtype in (torch.float16, torch.float32):
            with pytest.raises(MergeError, match=r"layers\.1\.mlp\.gate_proj\.weight holds values that are not finite"):
                merge_to(altered(llama.inputs, {key: spoiled}), tmp_path / "merged", dtype=dtype)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flushed_elements_are_counted_about_the_smallest_numbers(dtype: torch.dtype) -> None:
    """Half of the smallest number goes to zero, and a little more does not; zeros of either sign are none."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    kept = [smallest, -smallest, smallest * 0.75, 1.0]
    lost = [smallest / 2, -smallest / 2, smallest / 4]
    block = torch.tensor([kept + lost + [0.0, -0.0]], dtype=torch.float32)
    assert merging._count_flushed(block, block.to(dtype)) == len(lost)
    assert merging._count_flushed(block, block) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_merges_to_the_same_weights(tmp_path: Path, llama: Run) -> None:
    """NF4 to the bit, the adapter's product to fp32's rounding."""
    merge_to(llama.inputs, tmp_path / "cpu", dtype=torch.float32)
    report = merge_to(llama.inputs, tmp_path / "cuda", dtype=torch.float32, device="cuda")
    assert report.folded == 14
    on_cpu, on_cuda = stored(tmp_path / "cpu"), stored(tmp_path / "cuda")
    assert all(torch.allclose(on_cuda[name], tensor, rtol=0.0, atol=1e-6) for name, tensor in on_cpu.items())
