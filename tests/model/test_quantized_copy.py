"""Promises of a base kept in 4 bits on disk: it is the same base here, and plain transformers loads it as it is."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cards import pretend_free_memory
from gguf_files import tiny_weights, write_gguf
from marks import slow_but
from safetensors.torch import load_file, save_file
from tiny_models import load, make_model_directory
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconConfig

from qlora_trainer.common.cache import user_cache
from qlora_trainer.common.errors import (
    DiskError,
    InsufficientMemoryError,
    ModelError,
    OutputExistsError,
    QuantizationError,
)
from qlora_trainer.common.progress import silent
from qlora_trainer.config.schema import ModelConfig, RunConfig
from qlora_trainer.merging.merge_run import merge_run
from qlora_trainer.model import fill as streaming_load
from qlora_trainer.model import quantized_copy as prequantize
from qlora_trainer.model.load_plan import RECORD_NAME
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.model.quantized_copy import load_base, quantize_checkpoint
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.weights import side_files as model_files
from qlora_trainer.weights.gguf.importer import import_gguf
from qlora_trainer.weights.model_directory import ModelDirectory

CPU = torch.device("cpu")
FAMILIES = ("llama", "llama_tied", "qwen2", "gpt2", "phi3", "gemma3")


def quantize(directory: Path, output: Path, **options: Any) -> Path:
    quantize_checkpoint(ModelDirectory.open(directory), output, device=CPU, **options)
    return output


@pytest.mark.parametrize("family", slow_but(FAMILIES, "llama", "gpt2"))
def test_the_copy_is_the_same_base(family: str, tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    """To the last bit: config, packed codes, statistics, what is dense, and even what the original's bytes were."""
    ours, kept = load(tiny_models(family)), load(quantize(tiny_models(family), tmp_path / "nf4"))
    assert kept.fingerprint == ours.fingerprint
    assert ours.fingerprint.difference(kept.fingerprint) is None
    ids = torch.arange(5, 25)[None]
    assert torch.equal(ours.model(ids).logits, kept.model(ids).logits)


@pytest.mark.parametrize("family", slow_but(FAMILIES, "phi3"))
def test_plain_transformers_loads_the_copy_to_the_same_logits(
    family: str, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    """Both compute in bf16, as a 16-bit checkpoint's users do; every layer that is 4-bit here is there too."""
    kept = quantize(tiny_models(family), tmp_path / "nf4")
    theirs, reported = AutoModelForCausalLM.from_pretrained(
        kept, dtype=torch.bfloat16, device_map={"": "cpu"}, output_loading_info=True
    )
    assert not any(reported[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = load(kept, compute_dtype="bfloat16").model
    ids = torch.arange(5, 25)[None]
    expected = ours(ids).logits.float()
    error = (theirs(ids).logits.float() - expected).abs().max() / expected.abs().max()
    assert error < 0.01, float(error)  # roundings of bf16; other weights would give other logits
    assert AutoTokenizer.from_pretrained(kept)("hello")["input_ids"]


def test_a_copy_in_fp32_gives_plain_transformers_our_very_logits(tmp_path: Path) -> None:
    directory = make_model_directory(tmp_path / "m", dtype=torch.float32)
    kept = quantize(directory, tmp_path / "nf4")
    theirs = AutoModelForCausalLM.from_pretrained(kept, dtype=torch.float32, device_map={"": "cpu"})
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(theirs(ids).logits, load(kept).model(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_copy_in_shards_holds_every_tensor(tiny_llama: Path, tmp_path: Path) -> None:
    kept = quantize(tiny_llama, tmp_path / "nf4", max_shard_bytes=30_000)
    assert len(list(kept.glob("*.safetensors"))) > 2
    assert load(kept).fingerprint == load(tiny_llama).fingerprint


def test_a_copy_stays_in_its_file_on_a_cpu_and_nothing_writes_there(tiny_llama: Path, tmp_path: Path) -> None:
    kept = quantize(tiny_llama, tmp_path / "nf4")
    before = (kept / "model.safetensors").read_bytes()
    model = load(kept, compute_dtype="bfloat16").model  # what is dense needs no cast
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split()[0].split("-") for line in lines if line.endswith("nf4/model.safetensors")]
    spans = [range(int(start, 16), int(stop, 16)) for start, stop in mapped]
    assert all(any(layer.packed.data_ptr() in span for span in spans) for layer in layers)
    assert not any(parameter.data_ptr() in span for span in spans for parameter in model.parameters())
    layers[0].packed.fill_(7)  # into the process's own page
    assert (kept / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("damage", slow_but(["another", "damaged"], "damaged"))
def test_a_difference_from_the_original_is_explained(damage: str, tiny_llama: Path, tmp_path: Path) -> None:
    """By what lay on disk: the bytes of another checkpoint, or of the same, quantized in another way."""
    if damage == "another":
        other = quantize(make_model_directory(tmp_path / "m", seed=1), tmp_path / "nf4")
    else:
        other = quantize(tiny_llama, tmp_path / "nf4")
        tensors = load_file(other / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"][3] ^= 1
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    reported = load(tiny_llama).fingerprint.difference(load(other).fingerprint) or ""
    if damage == "another":
        assert "14 of 14 layers hold other weights" in reported
        assert "another checkpoint: 21 of its 21 tensors differ on disk" in reported
    else:
        assert "1 of 14 layers holds other weights, such as model.layers.0.mlp.up_proj" in reported
        assert "made of the same bytes: quantized otherwise, or a copy kept in 4 bits is damaged" in reported


def test_what_cannot_be_kept_in_4_bits_is_refused_and_leaves_nothing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = quantize(tiny_llama, tmp_path / "nf4")
    with pytest.raises(ModelError, match="holds 4-bit weights already"):
        quantize(kept, tmp_path / "again")
    with pytest.raises(OutputExistsError):
        quantize(tiny_llama, kept)
    bad = make_model_directory(tmp_path / "bad")
    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("inf")
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.mlp\.up_proj\.weight in model\.safetensors"):
        quantize(bad, tmp_path / "again")
    monkeypatch.setattr(model_files.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**24))
    with pytest.raises(DiskError, match=r"quantized model takes .* GiB free"):
        quantize(tiny_llama, tmp_path / "again")
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"bad", "nf4"}


def kept_copies(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "quantized").glob("*"))


def test_a_kept_copy_is_made_once_and_anew_where_the_base_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model_directory(tmp_path / "m")
    settings = ModelConfig(name=str(base), cache_quantized=True)
    first = load_base(ModelDirectory.open(base), settings, tmp_path / "cache")
    assert first.directory.path == base  # a merge starts there
    assert first.fingerprint == load(base).fingerprint
    (copy,) = kept_copies(tmp_path)
    assert (copy / RECORD_NAME).is_file()

    with monkeypatch.context() as patch:
        patch.setattr(prequantize, "quantize_checkpoint", lambda *a, **k: pytest.fail("made again"))
        assert load_base(ModelDirectory.open(base), settings, tmp_path / "cache").fingerprint == first.fingerprint

    path = base / "model.safetensors"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 2
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=times)  # of the same size, and as old as before
    changed = load_base(ModelDirectory.open(base), settings, tmp_path / "cache")
    assert first.fingerprint.difference(changed.fingerprint) is not None
    assert len(kept_copies(tmp_path)) == 2


@pytest.mark.slow
def test_imported_files_of_one_name_and_config_have_copies_of_their_own(tmp_path: Path) -> None:
    """A directory that represents a GGUF file holds no weights; the file it names does."""
    (tmp_path / "files").mkdir()
    codes = []
    for seed in (0, 1):
        file = write_gguf(tmp_path / "files" / "model.gguf", tiny_weights(seed))
        base = import_gguf(file, tmp_path / "cache", silent)
        settings = ModelConfig(name=str(file), cache_quantized=True)
        kept = load_base(ModelDirectory.open(base), settings, tmp_path / "cache")
        assert kept.fingerprint == load(base).fingerprint
        codes.append(kept.fingerprint.tensors)
        file.unlink()
    assert codes[0] != codes[1]


def test_what_cannot_be_kept_is_loaded_as_it_is_and_reported(tmp_path: Path) -> None:
    directory = tmp_path / "falcon"
    config = FalconConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(directory)
    base = load_base(
        ModelDirectory.open(directory), ModelConfig(name=str(directory), cache_quantized=True), tmp_path / "cache"
    )
    assert base.fingerprint == load(directory).fingerprint
    (warning,) = base.warnings
    assert "its layers of class FalconLinear" in warning
    assert "It was quantized while loading" in warning
    assert kept_copies(tmp_path) == []


def test_cache_that_cannot_keep_a_copy_is_named_with_what_moves_it(tmp_path: Path) -> None:
    base = make_model_directory(tmp_path / "m")
    with pytest.raises(DiskError, match=r"^/dev/null/quantized/.* cannot be written: .*Set XDG_CACHE_HOME"):
        load_base(ModelDirectory.open(base), ModelConfig(name=str(base), cache_quantized=True), Path("/dev/null"))


def test_a_checkpoint_that_is_4_bit_already_is_not_kept_again_whatever_its_config_says(
    tiny_llama: Path, tmp_path: Path
) -> None:
    base = quantize(tiny_llama, tmp_path / "nf4")
    config = json.loads((base / "config.json").read_text())
    del config["quantization_config"]
    (base / "config.json").write_text(json.dumps(config))
    loaded = load_base(ModelDirectory.open(base), ModelConfig(name=str(base), cache_quantized=True), tmp_path / "cache")
    assert loaded.fingerprint == load(tiny_llama).fingerprint
    assert loaded.warnings == []
    assert kept_copies(tmp_path) == []


def test_a_16_bit_model_with_a_tensor_in_fp32_is_computed_with_in_16_bits(tmp_path: Path) -> None:
    """By transformers, which follows the copy's config; here model.compute_dtype says."""
    base = make_model_directory(tmp_path / "m")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((quantize(base, tmp_path / "nf4") / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"


def test_memory_that_is_too_little_or_runs_out_while_quantizing_ends_with_an_error_message(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(streaming_load, "quantize_weight", full)
        with pytest.raises(InsufficientMemoryError, match=r"Quantizing .* on cpu ran out of memory: .*2 GiB"):
            quantize(tiny_llama, tmp_path / "nf4")
    pretend_free_memory(monkeypatch, lambda device: 10_000)
    with pytest.raises(InsufficientMemoryError, match=r"Quantizing .* GiB free"):
        quantize(tiny_llama, tmp_path / "nf4")
    assert not (tmp_path / "nf4").exists()


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


@pytest.mark.slow
def test_a_run_with_a_kept_base_resumes_and_merges(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Its losses are those of the run that keeps nothing, resumed with the copy or without, and so is the merge."""
    steps = {"training": {"max_steps": 2}, "optimizer": {"learning_rate": 2e-2}}
    plain = start_run(tiny_config("plain", **steps))
    plain.train(lambda record: None)
    kept = start_run(tiny_config("kept", model={"cache_quantized": True}, **steps))
    assert kept.base.fingerprint == plain.base.fingerprint
    assert len(list((user_cache() / "quantized").iterdir())) == 1
    resume_run(kept.directory, ["model.cache_quantized=false"])
    resume_run(kept.directory, ["model.cache_quantized=true"]).train(lambda record: None)
    assert losses(kept.directory) == losses(plain.directory)
    merge_run(kept.directory, tmp_path / "original", base="original")  # the copy has none, but the base has
    for run in (plain, kept):
        merge_run(run.directory, tmp_path / "merged" / run.directory.name, base="dequantized")
    one, other = (load_file(tmp_path / "merged" / name / "model.safetensors") for name in ("plain", "kept"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_on_a_prequantized_copy_is_a_run_on_its_original(
    tiny_config: Callable[..., RunConfig], tiny_llama: Path, tmp_path: Path
) -> None:
    copy = quantize(tiny_llama, tmp_path / "nf4")
    run = start_run(tiny_config(training={"max_steps": 2}))
    resume_run(run.directory, [f"model.name={copy}"]).train(lambda record: None)
    merged = merge_run(run.directory, tmp_path / "merged")
    assert merged.choice.base == "dequantized"  # the copy has no original weights


def test_the_same_checkpoint_tensors_come_out_as_went_in(tiny_llama: Path, tmp_path: Path) -> None:
    """Under their own names: what is dense to the byte, and next to each weight what bitsandbytes keeps."""
    source, kept = (
        ModelDirectory.open(tiny_llama).tensors,
        ModelDirectory.open(quantize(tiny_llama, tmp_path / "nf4")).tensors,
    )
    assert {name for name in kept if ".weight." not in name} == source.keys()
    dense = {name for name in source if kept[name].shape == source[name].shape}
    assert len(source) - len(dense) == 14
    before, after = load_file(tiny_llama / "model.safetensors"), load_file(tmp_path / "nf4" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in dense)
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    assert config.pop("quantization_config")["bnb_4bit_quant_type"] == "nf4"
    assert config == json.loads((tiny_llama / "config.json").read_text())
