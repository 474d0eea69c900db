"""A base whose files were hashed once is not hashed again, is the same base, and is found out where it changed."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import tiny_weights, write_gguf
from safetensors.torch import load_file
from spying import noting
from tiny_models import load, make_model_directory

from qlora_trainer.adapters.inject import adapter_state_dict
from qlora_trainer.common import file_identity
from qlora_trainer.common.cache import user_cache
from qlora_trainer.common.errors import ModelError
from qlora_trainer.common.file_identity import FileIdentity
from qlora_trainer.common.progress import silent
from qlora_trainer.config.schema import ModelConfig, RunConfig
from qlora_trainer.model import fill, quantized_copy
from qlora_trainer.model import load as load_module
from qlora_trainer.model.load import load_base_model, plan_base
from qlora_trainer.model.load_plan import widest_dtype
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.model.quantized_copy import load_base, quantize_checkpoint
from qlora_trainer.runs.run import Run
from qlora_trainer.runs.start import start_run
from qlora_trainer.weights import model_directory
from qlora_trainer.weights.gguf.importer import import_gguf
from qlora_trainer.weights.model_directory import ModelDirectory

CPU = torch.device("cpu")
IDS = torch.arange(5, 25)[None]
SMAPS = Path("/proc/self/smaps")


@pytest.fixture(autouse=True)
def settled_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if files had been written long before they are loaded; and small tensors are mapped as large ones are."""
    monkeypatch.setattr(file_identity, "CLOCK_TICK_NS", 0)
    monkeypatch.setattr(fill, "PIECE_BYTES", 1)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of bytes of each piece that is hashed by sha256."""
    pieces: list[int] = []
    sha256 = hashlib.sha256

    class Counting:
        def __init__(self, data: bytes = b"") -> None:
            self.digest = sha256()
            self.update(data)

        def update(self, data: Any) -> None:
            pieces.append(len(data))
            self.digest.update(data)

        def hexdigest(self) -> str:
            return self.digest.hexdigest()

    monkeypatch.setattr(hashlib, "sha256", Counting)
    return pieces


@pytest.fixture
def kept(tiny_llama: Path, tmp_path: Path) -> Path:
    return quantize(tiny_llama, tmp_path / "kept")


def quantize(directory: Path, output: Path) -> Path:
    quantize_checkpoint(ModelDirectory.open(directory), output, device=CPU)
    return output


def records() -> list[Path]:
    return sorted((user_cache() / "bases").glob("*.json"))


def test_a_kept_copy_is_hashed_at_its_first_start_alone(kept: Path, hashed: list[int]) -> None:
    size = sum(info.nbytes for info in ModelDirectory.open(kept).tensors.values())
    first = load(kept)
    assert sum(hashed) > size
    hashed.clear()
    again = load(kept)
    assert sum(hashed) < 10_000  # the keys of records
    assert again.fingerprint == first.fingerprint
    hashed.clear()
    assert load(kept, verify_bytes=True).fingerprint == first.fingerprint
    assert sum(hashed) > size


def test_of_a_16_bit_base_only_what_is_made_here_is_hashed_again(tiny_llama: Path, hashed: list[int]) -> None:
    first = load(tiny_llama)
    hashed.clear()
    again = load(tiny_llama)
    codes = sum(layer.packed.nbytes for layer in again.model.modules() if isinstance(layer, NF4Linear))
    assert codes <= sum(hashed) < codes + 10_000
    assert again.fingerprint == first.fingerprint


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "gemma3", "qwen2", "mixtral"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"compute_dtype": "bfloat16"}, {"lm_head": "8bit", "embeddings": "cpu", "compute_dtype": "bfloat16"}],
    ids=["fp32", "bf16", "less memory"],
)
def test_a_known_base_is_the_one_that_was_hashed(
    family: str, settings: dict[str, str], tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    for directory in (tiny_models(family), quantize(tiny_models(family), tmp_path / "kept")):
        first, again = load(directory, **settings), load(directory, **settings)
        assert again.fingerprint == first.fingerprint
        found = dict(again.model.named_parameters()) | dict(again.model.named_buffers())
        for name, tensor in (*first.model.named_parameters(), *first.model.named_buffers()):
            assert torch.equal(found[name], tensor), name
        assert torch.equal(again.model(IDS).logits, first.model(IDS).logits)


def test_an_imported_gguf_base_is_known_by_its_file(tmp_path: Path, hashed: list[int]) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_weights())
    first = load(import_gguf(file, user_cache(), silent))
    hashed.clear()
    again = load(import_gguf(file, user_cache(), silent))
    codes = sum(layer.packed.nbytes for layer in again.model.modules() if isinstance(layer, NF4Linear))
    assert sum(hashed) < codes + 10_000
    assert again.fingerprint == first.fingerprint


def test_what_says_how_weights_are_quantized_is_asked_for_at_once(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk, two hundred small tensors that are waited for one by one take longer than all else."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, offset, size, advice: asked.append((offset, size)))
    directory = ModelDirectory.open(kept)
    states = {
        (info.offset, info.nbytes)
        for name, info in directory.tensors.items()
        if name.endswith("quant_state.bitsandbytes__nf4")
    }
    widest_dtype(directory)
    assert len(states) == 14
    assert sorted(asked) == sorted(states)


def test_the_config_is_read_anew(kept: Path) -> None:
    """Its file is small, and is no part of what is remembered."""
    first = load(kept).fingerprint
    config = json.loads((kept / "config.json").read_text())
    (kept / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert (first.difference(load(kept).fingerprint) or "").startswith("config.json differs in rms_norm_eps")


def flip(path: Path, tensor: str) -> None:
    """Change a byte of a tensor in its file."""
    info = ModelDirectory.open(path).tensors[tensor]
    with info.file.open("r+b") as file:
        file.seek((info.offset or 0) + 3)
        (byte,) = file.read(1)
        file.seek((info.offset or 0) + 3)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("tensor", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_changed_byte_is_found_by_the_files_times(tensor: str, kept: Path) -> None:
    first = load(kept).fingerprint
    before = (kept / "model.safetensors").stat()
    flip(kept, tensor)
    os.utime(kept / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))  # as some tools do
    assert first.difference(load(kept).fingerprint) is not None


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight.absmax",
        "model.embed_tokens.weight",
    ],
)
def test_verify_bytes_finds_a_byte_that_changed_behind_the_files_times(tensor: str, kept: Path) -> None:
    """As where a disk fails: the record is given the identity of the damaged file, as if that had not changed."""
    first = load(kept).fingerprint
    flip(kept, tensor)
    (path,) = records()
    record = json.loads(path.read_text())
    record["files"] = [asdict(FileIdentity.of(kept / "model.safetensors"))]
    path.write_text(json.dumps(record))
    assert load(kept).fingerprint == first  # believed, as it is not read
    with pytest.raises(
        ModelError,
        match=rf"other bytes than when it was first read in 1 tensor, such as {tensor}, though .*disk may be failing",
    ):
        load(kept, verify_bytes=True)
    assert records() == []  # and what was wrong is not believed again
    if not tensor.endswith("absmax"):  # whose mean changes less than one device's differs from another's
        assert first.difference(load(kept).fingerprint) is not None


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"content": 1}', "truncated", "no fingerprint"])
def test_a_damaged_record_is_ignored_and_made_anew(damage: str, kept: Path, hashed: list[int]) -> None:
    first = load(kept).fingerprint
    (path,) = records()
    text = path.read_text()
    record = json.loads(text)
    if damage == "no fingerprint":
        del record["content"]["fingerprint"]["tensors"]
    path.write_text({"truncated": text[:-9], "no fingerprint": json.dumps(record)}.get(damage, damage))
    hashed.clear()
    assert load(kept).fingerprint == first
    assert sum(hashed) > 100_000
    assert path.read_text() == text


def test_a_file_that_changes_while_it_is_loaded_is_refused(kept: Path) -> None:
    load(kept)

    def touch(label: str, done: int, total: int | None) -> None:
        (kept / "model.safetensors").touch()

    with pytest.raises(ModelError, match="was changed while it was being read"):
        load_base_model(ModelDirectory.open(kept), ModelConfig(name="kept"), user_cache(), touch)


def test_a_file_that_is_replaced_while_the_base_is_in_use_stays_what_it_was(kept: Path, tmp_path: Path) -> None:
    load(kept)
    model = load(kept, compute_dtype="bfloat16").model
    other = quantize(make_model_directory(tmp_path / "m", seed=1), tmp_path / "other")
    expected = load(kept, compute_dtype="bfloat16").model(IDS).logits
    (other / "model.safetensors").replace(kept / "model.safetensors")
    assert torch.equal(model(IDS).logits, expected)
    assert not torch.equal(load(kept, compute_dtype="bfloat16").model(IDS).logits, expected)


def mapped_spans(file: str) -> list[range]:
    """Where a file is mapped into this process."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(file)]
    return [range(*(int(end, 16) for end in line.split()[0].split("-"))) for line in lines]


def dirty_bytes(file: str) -> int:
    """Bytes of a file's mappings that were written to, and so have become this process's own."""
    total, inside = 0, False
    for line in SMAPS.read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(file)
        elif inside and line.startswith("Anonymous:"):
            total += 1024 * int(line.split()[1])
    return total


def trained(run: Run) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses: list[float] = []
    run.train(lambda record: losses.append(record["loss"]))
    return losses, adapter_state_dict(run.base.model)


@pytest.mark.skipif(not SMAPS.is_file(), reason="needs Linux's /proc")
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_training_on_a_mapped_base_is_bit_for_bit_the_same_and_writes_nothing_into_it(
    compute_dtype: str, bias: str, tiny_config: Callable[..., RunConfig], tiny_models: Callable[[str], Path]
) -> None:
    settings: dict[str, Any] = {
        "model": {"name": str(tiny_models("qwen2")), "cache_quantized": True, "compute_dtype": compute_dtype},
        "adapter": {"bias": bias},
        "training": {"max_steps": 3, "global_batch_size": 2},
    }
    first = start_run(tiny_config("first", **settings))  # hashed; what is dense is in memory of its own
    copied = trained(first)
    (copy,) = (user_cache() / "quantized").iterdir()
    before = (copy / "model.safetensors").read_bytes()
    first.release()
    run = start_run(tiny_config("known", **settings))
    spans = mapped_spans(f"{copy.name}/model.safetensors")
    layers = [module for module in run.base.model.modules() if isinstance(module, NF4Linear)]
    assert all(any(layer.packed.data_ptr() in span for span in spans) for layer in layers)
    embedding = run.base.model.get_input_embeddings().weight
    assert any(embedding.data_ptr() in span for span in spans) == (compute_dtype == "bfloat16")
    losses, adapter = trained(run)
    assert losses == copied[0]
    assert adapter.keys() == copied[1].keys()
    assert all(torch.equal(adapter[name], tensor) for name, tensor in copied[1].items())
    assert dirty_bytes(f"{copy.name}/model.safetensors") == 0
    assert (copy / "model.safetensors").read_bytes() == before
    assert load_file(copy / "model.safetensors").keys()


def test_a_kept_copy_is_found_without_listing_the_original_twice(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the original's model made again, once the copy is there."""
    settings = ModelConfig(name=str(tiny_llama), cache_quantized=True)
    first = load_base(ModelDirectory.open(tiny_llama), settings, user_cache())
    directory = ModelDirectory.open(tiny_llama)
    listed: list[Path] = []
    list_tensors = model_directory.list_tensors
    monkeypatch.setattr(model_directory, "list_tensors", noting(list_tensors, lambda path, *rest: listed.append(path)))
    planned: list[ModelDirectory] = []
    for module in (load_module, quantized_copy):
        monkeypatch.setattr(module, "plan_base", noting(plan_base, planned.append))
    again = load_base(directory, settings, user_cache())
    assert again.fingerprint == first.fingerprint
    assert len(listed) == len(set(listed)) == 2
    assert [plan.path for plan in planned] == [path for path in listed if path != tiny_llama]
