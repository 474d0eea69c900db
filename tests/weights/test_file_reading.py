"""Tensors read once: the same values and hashes, memory used again, the page cache left alone, faults reported."""

import ctypes
import hashlib
import io
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora_trainer.common.errors import ModelError
from qlora_trainer.weights import file_reading
from qlora_trainer.weights.file_reading import FileReader
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.tensors import TensorInfo

TENSORS = {
    "long": torch.arange(5000, dtype=torch.int64).reshape(50, 100),
    "half": torch.randn(33, 77).half(),
    "brain": torch.randn(4096, 3).bfloat16(),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "bytes": torch.arange(255, dtype=torch.uint8),
    "flags": torch.tensor([True, False, True]),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small tensor is read in several."""
    monkeypatch.setattr(file_reading, "PIECE_BYTES", 4096)


def saved(directory: Path, tensors: dict[str, Tensor] = TENSORS) -> Mapping[str, TensorInfo]:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    return ModelDirectory.open(directory).tensors


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"").hexdigest()


def assert_all_read(infos: Mapping[str, TensorInfo], expected: dict[str, Tensor] = TENSORS) -> FileReader:
    with FileReader() as reader:
        for name, tensor in expected.items():
            found = reader.read(infos[name])
            assert found.tensor.dtype == tensor.dtype
            assert torch.equal(found.tensor, tensor), name
            assert found.sha256 == sha256(tensor), name
    return reader


def test_tensors_come_with_their_values_and_hashes(tmp_path: Path) -> None:
    assert_all_read(saved(tmp_path / "model"))


def test_hashes_are_left_out_where_they_are_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_reading, "bytes_sha256", lambda tensor: pytest.fail("was hashed"))
    monkeypatch.setattr(file_reading.hashlib, "sha256", lambda: SimpleNamespace(update=pytest.fail))
    infos = saved(tmp_path / "model")
    with FileReader(hashes=False) as reader:
        for name, tensor in TENSORS.items():
            found = reader.read(infos[name])
            assert torch.equal(found.tensor, tensor), name
            assert found.sha256 is None


def test_shards_follow_each_other(tmp_path: Path) -> None:
    infos = {**saved(tmp_path / "one"), **{f"{n} too": info for n, info in saved(tmp_path / "two").items()}}
    with FileReader() as reader:
        for name in ("half", "half too", "long", "brain too"):
            info = infos[name]
            assert torch.equal(
                reader.read(ModelDirectory.open(info.file.parent).tensors[info.name]).tensor, TENSORS[info.name]
            )


def test_the_page_cache_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what the system reads ahead of the header: of a file that was written and dropped from memory."""
    monkeypatch.setattr(file_reading, "PIECE_BYTES", 2**22)
    info = saved(tmp_path / "model", {"large": torch.zeros(2**26, dtype=torch.uint8)})["large"]
    with info.file.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_bytes(info.file) > info.nbytes / 2:
        pytest.skip("this file system keeps files in memory")
    with FileReader() as reader:
        reader.read(info)
    assert cached_bytes(info.file) < info.nbytes / 2


def cached_bytes(path: Path) -> int:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        pages = np.zeros(-(len(mapped) // -mmap.PAGESIZE), np.uint8)
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        done = ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), pages.ctypes)
        assert done == 0
        return int((pages & 1).sum()) * mmap.PAGESIZE


def test_memory_is_used_again_once_nobody_holds_the_tensor(tmp_path: Path) -> None:
    infos = saved(tmp_path / "model")
    with FileReader() as reader:
        first = reader.read(infos["long"]).tensor
        begin = first.untyped_storage().data_ptr()
        row = first[3]
        del first
        second = reader.read(infos["brain"]).tensor
        assert second.untyped_storage().data_ptr() != begin  # a row of the first is still held
        assert torch.equal(row, TENSORS["long"][3])
        del row
        third = reader.read(infos["half"]).tensor
        assert third.untyped_storage().data_ptr() == begin
        assert torch.equal(second, TENSORS["brain"])


def test_a_very_large_tensors_memory_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_reading, "LARGEST_KEPT", 2**14)
    infos = saved(tmp_path / "model")
    with FileReader() as reader:
        reader.read(infos["long"])  # 40,000 bytes
        assert not reader._memory._free
        reader.read(infos["half"])
        assert [len(block) for block in reader._memory._free] == [2**14]


def test_a_disk_that_fails_ends_with_an_error_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.FileIO):
        def readinto(self, memory: Any) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(file_reading.io, "FileIO", Broken)
    with FileReader() as reader, pytest.raises(ModelError, match=r"model\.safetensors cannot be read .*Input/output"):
        reader.read(saved(tmp_path / "model")["long"])


def test_reads_that_come_in_parts_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(io.FileIO):
        def __init__(self, path: Any, **_: Any) -> None:
            super().__init__(path)

        def readinto(self, memory: Any) -> int:
            return super().readinto(memory[:4096])

    monkeypatch.setattr(file_reading, "PIECE_BYTES", 3 * 4096)
    monkeypatch.setattr(file_reading.io, "FileIO", Slow)
    assert_all_read(saved(tmp_path / "model"))


def test_a_file_cut_short_while_it_is_read_is_named(tmp_path: Path) -> None:
    infos = saved(tmp_path / "model")
    *_, last = sorted((infos[name] for name in ("long", "half", "brain")), key=lambda info: info.offset or 0)
    with FileReader() as reader:
        reader.read(infos["long"])
        with last.file.open("r+b") as file:
            file.truncate((last.offset or 0) + last.nbytes - 1)
        with pytest.raises(ModelError, match=rf"model\.safetensors is cut short: {last.name} is not all there"):
            reader.read(last)


def test_a_file_that_was_changed_since_it_was_listed_is_refused(tmp_path: Path) -> None:
    infos = saved(tmp_path / "model")
    saved(tmp_path / "model", TENSORS | {"long": torch.zeros(7, 7)})
    with FileReader() as reader, pytest.raises(ModelError, match="was changed while it was being read"):
        reader.read(infos["brain"])


def test_tensors_that_lie_at_odd_bytes_are_read(tmp_path: Path) -> None:
    """As other writers than safetensors' own may leave them."""
    values = torch.arange(3, dtype=torch.float32)
    header = json.dumps(
        {
            "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "values": {"dtype": "F32", "shape": [3], "data_offsets": [3, 15]},
        }
    ).encode()
    content = len(header).to_bytes(8, "little") + header + bytes([1, 2, 3]) + values.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(content)
    infos = ModelDirectory.open(tmp_path).tensors
    assert_all_read(infos, {"odd": torch.tensor([1, 2, 3], dtype=torch.uint8), "values": values})
