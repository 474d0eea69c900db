"""Counting bytes: what is alive at each moment of a computation, and what CUDA's allocator would reserve for it.

`LiveBytes` watches every operation and follows the storages that they make until they are freed, on real tensors and
fake ones alike, so the same step can be counted with and without its memory. It writes a trace of allocations and
frees. `CachingAllocator` plays such a trace by the rules of torch's CUDA allocator, which rounds, splits and keeps
blocks, and so reserves more than is alive.

Left out: memory inside a fused operation, which is seen from outside only (`workspaces` adds it by formula), and what
does not come from torch's allocator, such as the CUDA context.
"""

import bisect
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20
Workspace = Callable[[tuple[Any, ...]], int]  # an operation's arguments -> bytes it uses inside and frees


@dataclass(frozen=True)
class Event:
    """A block was allocated, or freed where `bytes` is negative; `block` is its number."""

    block: int
    bytes: int


@dataclass(frozen=True)
class Peak:
    """The fullest moment: bytes alive, by kind, and the operation that reached it."""

    bytes: int = 0
    by_kind: Mapping[str, int] = field(default_factory=dict)
    operation: str = ""


class LiveBytes(TorchDispatchMode):
    """Within, counts the bytes of live storages. Around fake tensors: `with FakeTensorMode(), LiveBytes() as live:`.

    What an operation makes is of the kind that `kinds` gives for it, else of `other`; what `workspaces` says that it
    uses inside is of the kind `inside`. Tensors that exist already are counted once they are handed to `watch`. What is
    of the kind `host` is counted apart, and is in no peak and no trace; what an operation makes there is rounded by
    `host_rounding`.
    """

    def __init__(
        self,
        kinds: Mapping[torch._ops.OpOverload, str] | None = None,
        workspaces: Mapping[torch._ops.OpOverload, Workspace] | None = None,
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
        # Storage address -> its number, bytes and kind, and the reference that tells when it is freed.
        self._blocks: dict[int, tuple[int, int, str, weakref.ref[UntypedStorage]]] = {}
        self._count = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # a fake tensor is asked for it at every turn, and asks all modes
        out = func(*args, **(kwargs or {}))
        kind = self._kinds.get(func, self.other)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                size = storage.nbytes() if kind != self.host else self._host_rounding(storage.nbytes())
                self._see(storage, size, kind, func)
        if (workspace := self._workspaces.get(func)) is not None and (size := workspace(args)):
            self._use_and_free(size, func)
        return out

    def watch(self, tensors: Iterable[Tensor], kind: str) -> list[int]:
        """Count tensors that exist already; returns the numbers of the blocks that were not yet known."""
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
        address = storage._cdata
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
    """What happened from `start` on, as if it happened again after the trace; what outlived it is not made twice."""
    later = trace[start:]
    freed = {event.block for event in later if event.bytes < 0}
    made = {event.block for event in later if event.bytes > 0}
    shift = max((event.block for event in trace), default=0)
    return [Event(event.block + shift, event.bytes) for event in later if event.block in freed & made]


@dataclass(eq=False)
class _Block:
    """A piece of a segment; neighbours of one segment are linked, so that free ones can be joined."""

    segment: int
    offset: int
    size: int
    is_small: bool
    is_free: bool = True
    before: "_Block | None" = None
    after: "_Block | None" = None

    @property
    def key(self) -> tuple[int, int, int]:
        return self.size, self.segment, self.offset


class CachingAllocator:
    """torch's CUDA allocator with its default settings, on one stream (c10/cuda/CUDACachingAllocator.cpp).

    Sizes are rounded to 512 bytes. Requests of up to 1 MiB come from segments of 2 MiB, larger ones from segments of
    20 MiB, and from 10 MiB on from a segment of their own, rounded to 2 MiB. The smallest free block that holds the
    request is taken and split; freed neighbours are joined. Segments are never given back, as in a run that does not
    meet its limit.
    """

    ROUNDING = 512
    SMALL = MIB

    def __init__(self) -> None:
        self.reserved = self.allocated = self.peak_allocated = 0
        self._free: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}  # by small or not, sorted by size
        self._free_blocks: dict[tuple[int, int, int], _Block] = {}
        self._used: dict[int, _Block] = {}
        self._segments = 0

    def play(self, trace: Iterable[Event], without: Iterable[int] = ()) -> Self:
        """Allocate and free as the trace says, but for the blocks that live elsewhere."""
        elsewhere = set(without)
        for event in trace:
            if event.block not in elsewhere:
                if event.bytes > 0:
                    self.allocate(event.block, event.bytes)
                else:
                    self.free(event.block)
        return self

    def allocate(self, number: int, size: int) -> None:
        size = -(-size // self.ROUNDING) * self.ROUNDING
        is_small = size <= self.SMALL
        pool = self._free[is_small]
        place = bisect.bisect_left(pool, (size, 0, 0))
        block = self._free_blocks.pop(pool.pop(place)) if place < len(pool) else self._new_segment(size, is_small)
        rest = block.size - size
        if rest >= self.ROUNDING if is_small else rest > self.SMALL:
            tail = _Block(block.segment, block.offset + size, rest, is_small, before=block, after=block.after)
            if block.after is not None:
                block.after.before = tail
            block.size, block.after = size, tail
            self._put(tail)
        block.is_free = False
        self._used[number] = block
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def free(self, number: int) -> None:
        block = self._used.pop(number)
        self.allocated -= block.size
        if block.after is not None and block.after.is_free:
            self._join(block, self._take(block.after))
        if block.before is not None and block.before.is_free:
            before = self._take(block.before)
            self._join(before, block)
            block = before
        self._put(block)

    def _new_segment(self, size: int, is_small: bool) -> _Block:
        if is_small:
            total = 2 * MIB
        elif size < 10 * MIB:
            total = 20 * MIB
        else:
            total = -(-size // (2 * MIB)) * 2 * MIB
        self._segments += 1
        self.reserved += total
        return _Block(self._segments, 0, total, is_small)

    def _put(self, block: _Block) -> None:
        block.is_free = True
        bisect.insort(self._free[block.is_small], block.key)
        self._free_blocks[block.key] = block

    def _take(self, block: _Block) -> _Block:
        pool = self._free[block.is_small]
        del pool[bisect.bisect_left(pool, block.key)]
        return self._free_blocks.pop(block.key)

    @staticmethod
    def _join(first: _Block, second: _Block) -> None:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
