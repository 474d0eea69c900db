"""Compute what torch's CUDA allocator would reserve for a trace of allocations and frees.

It rounds, splits and keeps blocks, and so reserves more than is alive. By default it takes segments from the driver
that can never be joined, and a long context, whose tensors are large and of many sizes, leaves a tenth of a card in
pieces. With expandable segments it has one segment that grows, where neighbors always join: the command line asks for
that (`prefer_expandable_segments`), and the plan counts as the environment of its process says.

Left out: several streams, and giving memory back to the driver, as torch does when it meets its limit.
"""

import bisect
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

MIB = 2**20
PAGES = {True: 2 * MIB, False: 20 * MIB}  # what a segment begins with or grows by, for small blocks and for others
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # of the environment; torch reads the first set


@dataclass(frozen=True)
class Event:
    """Record that a block was allocated, or freed where `bytes` is negative; `block` is its number."""

    block: int
    bytes: int


def uses_expandable_segments() -> bool:
    """Return True if the environment asks this process's allocator for expandable segments.

    Returns:
        True if it does.
    """
    settings = next((os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ), "")
    return "expandable_segments:true" in settings.replace(" ", "").lower()


@dataclass(eq=False)
class _Block:
    """Hold a piece of a segment; neighbors of one segment are linked, so that free ones can be joined."""

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
    """Simulate torch's CUDA allocator on one stream (c10/cuda/CUDACachingAllocator.cpp).

    Sizes are rounded to 512 bytes. The smallest free block that holds the request is taken and split; freed neighbors
    are joined. Requests of up to 1 MiB come from segments of 2 MiB, larger ones from segments of 20 MiB, and from 10
    MiB on from a segment of their own, rounded to 2 MiB. Or, with expandable segments, each of the two kinds has one
    segment, which grows at its end, by 2 MiB or 20 MiB at a time; its last block, as it can still grow, is taken last.

    Args:
        is_expandable: with expandable segments.
    """

    ROUNDING = 512
    SMALL = MIB

    def __init__(self, is_expandable: bool = False) -> None:
        self.is_expandable = is_expandable
        self.reserved = self.allocated = self.peak_allocated = 0
        self._free: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}  # by small or not, sorted by size
        self._free_blocks: dict[tuple[int, int, int], _Block] = {}
        self._used: dict[int, _Block] = {}
        self._segments = 0
        self._last: dict[bool, _Block] = {}  # by small or not: the last block of the segment that grows

    def play(self, trace: Iterable[Event], without: Iterable[int] = ()) -> Self:
        """Allocate and free as the trace says.

        Args:
            trace: in the order of time.
            without: numbers of blocks that are elsewhere, not in this allocator's memory.

        Returns:
            The allocator.
        """
        elsewhere = set(without)
        for event in trace:
            if event.block not in elsewhere:
                if event.bytes > 0:
                    self.allocate(event.block, event.bytes)
                else:
                    self.free(event.block)
        return self

    def allocate(self, number: int, size: int) -> None:
        """Take a block, from a free one or a new segment.

        Args:
            number: of the block, to free it by.
            size: bytes asked for.
        """
        size = -(-size // self.ROUNDING) * self.ROUNDING
        is_small = size <= self.SMALL
        block = self._best_fit(size, is_small) or self._grown(size, is_small)
        rest = block.size - size
        if rest >= self.ROUNDING if is_small or self.is_expandable else rest > self.SMALL:
            tail = _Block(block.segment, block.offset + size, rest, is_small, before=block, after=block.after)
            if block.after is not None:
                block.after.before = tail
            block.size, block.after = size, tail
            if self._last.get(is_small) is block:
                self._last[is_small] = tail
            self._put(tail)
        block.is_free = False
        self._used[number] = block
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def free(self, number: int) -> None:
        """Give a block back, and join it with free neighbors.

        Args:
            number: of the block.
        """
        block = self._used.pop(number)
        self.allocated -= block.size
        if block.after is not None and block.after.is_free:
            self._join(block, self._take(block.after))
        if block.before is not None and block.before.is_free:
            before = self._take(block.before)
            self._join(before, block)
            block = before
        self._put(block)

    def _best_fit(self, size: int, is_small: bool) -> _Block | None:
        pool = self._free[is_small]
        place = bisect.bisect_left(pool, (size, 0, 0))
        if place == len(pool):
            return None
        if place + 1 < len(pool) and self._free_blocks[pool[place]] is self._last.get(is_small):
            place += 1
        return self._free_blocks.pop(pool.pop(place))

    def _grown(self, size: int, is_small: bool) -> _Block:
        """Return a block of at least `size` from memory that is new."""
        if not self.is_expandable:
            total = PAGES[is_small] if is_small or size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            self._segments += 1
            self.reserved += total
            return _Block(self._segments, 0, total, is_small)
        last = self._last.get(is_small)
        free = 0 if last is None or not last.is_free else self._take(last).size
        more = -(-(size - free) // PAGES[is_small]) * PAGES[is_small]
        self.reserved += more
        if last is not None and free:
            last.size += more
            return last
        end = 0 if last is None else last.offset + last.size
        block = _Block(int(is_small), end, more, is_small, before=last)
        if last is not None:
            last.after = block
        self._last[is_small] = block
        return block

    def _put(self, block: _Block) -> None:
        block.is_free = True
        bisect.insort(self._free[block.is_small], block.key)
        self._free_blocks[block.key] = block

    def _take(self, block: _Block) -> _Block:
        pool = self._free[block.is_small]
        del pool[bisect.bisect_left(pool, block.key)]
        return self._free_blocks.pop(block.key)

    def _join(self, first: _Block, second: _Block) -> None:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        if self._last.get(first.is_small) is second:
            self._last[first.is_small] = first
