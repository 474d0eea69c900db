"""A checkpoint's tensors one after another, on the device where they are wanted, the next one read beside the work.

On a CPU a tensor is the mapped file itself: no memory of its own, and gone when it is dropped. For a CUDA device a
thread reads the file through two small pinned buffers, whose copies run on a stream of their own. One tensor is read
ahead and no more, so the device never holds more than two that are not part of the model.
"""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_trainer.tensor_io import TensorInfo, read_tensor

STAGING_BYTES = 2**26  # of each of the two pinned buffers


class Arrival(NamedTuple):
    """A tensor of the checkpoint."""

    info: TensorInfo
    mapped: Tensor  # on the host, the file's own pages: read them, but do not write into them
    values: Tensor  # the same where it was asked for; `mapped` itself where that is the host


def stream_tensors(
    infos: Sequence[TensorInfo],
    device: torch.device,
    stays_on_host: Callable[[TensorInfo], bool],  # not copied to the device
    seen: Callable[[TensorInfo, Tensor], None],  # called in the reading thread with what was mapped
) -> Generator[Arrival, None, None]:
    """Yield the tensors in order; drop each before taking the next, where memory counts.

    Raises:
        ModelError: a file is damaged, or was changed since it was listed.
    """
    uploader = _Uploader(device) if device.type == "cuda" else None

    def read(info: TensorInfo) -> tuple[Tensor, Tensor, Any]:
        mapped = read_tensor(info)
        seen(info, mapped)
        if uploader is None or stays_on_host(info):
            return mapped, mapped, None
        return mapped, *uploader.upload(mapped)

    try:
        with ThreadPoolExecutor(1, thread_name_prefix="reader") as reader:
            ahead = reader.submit(read, infos[0]) if infos else None
            for index, info in enumerate(infos):
                assert ahead is not None
                mapped, values, copied = ahead.result()
                ahead = reader.submit(read, infos[index + 1]) if index + 1 < len(infos) else None
                if copied is not None:
                    torch.cuda.current_stream(device).wait_event(copied)
                yield Arrival(info, mapped, values)
                del mapped, values
    finally:
        if uploader is not None:
            uploader.stream.synchronize()  # where nobody took the last one, its copy may still run


class _Uploader:
    """Copies host tensors to a CUDA device through pinned memory, so that a copy runs while the next piece is read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.taker = torch.cuda.current_stream(device)  # of the thread that takes the tensors
        self.buffers = [torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.copied = [torch.cuda.Event() for _ in self.buffers]  # out of each buffer
        self.turn = 0

    def upload(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """The tensor on the device, and the event after which it is whole there."""
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
