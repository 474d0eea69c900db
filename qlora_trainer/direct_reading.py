"""Whole tensors read from a checkpoint past the page cache, and hashed on their way.

A base of 15 GB is read once. Through the page cache that takes 15 GB of pages, each to be found, mapped and thrown out
again, and costs more processor time than quantising; it also drives everybody else's files from memory. Here a file is
read straight into memory of our own (O_DIRECT), a piece at a time, and each piece is hashed while it is in the
processor's cache. The memory goes back when nobody holds the tensor any longer, and the next tensor comes into it.

Where a system or file system has no such reading, the same code reads through the page cache.
"""

import hashlib
import io
import mmap
import os
import threading
import weakref
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from qlora_trainer.background import Background
from qlora_trainer.errors import ModelError
from qlora_trainer.hashing import bytes_sha256
from qlora_trainer.tensor_io import TensorInfo, changed, read_tensor, tensors_of_file, unreadable

ALIGNMENT = 4096  # of addresses and lengths, in files and memory: what any disk's blocks divide
PIECE_BYTES = 2**22  # read and hashed at a time
LARGEST_KEPT = 2**27  # memory for a tensor larger than this is not kept for the next one


class Read(NamedTuple):
    """A tensor as it was read."""

    tensor: Tensor  # on the host, in memory that is used again once nobody holds it or a view of it
    sha256: str  # of its bytes as they lie in a safetensors file


class DirectReader:
    """Reads tensors, a file at a time, as a context manager. Not to be shared between threads."""

    def __init__(self) -> None:
        self._file: _File | None = None
        self._memory = _Memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._file is not None:
            self._file.file.close()
            self._file = None

    def read(self, info: TensorInfo) -> Read:
        """The tensor, whole.

        Raises:
            ModelError: the file is damaged, or was changed since it was listed.
        """
        if info.offset is None or info.offset % info.dtype.itemsize or not info.nbytes:
            tensor = read_tensor(info)
            return Read(tensor, bytes_sha256(tensor))
        if self._file is None or self._file.path != info.file:
            self.__exit__()
            self._file = _File(info.file)
        self._file.check(info)
        lead = info.offset % ALIGNMENT  # bytes before the tensor that are read with it
        end = lead + info.nbytes
        memory = self._memory.take(_aligned(end))
        window = memory.numpy().data
        hashed = hashlib.sha256()
        with Background() as beside:  # the piece before is hashed while one is read
            for begin in range(0, end, PIECE_BYTES):
                wanted = min(begin + PIECE_BYTES, end)
                found = self._file.read_into(window[begin : _aligned(wanted)], info.offset - lead + begin)
                if begin + found < wanted:
                    raise ModelError(f"{info.file} is cut short: {info.name} is not all there. Fetch the file again.")
                beside.submit(hashed.update, window[max(begin, lead) : wanted])
        return Read(memory[lead:end].view(info.dtype).view(info.shape), hashed.hexdigest())


class _File:
    """An open file, and the tensors that it holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = {info.name: info for info in tensors_of_file(path)}
        self.is_direct = hasattr(os, "O_DIRECT")
        try:
            self.file = self._open()
        except OSError as error:
            raise unreadable(path, error) from error

    def _open(self) -> io.FileIO:
        if self.is_direct:
            try:
                return io.FileIO(self.path, opener=lambda path, flags: os.open(path, flags | os.O_DIRECT))
            except OSError:
                self.is_direct = False  # the file system has no such thing
        return io.FileIO(self.path)

    def check(self, info: TensorInfo) -> None:
        if self.tensors.get(info.name) != info:
            raise changed(self.path)

    def read_into(self, memory: memoryview, offset: int) -> int:
        """Fill `memory` from the file, as far as the file goes; address, length and offset aligned."""
        done = 0
        try:
            while done < len(memory) and (not self.is_direct or done % ALIGNMENT == 0):  # else it was the file's end
                if not (count := self._read(memory[done:], offset + done)):
                    break
                done += count
        except OSError as error:
            raise unreadable(self.path, error) from error
        return done

    def _read(self, memory: memoryview, offset: int) -> int:
        self.file.seek(offset)
        try:
            return self.file.readinto(memory)
        except OSError:
            if not self.is_direct:
                raise
        self.is_direct = False  # it opens such files, and does not read them
        self.file.close()
        self.file = self._open()
        return self._read(memory, offset)


class _Memory:
    """Anonymous memory, handed out as tensors, and taken back when the last view of one is gone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[mmap.mmap] = []

    def take(self, size: int) -> Tensor:  # (size,) uint8, aligned
        with self._lock:
            # All that are kept have one size: pages that no tensor reached take no memory.
            block = self._free.pop() if self._free and size <= LARGEST_KEPT else None
        if block is None:
            flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
            block = mmap.mmap(-1, max(size, LARGEST_KEPT), **flags)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                block.madvise(mmap.MADV_HUGEPAGE)
        array = np.frombuffer(block, np.uint8)
        weakref.finalize(array, self._give_back, block).atexit = False
        return torch.from_numpy(array)[:size]

    def _give_back(self, block: mmap.mmap) -> None:
        if len(block) == LARGEST_KEPT:
            with self._lock:
                self._free.append(block)


def _aligned(size: int) -> int:
    return -(size // -ALIGNMENT) * ALIGNMENT
