"""Give the parts of the script the card; in a dry run the CPU, of which nothing is measured but time."""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch

from qlora_trainer.planning.memory_plan import CUDA_CONTEXT_BYTES

LAST_PREFETCH_LOCATION = 4  # cudaMemRangeAttributeLastPrefetchLocation


class Device:
    """Measure a device by name, cuda or cpu; memory is 0 bytes on the CPU."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_cuda = name == "cuda"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def reset_peak(self) -> None:
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()

    @property
    def peak_reserved(self) -> int:
        return torch.cuda.max_memory_reserved() if self.is_cuda else 0

    @property
    def peak_allocated(self) -> int:
        return torch.cuda.max_memory_allocated() if self.is_cuda else 0

    @property
    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.is_cuda else 0

    @property
    def used(self) -> int:
        """Return the bytes used by all programs, and by CUDA itself."""
        free, total = torch.cuda.mem_get_info() if self.is_cuda else (0, 0)
        return total - free

    @property
    def total(self) -> int:
        return torch.cuda.mem_get_info()[1] if self.is_cuda else 0

    @contextlib.contextmanager
    def limited_to(self, gigabytes: int | None) -> Iterator[None]:
        """Let torch take in the block what a card of that size leaves it after the plan's share for CUDA itself."""
        if not self.is_cuda or gigabytes is None:
            yield
            return
        share = (gigabytes * 10**9 - CUDA_CONTEXT_BYTES) / self.total
        torch.cuda.set_per_process_memory_fraction(share)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def works(self) -> bool:
        """Return True if CUDA still computes: after some errors nothing does in the process that met them."""
        if not self.is_cuda:
            return True
        try:
            torch.cuda.synchronize()
            return float(torch.ones(4, device="cuda").sum()) == 4.0
        except RuntimeError:
            return False


def cuda_runtime() -> ctypes.CDLL:
    """Open the CUDA runtime that torch has loaded."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if "libcudart.so" in path:
            return ctypes.CDLL(path)
    return ctypes.CDLL(f"libcudart.so.{str(torch.version.cuda).split('.')[0]}")


def last_prefetched_to(tensor: torch.Tensor) -> int:
    """Return the device that managed memory was last prefetched to; negative: the host, or none."""
    found = ctypes.c_int(-99)
    where = ctypes.c_void_p(tensor.data_ptr())
    cuda_runtime().cudaMemRangeGetAttribute(
        ctypes.byref(found), ctypes.c_size_t(4), LAST_PREFETCH_LOCATION, where, ctypes.c_size_t(tensor.nbytes)
    )
    return found.value
