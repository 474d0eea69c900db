"""Count what is alive at each moment of a computation, in bytes.

`LiveBytes` watches every operation and follows the storages that they make until they are freed, on real tensors and
fake ones alike, so the same step can be counted with and without its memory. It writes a trace of allocations and
frees, which `CachingAllocator` plays (allocator.py).

Left out: memory inside a fused operation, which is seen from outside only (`workspaces` adds it by formula), and what
does not come from torch's allocator, such as the CUDA context.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from qlora_kernels.torch_internals import FakeTensor, OpOverload, TorchDispatchMode, leaves, storage_address
from qlora_trainer.planning.allocator import Event

Workspace = Callable[[tuple[Any, ...]], int]  # an operation's arguments -> bytes it uses inside and frees


@dataclass(frozen=True)
class Peak:
    """Hold the fullest moment: bytes alive, by kind, and the operation that reached it."""

    bytes: int = 0
    by_kind: Mapping[str, int] = field(default_factory=dict)
    operation: str = ""


class LiveBytes(TorchDispatchMode):
    """Count the bytes of live storages in the block.

    With fake tensors: `with FakeTensorMode(), LiveBytes() as live:`. Tensors that exist already are counted once they
    are handed to `watch`. What is of the kind `host` is counted separately, outside peak and trace.

    Args:
        kinds: of what an operation makes, by operation; others make what is of the kind `other`.
        workspaces: by operation, what it uses inside.
        other: name of a kind.
        inside: kind of what operations use inside.
        host: kind of what is in host memory.
        host_rounding: what the host's allocator makes of a size.
    """

    def __init__(
        self,
        kinds: Mapping[OpOverload, str] | None = None,
        workspaces: Mapping[OpOverload, Workspace] | None = None,
        *,
        other: str = "other",
        inside: str = "inside an operation",
        host: str = "host memory",
        host_rounding: Callable[[int], int] = lambda size: size,
    ) -> None:
        super().__init__()
        self.other = other
        self.inside = inside
        self.host = host
        self._host_rounding = host_rounding
        self.bytes = 0
        self.host_bytes = self.host_peak = 0
        self.peak = Peak()
        self.trace: list[Event] = []
        self.began = 0  # where in the trace the peak's counting began
        self._kinds = kinds or {}
        self._workspaces = workspaces or {}
        self._by_kind: Counter[str] = Counter()
        # Storage address -> its number, bytes and kind, and the reference that reports when it is freed.
        self._blocks: dict[int, tuple[int, int, str, weakref.ref[UntypedStorage]]] = {}
        self._count = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # a fake tensor is asked for it at every turn, and asks all modes
        out = func(*args, **(kwargs or {}))
        kind = self._kinds.get(func, self.other)
        for tensor in leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                size = storage.nbytes() if kind != self.host else self._host_rounding(storage.nbytes())
                self._see(storage, size, kind, func)
        if (workspace := self._workspaces.get(func)) is not None and (size := workspace(args)):
            self._use_and_free(size, func)
        return out

    def watch(self, tensors: Iterable[Tensor], kind: str) -> list[int]:
        """Count tensors that exist already.

        Args:
            tensors: to follow until they are freed.
            kind: of all of them.

        Returns:
            Numbers of the blocks that were not yet known.
        """
        first = self._count + 1
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._see(storage, storage.nbytes(), kind, "before the step")
        return list(range(first, self._count + 1))

    def restart_peak(self) -> None:
        """Forget the peak so far: the next one counts from what is alive now."""
        self.peak = Peak()
        self.began = len(self.trace)
        self.host_peak = self.host_bytes
        self._note_peak("between steps")

    def _see(self, storage: UntypedStorage, size: int, kind: str, operation: object) -> None:
        address = storage_address(storage)
        if size == 0 or address in self._blocks:
            return
        self._count += 1
        reference = weakref.ref(storage, lambda _: self._freed(address))
        self._blocks[address] = (self._count, size, kind, reference)
        if kind == self.host:
            self.host_bytes += size
            self.host_peak = max(self.host_peak, self.host_bytes)
            return
        self.trace.append(Event(self._count, size))
        self.bytes += size
        self._by_kind[kind] += size
        self._note_peak(operation)

    def _freed(self, address: int) -> None:
        block, size, kind, _ = self._blocks.pop(address)
        if kind == self.host:
            self.host_bytes -= size
            return
        self.trace.append(Event(block, -size))
        self.bytes -= size
        self._by_kind[kind] -= size

    def _use_and_free(self, size: int, operation: object) -> None:
        self._count += 1
        self.trace += [Event(self._count, size), Event(self._count, -size)]
        self.bytes += size
        self._by_kind[self.inside] += size
        self._note_peak(operation)
        self.bytes -= size
        self._by_kind[self.inside] -= size

    def _note_peak(self, operation: object) -> None:
        if self.bytes > self.peak.bytes:
            self.peak = Peak(self.bytes, {k: v for k, v in self._by_kind.items() if v}, str(operation))


def once_more(trace: Sequence[Event], start: int) -> list[Event]:
    """Repeat what happened from `start` on, as if after the trace; what outlived it is not made twice.

    Args:
        trace: of LiveBytes.
        start: index of an event.

    Returns:
        The repetition alone.
    """
    later = trace[start:]
    freed = {event.block for event in later if event.bytes < 0}
    passing = freed & {event.block for event in later if event.bytes > 0}
    shift = max((event.block for event in trace), default=0)
    return [Event(event.block + shift, event.bytes) for event in later if event.block in passing]
