"""Write a checkpoint as a stream: header first, then tensor after tensor, large ones by rows.

A safetensors file opens with a header of names, dtypes, shapes and offsets, which follow from the shapes alone. So
every shard is laid out before the first value is known, and no whole tensor is held here.

One thread writes while the next rows are computed, and another flushes to the disk: a few blocks wait at most, and a
few hundred megabytes are written and not yet flushed, however large the shards. Where the disk is slower than the
arithmetic, the arithmetic waits. Flushed pages are dropped from the page cache, so that a large checkpoint does not
push its own source out of memory, and reading it back reads the disk.

The format (safetensors' README): 8 bytes of little-endian header length, the header in JSON padded to 8 bytes, the
tensors' bytes.
"""

import json
import os
import zlib
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from torch import Tensor

from qlora_trainer.common.atomic import disk_errors, write_text
from qlora_trainer.common.background import Background
from qlora_trainer.weights.listing import INDEX_NAME, WEIGHTS_NAME
from qlora_trainer.weights.reading import tensor_bytes
from qlora_trainer.weights.tensors import DTYPE_NAMES, TensorSpec

DEFAULT_SHARD_BYTES = 5 * 10**9
FLUSHED_BYTES = 2**28  # written between two flushes


class ShardWriter:
    """Write tensors whose names, dtypes and shapes are known beforehand; the values follow by rows, in order.

    A single shard is called model.safetensors; several are numbered, and `close` writes their index. In each file wider
    dtypes come first, so that every tensor is aligned. Use it as a context manager; leaving it by an exception writes
    no index. A disk that is full or cannot be written is reported by a DiskError, which may come some calls later.

    Args:
        directory: to write into; it must exist, without these shards.
        specs: the tensors, in the order in which they will be written.
        max_shard_bytes: bytes of tensors in a shard; a larger tensor gets a shard of its own.
    """

    def __init__(
        self, directory: Path, specs: Sequence[TensorSpec], max_shard_bytes: int = DEFAULT_SHARD_BYTES
    ) -> None:
        self.directory = directory
        self.shards = _split_into_shards(specs, max_shard_bytes)
        self.file_names = _shard_names(len(self.shards))
        self.checksums: dict[str, int] = {}  # CRC-32 of each tensor's bytes, complete after `close`
        self._shard = 0
        self._file: BinaryIO | None = None
        self._offsets: dict[str, int] = {}  # where each tensor of the open shard begins in the file
        self._pending: list[TensorSpec] = []  # of the open shard, the one being written first
        self._written = 0  # bytes of the tensor being written
        self._unflushed = 0  # bytes written to the open shard since the last flush
        self._files = ExitStack()  # every opened file; closing one twice does nothing
        self._threads = ExitStack()
        self._flusher = self._threads.enter_context(Background(most_waiting=1))
        self._writer = self._threads.enter_context(Background())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
            else:
                self._threads.__exit__(kind, error, trace)
        finally:
            with suppress(OSError):  # closing flushes; a full disk has been reported already
                self._files.close()

    def write(
        self,
        name: str,
        rows: Tensor,  # (N, ...) the next rows of the tensor, or all of it
    ) -> None:
        """Append rows to a tensor. Tensors come in the order of the specs, each complete before the next.

        Args:
            name: of the tensor.
            rows: must not be changed afterward, as a thread writes them.
        """
        with disk_errors(self.directory):
            if not self._pending:
                self._open_shard()
            spec = self._pending[0]
            assert name == spec.name, f"{name} comes before {spec.name}"
            assert rows.dtype == spec.dtype, f"{name} is {rows.dtype}, announced as {spec.dtype}"
            assert rows.shape[1:] == spec.shape[1:], f"{name} has rows {rows.shape[1:]}, announced {spec.shape}"
            assert self._written + rows.nbytes <= spec.nbytes, f"{name} has more rows than announced"
            self._writer.submit(self._append, self._file, name, self._offsets[name] + self._written, rows)
            self._written += rows.nbytes
            if self._written == spec.nbytes:
                self._pending.pop(0)
                self._written = 0
            if not self._pending:
                self._writer.submit(self._end_shard, self._file)
                self._shard += 1

    def close(self) -> None:
        """Wait until all is on the disk, check that every tensor is complete, and write the index of several shards."""
        with disk_errors(self.directory):
            self._threads.close()
        assert self._shard == len(self.shards), f"not written: {[spec.name for spec in self._pending][:3]}"
        if len(self.shards) == 1:
            return
        index = {
            "metadata": {"total_size": sum(spec.nbytes for shard in self.shards for spec in shard)},
            "weight_map": {
                spec.name: file_name
                for shard, file_name in zip(self.shards, self.file_names, strict=True)
                for spec in shard
            },
        }
        write_text(self.directory / INDEX_NAME, json.dumps(index, indent=2) + "\n")

    def _open_shard(self) -> None:
        """Open the next shard and write its header."""
        assert self._shard < len(self.shards), "every announced tensor has been written"
        specs = self.shards[self._shard]
        header, self._offsets = _header(specs)
        self._file = self._files.enter_context((self.directory / self.file_names[self._shard]).open("xb"))
        self._file.write(header)
        self._pending = list(specs)

    # The methods below run in the threads.

    def _append(self, file: BinaryIO, name: str, offset: int, rows: Tensor) -> None:
        """Write rows at their offset, and flush from time to time."""
        data = tensor_bytes(rows)
        self.checksums[name] = zlib.crc32(data, self.checksums.get(name, 0))
        file.seek(offset)
        file.write(data)
        self._unflushed += rows.nbytes
        if self._unflushed >= FLUSHED_BYTES:
            self._flusher.submit(os.fsync, file.fileno())
            self._unflushed = 0

    def _end_shard(self, file: BinaryIO) -> None:
        """Hand the complete file to the thread that flushes."""
        file.flush()
        self._unflushed = 0
        self._flusher.submit(_flush_and_close, file)


def _flush_and_close(file: BinaryIO) -> None:
    """Flush a file to the disk, drop its pages from the page cache, and close it."""
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    file.close()


def _split_into_shards(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Fill shards with tensors in order, each up to `max_shard_bytes`."""
    assert specs, "a checkpoint of no tensors"
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def _shard_names(count: int) -> list[str]:
    """Name the files of a checkpoint as transformers does."""
    if count == 1:
        return [WEIGHTS_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _header(specs: Sequence[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """Make the bytes before the first tensor, and the offset in the file at which each tensor begins."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts = {}
    end = 0
    for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
        starts[spec.name] = end
        end += spec.nbytes
        entries[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [starts[spec.name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}
