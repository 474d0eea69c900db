"""Yield a checkpoint's tensors one after another, on the device where they are wanted, reading the next one meanwhile.

A thread reads the files (file_reading.py); for a CUDA device it also copies through two small pinned buffers, on a
stream of their own. One tensor is read ahead and no more: where each is dropped before the next is taken, neither host
nor device holds more than two. What shall stay in its file is mapped instead, and takes no memory of its own.
"""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_trainer.weights.file_reading import FileReader
from qlora_trainer.weights.tensors import TensorInfo

STAGING_BYTES = 2**26  # of each of the two pinned buffers


class Arrival(NamedTuple):
    """Hold a tensor of the checkpoint that has been read."""

    info: TensorInfo
    sha256: str | None  # of its bytes as a safetensors file holds them; None where it was not asked for
    host: Tensor  # do not write into it: it may be the file's own pages, or memory that is used again
    values: Tensor  # the same where it was asked for; `host` itself where that is the host


def stream_tensors(
    infos: Sequence[TensorInfo],
    device: torch.device,
    *,
    stays_on_host: Callable[[TensorInfo], bool],  # not copied to the device
    stays_in_file: Callable[[TensorInfo], bool] = lambda info: False,  # mapped, and not hashed
    hashes: bool = True,
) -> Generator[Arrival, None, None]:
    """Yield the tensors in order; drop each before taking the next, where memory counts.

    A file that is damaged, or was changed since it was listed, raises ModelError.

    Args:
        infos: of the tensors.
        device: that the values are copied to.
        stays_on_host: True for a tensor that stays in host memory.
        stays_in_file: True for a tensor that stays in its file.
        hashes: take the sha256 of each tensor that is not mapped.

    Yields:
        Each tensor; on a CUDA device it is complete for the current stream.
    """
    uploader = _Uploader(device) if device.type == "cuda" else None

    def read(info: TensorInfo) -> tuple[Arrival, Any]:
        host, sha256 = (info.read(), None) if stays_in_file(info) else files.read(info)
        if uploader is None or stays_on_host(info):
            return Arrival(info, sha256, host, host), None
        values, copied = uploader.upload(host)
        return Arrival(info, sha256, host, values), copied

    try:
        with FileReader(hashes) as files, ThreadPoolExecutor(1, thread_name_prefix="reader") as reader:
            ahead = reader.submit(read, infos[0]) if infos else None
            for index in range(len(infos)):
                assert ahead is not None
                arrival, copied = ahead.result()
                ahead = reader.submit(read, infos[index + 1]) if index + 1 < len(infos) else None
                if copied is not None:
                    torch.cuda.current_stream(device).wait_event(copied)
                yield arrival
                del arrival
    finally:
        if uploader is not None:
            uploader.stream.synchronize()  # where nobody took the last one, its copy may still run


class _Uploader:
    """Copy host tensors to a CUDA device through pinned memory, so that a copy runs while the next piece is read.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.taker = torch.cuda.current_stream(device)  # of the thread that takes the tensors
        self.buffers = [torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.copied = [torch.cuda.Event() for _ in self.buffers]  # out of each buffer
        self.turn = 0

    def upload(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """Copy a tensor to the device.

        Args:
            tensor: on the host.

        Returns:
            The tensor on the device, and the event after which it is complete there.
        """
        source = tensor.contiguous().reshape(-1).view(torch.uint8)
        with torch.cuda.device(self.device), torch.cuda.stream(self.taker):
            # Of the memory of the stream that takes and drops it, so the next use of that memory comes after.
            values = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        self.stream.wait_stream(self.taker)  # which may still compute with what lay there before
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            target = values.reshape(-1).view(torch.uint8)
            for piece, place in zip(source.split(STAGING_BYTES), target.split(STAGING_BYTES), strict=True):
                buffer, copied = self.buffers[self.turn][: piece.numel()], self.copied[self.turn]
                copied.synchronize()
                buffer.copy_(piece)
                place.copy_(buffer, non_blocking=True)
                copied.record(self.stream)
                self.turn = (self.turn + 1) % len(self.buffers)
            whole = torch.cuda.Event()
            whole.record(self.stream)
        return values, whole
