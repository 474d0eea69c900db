"""Promises of model directories: streams that any loader reads, and nothing read that should not be."""

import dataclasses
import errno
import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO, cast

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from spying import noting
from torch import Tensor

from qlora_trainer.common.atomic import new_directory, write_text
from qlora_trainer.common.errors import DiskError, FileMissingError, ModelError
from qlora_trainer.weights import shard_writer
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.reading import read_rows, row_blocks, same_values
from qlora_trainer.weights.shard_writer import ShardWriter
from qlora_trainer.weights.tensors import TensorSpec

TENSORS = {
    "flags": torch.tensor([True, False, True]),  # three bytes, which would leave what follows unaligned
    "weight": torch.randn(700, 8, generator=torch.Generator().manual_seed(0)),
    "half": torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).half(),
    "brain": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2)).bfloat16(),
    "steps": torch.tensor(7),
    "empty": torch.zeros(0, 4),
    "ids": torch.arange(9),
}


def specs_of(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def write_all(directory: Path, tensors: dict[str, Tensor], max_shard_bytes: int = 10**9) -> None:
    with ShardWriter(directory, specs_of(tensors), max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            for rows in row_blocks(tuple(tensor.shape), block_elements=1, minimum_rows=100):
                writer.write(name, tensor if rows is None else tensor[rows])


@pytest.mark.parametrize("max_shard_bytes", [10**9, 300])
def test_safetensors_and_we_read_what_was_written_by_rows(tmp_path: Path, max_shard_bytes: int) -> None:
    write_all(tmp_path, TENSORS, max_shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (max_shard_bytes == 10**9)
    assert (tmp_path / "model.safetensors.index.json").exists() == (len(files) > 1)
    theirs = {name: tensor for file in files for name, tensor in load_file(file).items()}
    ours = {name: info.read() for name, info in ModelDirectory.open(tmp_path).tensors.items()}
    for found in (theirs, ours):
        assert found.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name
    with safe_open(files[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without


def test_every_tensor_lies_aligned_to_its_dtype(tmp_path: Path) -> None:
    write_all(tmp_path, TENSORS)
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    for name, tensor in TENSORS.items():
        assert header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0, name


def test_a_shard_holds_at_most_the_size_asked_for_or_one_tensor(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10, 10), float(i)) for i in range(7)} | {"large": torch.zeros(50, 50)}
    write_all(tmp_path, tensors, max_shard_bytes=1000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for file in set(index["weight_map"].values()):
        held = [tensors[name].nbytes for name, owner in index["weight_map"].items() if owner == file]
        assert sum(held) <= 1000 or len(held) == 1
    assert len(set(index["weight_map"].values())) == 5


def test_written_files_have_the_users_permissions(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        with new_directory(tmp_path / "out") as work:
            write_all(work, TENSORS, max_shard_bytes=300)
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    files = list((tmp_path / "out").iterdir())
    assert files
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o640}


def test_rows_are_read_as_slices_of_the_whole(tmp_path: Path) -> None:
    write_all(tmp_path, TENSORS)
    info = ModelDirectory.open(tmp_path).tensors["weight"]
    assert torch.equal(info.read(slice(256, 513)), TENSORS["weight"][256:513])
    assert torch.equal(torch.cat([info.read(rows) for rows in row_blocks(info.shape, 1)]), TENSORS["weight"])


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 511, 512, 1000, 12345])
def test_row_blocks_cover_all_rows_and_none_is_small(rows: int) -> None:
    blocks = row_blocks((rows, 3), block_elements=1)
    taken = [list(range(rows)[block]) for block in blocks if block is not None]
    assert [row for block in taken for row in block] == list(range(rows))
    assert all(len(block) >= 256 for block in taken) or len(blocks) == 1
    assert row_blocks(()) == [None]


def test_an_incomplete_checkpoint_is_our_own_fault(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, specs_of(TENSORS))
    writer.write("flags", TENSORS["flags"])
    with pytest.raises(AssertionError, match="weight"):
        writer.close()
    with pytest.raises(AssertionError, match="half comes before weight"):
        writer.write("half", TENSORS["half"])


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


def test_rows_from_anywhere_are_read_in_few_spans(tmp_path: Path) -> None:
    """Of what cannot be mapped; what can be is indexed."""
    write_all(tmp_path, TENSORS)
    info = ModelDirectory.open(tmp_path).tensors["weight"]
    spans: list[slice] = []
    source = SimpleNamespace(read=noting(lambda name, rows: TENSORS[name][rows], lambda name, rows: spans.append(rows)))
    unmapped = dataclasses.replace(info, source=source, offset=None)
    for wanted in ([0, 1, 2, 7, 9, 10, 699], [5], [698, 699]):
        rows = torch.tensor(wanted)
        assert torch.equal(read_rows(info, rows), TENSORS["weight"][rows])
        assert torch.equal(read_rows(unmapped, rows), TENSORS["weight"][rows])
    assert spans[:4] == [slice(0, 3), slice(7, 8), slice(9, 11), slice(699, 700)]
    assert len(spans) == 6


def test_same_values_are_found_by_rows_whatever_the_dtype(tmp_path: Path) -> None:
    values = torch.arange(600.0 * 4).reshape(600, 4)
    changed = values.clone()
    changed[599, 3] += 1
    write_all(tmp_path, {"a": values, "b": values.int(), "c": changed, "d": values.reshape(4, 600), "e": values[0, 0]})
    found = ModelDirectory.open(tmp_path).tensors
    assert [same_values(found["a"], found[name]) for name in "abcde"] == [True, True, False, False, False]
    assert same_values(found["e"], found["e"])


class _FullDisk:
    """A file that takes `module` bytes and then behaves as on a full disk."""

    def __init__(self, file, limit: int) -> None:
        self.file, self.limit = file, limit

    def write(self, data) -> None:
        self.limit -= len(data)
        if self.limit < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.file.write(data)

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def write_to_full_disk(path: Path, limit: int) -> None:
    with new_directory(path) as work, ShardWriter(work, specs_of(TENSORS)) as writer:
        writer.write("flags", TENSORS["flags"])
        writer._file = cast(BinaryIO, _FullDisk(writer._file, limit))
        for rows in row_blocks((700, 8), 1):
            writer.write("weight", TENSORS["weight"][rows])


def test_a_disk_that_fills_up_is_one_message_and_leaves_nothing(tmp_path: Path) -> None:
    for limit in (0, 4, 4000, 20000):
        with pytest.raises(DiskError, match=r"No space left.*Free some space"):
            write_to_full_disk(tmp_path / "out", limit)
        assert not any(tmp_path.iterdir())
    with pytest.raises(DiskError, match="permissions"):
        write_text(tmp_path / "nowhere" / "a.txt", "text")


def open_below(directory: Path) -> list[str]:
    return [file.path for file in psutil.Process().open_files() if Path(file.path).is_relative_to(directory)]


@pytest.mark.parametrize("flush", [1, 2, 3])
def test_no_shard_stays_open_where_one_cannot_be_flushed(
    flush: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes = iter(range(1, 100))

    def fail(descriptor: int) -> None:
        if next(flushes) == flush:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_writer.os, "fsync", fail)
    writer = ShardWriter(tmp_path, specs_of(TENSORS), max_shard_bytes=40)

    def write() -> None:
        with writer:
            for name, tensor in TENSORS.items():
                writer.write(name, tensor)
            assert open_below(tmp_path)

    with pytest.raises(DiskError, match="No space left") as caught:
        write()
    assert caught.tb is not None, "it keeps alive what failed"
    assert open_below(tmp_path) == []
