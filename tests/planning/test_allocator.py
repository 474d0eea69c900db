"""The rules of torch's CUDA allocator, one by one."""

import os
import platform
import random

import pytest

from qlora_trainer.cli.app import prefer_expandable_segments
from qlora_trainer.planning.allocator import ALLOCATOR_VARIABLES, MIB, CachingAllocator, Event, uses_expandable_segments


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # the 1 MiB left over is too little to split off
    ],
)
def test_sizes_and_segments_are_rounded(size: int, allocated: int, reserved: int) -> None:
    allocator = CachingAllocator().play([Event(1, size)])
    assert (allocator.allocated, allocator.reserved) == (allocated, reserved)


def test_small_and_large_blocks_come_from_different_segments() -> None:
    allocator = CachingAllocator().play([Event(1, 2 * MIB), Event(2, 512)])
    assert allocator.reserved == 22 * MIB


def test_the_smallest_free_block_that_holds_a_request_is_taken() -> None:
    allocator = CachingAllocator()
    for number, size in enumerate([30 * MIB, 12 * MIB, 16 * MIB]):
        allocator.allocate(number, size)
    for number in range(3):
        allocator.free(number)
    allocator.allocate(3, 14 * MIB)  # from the 16, not the 30
    allocator.allocate(4, 28 * MIB)
    allocator.allocate(5, 12 * MIB)
    assert allocator.reserved == 58 * MIB


def test_freed_neighbors_are_joined_in_any_order() -> None:
    for order in ([1, 2, 3], [3, 2, 1], [1, 3, 2], [2, 1, 3]):
        allocator = CachingAllocator().play([Event(n, 5 * MIB) for n in (1, 2, 3)])
        for number in order:
            allocator.free(number)
        allocator.allocate(4, 20 * MIB)
        assert allocator.reserved == 20 * MIB, order
        assert allocator.peak_allocated == 20 * MIB


def test_blocks_of_different_segments_are_not_joined() -> None:
    trace = [Event(1, 20 * MIB), Event(2, 20 * MIB), Event(1, -20 * MIB), Event(2, -20 * MIB), Event(3, 40 * MIB)]
    assert CachingAllocator().play(trace).reserved == 80 * MIB


def test_blocks_that_live_elsewhere_are_left_out() -> None:
    trace = [Event(1, 30 * MIB), Event(2, 12 * MIB), Event(1, -30 * MIB)]
    assert CachingAllocator().play(trace, without=[1]).reserved == 12 * MIB


@pytest.mark.parametrize("is_expandable", [False, True])
def test_nothing_is_lost_over_many_requests(is_expandable: bool) -> None:
    """Whatever is asked for and given back, in the end all is free again, in whole segments."""
    draw = random.Random(0)
    allocator = CachingAllocator(is_expandable)
    held: list[int] = []
    for number in range(3000):
        if held and draw.random() < 0.5:
            allocator.free(held.pop(draw.randrange(len(held))))
        else:
            allocator.allocate(number, int(2 ** draw.uniform(0, 25)))
            held.append(number)
        assert allocator.allocated <= allocator.reserved
    for number in held:
        allocator.free(number)
    assert allocator.allocated == 0
    free = [size for pool in allocator._free.values() for size, _, _ in pool]
    assert sum(free) == allocator.reserved
    assert len(free) == (2 if is_expandable else allocator._segments)


@pytest.mark.parametrize(("size", "reserved"), [(1, 2 * MIB), (MIB + 1, 20 * MIB), (21 * MIB, 40 * MIB)])
def test_an_expandable_segment_grows_by_whole_pages(size: int, reserved: int) -> None:
    assert CachingAllocator(is_expandable=True).play([Event(1, size)]).reserved == reserved


def test_neighbors_in_an_expandable_segment_join_whatever_they_were_asked_for() -> None:
    trace = [Event(1, 20 * MIB), Event(2, 20 * MIB), Event(1, -20 * MIB), Event(2, -20 * MIB), Event(3, 40 * MIB)]
    assert CachingAllocator(is_expandable=True).play(trace).reserved == 40 * MIB


def test_what_is_free_at_the_end_of_an_expandable_segment_is_grown_and_not_left() -> None:
    trace = [Event(1, 20 * MIB), Event(2, 30 * MIB), Event(2, -30 * MIB), Event(3, 50 * MIB)]
    allocator = CachingAllocator(is_expandable=True).play(trace)
    assert allocator.reserved == 80 * MIB, "40 of 60 are free at the end; the 10 that they lack make one more page"


def test_the_end_of_an_expandable_segment_is_taken_last() -> None:
    allocator = CachingAllocator(is_expandable=True)
    trace = [Event(1, 25 * MIB), Event(2, 5 * MIB), Event(3, 10 * MIB), Event(1, -25 * MIB), Event(3, -10 * MIB)]
    allocator.play(trace)  # 25 free, 5 in use, 10 free at the end
    allocator.allocate(4, 10 * MIB)
    assert allocator._last[False].is_free, "the 25 are split, though the 10 at the end fit better"


def test_expandable_segments_are_asked_for_unless_the_user_has_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not uses_expandable_segments()
    prefer_expandable_segments()
    assert uses_expandable_segments()
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "max_split_size_mb:128")
        prefer_expandable_segments()
        assert not uses_expandable_segments(), name
        monkeypatch.delenv(name)


def test_under_wsl_expandable_segments_are_taken_only_where_the_user_asks_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On some cards and drivers the first allocation fails with them there."""
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    prefer_expandable_segments()
    assert not any(name in os.environ for name in ALLOCATOR_VARIABLES)
    assert not uses_expandable_segments()
    monkeypatch.setenv(ALLOCATOR_VARIABLES[0], "expandable_segments:True")
    assert uses_expandable_segments(), "torch takes the user's word, and so does the plan"
