"""Whole tensors read from a checkpoint past the page cache, and hashed on their way.

A base of 15 GB is read once. Through the page cache that takes 15 GB of pages, each to be found, mapped and thrown out
again, and costs more processor time than quantizing; it also drives everybody else's files from memory. Here a file is
read straight into memory of our own (O_DIRECT), a piece at a time, and each piece is hashed while it is in the
processor's cache. The memory goes back when nobody holds the tensor any longer, and the next tensor comes into it.

Where a system or file system has no such reading, the same code reads through the page cache.
"""

import collections
import contextlib
import hashlib
import io
import mmap
import os
import weakref
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from qlora_trainer.common.background import Background
from qlora_trainer.common.errors import ModelError
from qlora_trainer.common.hashing import bytes_sha256
from qlora_trainer.weights.reading import changed, read_tensor, unreadable
from qlora_trainer.weights.tensors import TensorInfo, tensors_of_file

_ALIGNMENT = 4096  # of addresses and lengths, in files and memory: what any disk's blocks divide
PIECE_BYTES = 2**22  # read and hashed at a time; a smaller tensor is mapped, and takes none of this module's memory
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
        if info.offset is None or info.offset % info.dtype.itemsize or info.nbytes < PIECE_BYTES:
            tensor = read_tensor(info)
            return Read(tensor, bytes_sha256(tensor))
        if self._file is None or self._file.path != info.file:
            self.__exit__()
            self._file = _File(info.file)
        self._file.check(info)
        lead = info.offset % _ALIGNMENT  # bytes before the tensor that are read with it
        end = lead + info.nbytes
        memory = self._memory.take(_aligned(end))
        window = memory.numpy().data
        hashed = hashlib.sha256()
        with Background() as hashing:  # the piece before is hashed while one is read
            for begin in range(0, end, PIECE_BYTES):
                wanted = min(begin + PIECE_BYTES, end)
                found = self._file.read_into(window[begin : _aligned(wanted)], info.offset - lead + begin)
                if begin + found < wanted:
                    raise ModelError(f"{info.file} is cut short: {info.name} is not all there. Fetch the file again.")
                hashing.submit(hashed.update, window[max(begin, lead) : wanted])
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
        self.size = os.fstat(self.file.fileno()).st_size

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
            while done < len(memory) and (count := self._read(memory[done:], offset + done)):
                done += count
                if self.is_direct and done % _ALIGNMENT:
                    if offset + done >= self.size:
                        break
                    self._read_through_the_cache()  # it gave less than a block, and cannot go on from there
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
        self._read_through_the_cache()  # it opens such files, and does not read them
        return self._read(memory, offset)

    def _read_through_the_cache(self) -> None:
        self.is_direct = False
        self.file.close()
        self.file = self._open()


class _Memory:
    """Anonymous memory, handed out as tensors, and taken back when the last view of one is gone."""

    def __init__(self) -> None:
        self._free: collections.deque[mmap.mmap] = collections.deque()  # a lock could wait for its own finalizer

    def take(self, size: int) -> Tensor:  # (size,) uint8, aligned
        block = None
        if size <= LARGEST_KEPT:  # all that are kept have this size: pages that no tensor reached take no memory
            with contextlib.suppress(IndexError):
                block = self._free.pop()
        block = block or _new_block(max(size, LARGEST_KEPT))
        array = np.frombuffer(block, np.uint8)
        weakref.finalize(array, self._give_back, block).atexit = False
        return torch.from_numpy(array)[:size]

    def _give_back(self, block: mmap.mmap) -> None:
        if len(block) == LARGEST_KEPT:
            self._free.append(block)


def _new_block(size: int) -> mmap.mmap:
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        block = mmap.mmap(-1, size, **flags)
    except OSError as error:
        raise MemoryError(f"the system gives no {size / 2**20:.0f} MiB to read into ({error.strerror})") from error
    # Fewer page faults; and no copy in a process forked meanwhile, which direct reading must not meet (man 2 open).
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        with contextlib.suppress(OSError, AttributeError):  # not every kernel knows them
            block.madvise(getattr(mmap, advice))
    return block


def _aligned(size: int) -> int:
    return -(size // -_ALIGNMENT) * _ALIGNMENT
