"""Read whole tensors of a checkpoint once, and hash them meanwhile.

A base of 15 GB is read once. Mapped, it takes 15 GB of pages, each of which the system finds, maps and drops again,
which costs more processor time than quantizing; it also drives other programs' files from memory. Here a file is read
into memory of our own, a piece at a time, each piece is hashed while it is in the processor's cache, and the system is
asked to drop its own copy. The memory is free again when nothing refers to the tensor any longer, and the next tensor
is read into it. docs/decisions/0030 compares this with other ways, O_DIRECT among them.
"""

import collections
import contextlib
import hashlib
import io
import os
import weakref
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from qlora_trainer.common.background import Background
from qlora_trainer.common.errors import ModelError
from qlora_trainer.common.hashing import bytes_sha256
from qlora_trainer.weights.tensors import TensorInfo, TensorSource, changed

PIECE_BYTES = 2**22  # read and hashed at a time; a smaller tensor is mapped, and takes none of this module's memory
LARGEST_KEPT = 2**27  # memory for a tensor larger than this is not kept for the next one


class Read(NamedTuple):
    """Hold a tensor as it was read."""

    tensor: Tensor  # on the host, in memory that is used again once nobody holds it or a view of it
    sha256: str | None  # of its bytes as they lie in a safetensors file; None where it was not asked for


class FileReader:
    """Read tensors, a file at a time, as a context manager. Not to be shared between threads.

    Args:
        hashes: take the sha256 of each tensor.
    """

    def __init__(self, hashes: bool = True) -> None:
        self._hashes = hashes
        self._source: TensorSource | None = None
        self._file: io.FileIO | None = None
        self._memory = _Memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Close the file that is open."""
        if self._file is not None:
            self._file.close()
            self._file = self._source = None

    def read(self, info: TensorInfo) -> Read:
        """Read a whole tensor.

        A file that is damaged, or was changed since it was listed, raises ModelError.

        Args:
            info: of the tensor.

        Returns:
            The tensor, and its hash where the reader hashes.
        """
        if info.offset is None or info.nbytes < PIECE_BYTES:
            tensor = info.read()
            return Read(tensor, bytes_sha256(tensor) if self._hashes else None)
        file = self._open(info.source)
        memory = self._memory.take(info.nbytes)
        window = memory.numpy().data
        hashed = hashlib.sha256()
        with Background() as hashing:  # the piece before is hashed while one is read
            for begin in range(0, info.nbytes, PIECE_BYTES):
                piece = window[begin : begin + PIECE_BYTES]
                _read_into(file, piece, info.offset + begin, info)
                if self._hashes:
                    hashing.submit(hashed.update, piece)
        tensor = memory.view(info.dtype).view(info.shape)
        return Read(tensor, hashed.hexdigest() if self._hashes else None)

    def _open(self, source: TensorSource) -> io.FileIO:
        if self._file is None or self._source is not source:
            self.__exit__()
            try:
                self._file, self._source = io.FileIO(source.path), source
            except OSError as error:
                raise _unreadable(source, error) from error
            if not source.identity.is_current():
                raise changed(source.path)
        return self._file


def _read_into(file: io.FileIO, piece: memoryview, offset: int, info: TensorInfo) -> None:
    """Fill `piece` from the file, and let the system drop what it keeps of it."""
    done = 0
    try:
        file.seek(offset)
        while done < len(piece):
            count = file.readinto(piece[done:])
            if not count:
                raise ModelError(f"{info.file} is cut short: {info.name} is not all there. Fetch the file again.")
            done += count
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), offset, len(piece), os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise _unreadable(info.source, error) from error


def _unreadable(source: TensorSource, error: OSError) -> ModelError:
    return ModelError(f"{source.path} cannot be read ({error}). Fetch the file again.")


class _Memory:
    """Give out memory as tensors, and take it back when the last view of one is gone."""

    def __init__(self) -> None:
        self._free: collections.deque[np.ndarray] = collections.deque()  # no lock: it could wait for its own finalizer

    def take(self, size: int) -> Tensor:  # (size,) uint8
        block = None
        if size <= LARGEST_KEPT:  # all that are kept have this size: pages that no tensor reached take no memory
            with contextlib.suppress(IndexError):
                block = self._free.pop()
        if block is None:
            block = np.empty(max(size, LARGEST_KEPT), np.uint8)
        array = np.frombuffer(block, np.uint8)
        weakref.finalize(array, self._give_back, block).atexit = False
        return torch.from_numpy(array)[:size]

    def _give_back(self, block: np.ndarray) -> None:
        if len(block) == LARGEST_KEPT:
            self._free.append(block)
