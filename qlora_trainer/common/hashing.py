"""Hash tensors by sha256, in threads that run while tensors are made or read.

hashlib lets other threads run, so what is made of a checkpoint is hashed while the next of it is quantized, in the same
pass over its files (weights/file_reading.py hashes what lies in them). Few tensors wait at a time, as each is held
until then.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import BoundedSemaphore
from types import TracebackType
from typing import Self, TypeVar

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 2**22  # converted at a time
_MOST_WORKERS = 4

_Result = TypeVar("_Result")


def bytes_sha256(tensor: Tensor) -> str:
    """Hash a tensor's bytes as they lie in memory and in a safetensors file.

    Args:
        tensor: of any shape, on any device.

    Returns:
        The sha256 in hexadecimal.
    """
    return _sha256([_bytes(tensor)])


def values_sha256(
    tensor: Tensor,
    dtype: torch.dtype | None = None,  # convert to this one first; None: the tensor's own
) -> str:
    """Hash a tensor's shape, dtype and values.

    Args:
        tensor: of any shape, on any device.
        dtype: that is hashed, with the values in it.

    Returns:
        The sha256 in hexadecimal.
    """
    return blocks_sha256(tuple(tensor.shape), [tensor], dtype or tensor.dtype)


def blocks_sha256(
    shape: tuple[int, ...],
    blocks: Iterable[Tensor],  # a tensor's rows, one block after the other
    dtype: torch.dtype,
) -> str:
    """Compute the `values_sha256` of a tensor that is not in memory as a whole.

    Args:
        shape: of the whole tensor.
        blocks: on any device.
        dtype: that the values are converted to.

    Returns:
        The sha256 in hexadecimal.
    """

    def parts() -> Iterator[bytes | memoryview]:
        yield f"{shape} {dtype}".encode()
        for block in blocks:
            flat = block.detach().reshape(-1)
            for start in range(0, flat.numel(), _BLOCK_ELEMENTS):
                yield _bytes(flat[start : start + _BLOCK_ELEMENTS].to(dtype))

    return _sha256(parts())


class Hasher:
    """Hash in threads of its own, as a context manager; `submit` waits where too many tensors wait already."""

    def __init__(self) -> None:
        workers = min(os.cpu_count() or 1, _MOST_WORKERS)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="sha256")
        self._space = BoundedSemaphore(workers + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, function: Callable[..., _Result], *arguments: object) -> Future[_Result]:
        """Run a function in one of the threads.

        Args:
            function: such as `bytes_sha256`.
            *arguments: passed to it.

        Returns:
            The future of its result.
        """
        self._space.acquire()
        future = self._pool.submit(function, *arguments)
        future.add_done_callback(lambda _: self._space.release())
        return future


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _sha256(parts: Iterable[bytes | memoryview]) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()
