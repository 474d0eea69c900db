"""Keep a tensor in host memory between forward and backward, its copies overlapped with computing on CUDA.

On CUDA the host side is pinned and copies go on a stream of their own. Who uses it decides when to wait: `release`
waits for the copy out and gives the original's memory back, `prefetch` begins the copy in, `take` waits for it. So
memory is given back at points of the program and not when a copy happens to end, and a step takes the same memory each
time. On a CPU a copy is a plain copy at the same points, which is how this is tested and planned.

Whoever drops one with a copy under way, after an error, must let the device finish before memory is used again.

Left out: which tensors are moved, and when.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora_kernels.registry import define


class HostCopy:
    """Hold a tensor on its way to host memory, and back.

    Args:
        tensor: its copy to the host begins at once.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._device = tensor.device
        self._original: Tensor | None = tensor
        self._returning: Tensor | None = None
        self._host: Tensor = _on_copy_stream(tensor.device, lambda: torch.ops.qlora_kernels.copy_to_host(tensor))
        self._copied = _mark(tensor.device)

    def release(self) -> None:
        """Give the original's memory back: what comes next on the device waits for the copy."""
        _wait(self._device, self._copied)
        self._original = None

    def prefetch(self) -> None:
        """Begin the copy back to the device, where the tensor is not there already."""
        if self._original is not None or self._returning is not None:
            return
        returning = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._device)
        _on_copy_stream(self._device, lambda: returning.copy_(self._host, non_blocking=True))
        self._returning, self._copied = returning, _mark(self._device)

    def take(self) -> Tensor:
        """Return the tensor on its device, the caller's alone from then on; another call copies it once more.

        Returns:
            The tensor.
        """
        if self._original is not None:
            original = self._original
            self.release()  # not while it is still being copied, as the caller may write to it
            return original
        self.prefetch()
        _wait(self._device, self._copied)
        returned, self._returning = self._returning, None
        assert returned is not None
        return returned


def pinned_bytes(size: int) -> int:
    """Compute what torch takes of pinned host memory for so many bytes: a power of two.

    Args:
        size: bytes, at least 1.

    Returns:
        Bytes.
    """
    return 1 << (size - 1).bit_length()


def _on_copy_stream(device: torch.device, copy: Callable[[], Tensor]) -> Tensor:
    """Run a copy on the stream for copies, after all that the device was given so far."""
    if device.type != "cuda":
        return copy()
    stream = _copy_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        return copy()


def _mark(device: torch.device) -> Any:
    return _copy_stream(device).record_event() if device.type == "cuda" else None


def _wait(device: torch.device, mark: Any) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_event(mark)


@functools.cache
def _copy_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


def _copy_to_host(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


# An operation, so that a count of memory can distinguish host memory from the device's where both are a CPU's.
define("copy_to_host(Tensor x) -> Tensor", _copy_to_host, lambda x: torch.empty(x.shape, dtype=x.dtype, device="cpu"))
