"""Promises of the writer of shards: streams that any loader reads, aligned, and whole or not there at all."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import BinaryIO, cast

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from shards import TENSORS, specs_of, write_all

from qlora_trainer.common.atomic import new_directory, write_text
from qlora_trainer.common.errors import DiskError
from qlora_trainer.weights import shard_writer
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.reading import row_blocks
from qlora_trainer.weights.shard_writer import ShardWriter


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


def test_an_incomplete_checkpoint_is_our_own_fault(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, specs_of(TENSORS))
    writer.write("flags", TENSORS["flags"])
    with pytest.raises(AssertionError, match="weight"):
        writer.close()
    with pytest.raises(AssertionError, match="half comes before weight"):
        writer.write("half", TENSORS["half"])


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
