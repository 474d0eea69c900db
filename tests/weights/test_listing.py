"""Promises of listing a checkpoint: nothing outside of it, and nothing that is damaged or not its own."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from shards import write_all

from qlora_trainer.common.errors import FileMissingError, ModelError
from qlora_trainer.weights.model_directory import ModelDirectory


def test_an_index_may_not_name_files_outside(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_file({"secret": torch.ones(2)}, tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "..\\outside.safetensors"):
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"secret": name}}))
        with pytest.raises(ModelError, match="a file outside of itself"):
            _ = ModelDirectory.open(model).tensors
    (model / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"secret": "link.safetensors"}}))
    with pytest.raises(ModelError, match="leads outside"):
        _ = ModelDirectory.open(model).tensors


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"w": torch.ones(2)}, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert torch.equal(ModelDirectory.open(snapshot).tensors["w"].read(), torch.ones(2))


def make_sharded(directory: Path) -> Path:
    directory.mkdir()
    write_all(directory, {"a": torch.ones(4, 4), "b": torch.zeros(4, 4)}, max_shard_bytes=64)
    return directory


def test_incomplete_or_damaged_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    missing_file = make_sharded(tmp_path / "missing_file")
    (missing_file / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors, but the file is missing"):
        _ = ModelDirectory.open(missing_file).tensors

    missing_tensor = make_sharded(tmp_path / "missing_tensor")
    save_file({"c": torch.ones(1)}, missing_tensor / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelError, match="holds tensor b, but it does not"):
        _ = ModelDirectory.open(missing_tensor).tensors

    twice = make_sharded(tmp_path / "twice")
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, twice / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelError, match="tensor a is both in"):
        _ = ModelDirectory.open(twice).tensors

    for size in (0, 5, 60, -1):
        truncated = make_sharded(tmp_path / f"truncated{size}")
        shard = truncated / "model-00001-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:size])
        with pytest.raises(ModelError, match="damaged or cut short"):
            _ = ModelDirectory.open(truncated).tensors

    for text in ("{", "[]", "{}", '{"weight_map": {"a": 3}}'):
        bad_index = tmp_path / "bad_index"
        bad_index.mkdir(exist_ok=True)
        (bad_index / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ModelError, match=r"index\.json"):
            _ = ModelDirectory.open(bad_index).tensors


def test_directories_that_are_no_plain_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileMissingError, match="no model directory"):
        _ = ModelDirectory.open(tmp_path / "nowhere").tensors
    with pytest.raises(ModelError, match="no safetensors model"):
        _ = ModelDirectory.open(tmp_path).tensors
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, a pickle"):
        _ = ModelDirectory.open(tmp_path).tensors

    two_sets = make_sharded(tmp_path / "two_sets")
    save_file({"a": torch.ones(4, 4)}, two_sets / "model.safetensors")
    with pytest.raises(ModelError, match="one of them is stale"):
        _ = ModelDirectory.open(two_sets).tensors

    adapted = make_sharded(tmp_path / "adapted")
    (adapted / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        _ = ModelDirectory.open(adapted).tensors
