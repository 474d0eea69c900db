"""Counting bytes: every storage once, from its making to its end; and the allocator's rules, one by one."""

import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_trainer.memory_tracking import CachingAllocator, Event, LiveBytes

MIB = 2**20


def test_storages_are_counted_once_and_until_they_are_freed() -> None:
    with LiveBytes() as live:
        a = torch.zeros(256)
        view = a.view(16, 16).t()
        a.add_(1.0)
        assert live.bytes == 1024
        b = a + 1.0
        assert live.bytes == 2048
        del a
        assert live.bytes == 2048, "a view keeps the storage"
        del view, b
        assert live.bytes == 0
    assert live.peak.bytes == 2048
    assert live.peak.operation == "aten.add.Tensor"
    assert [event.bytes for event in live.trace] == [1024, 1024, -1024, -1024]


def test_what_autograd_keeps_is_alive_until_backward() -> None:
    weight = torch.ones(256, requires_grad=True)
    with LiveBytes() as live:
        loss = weight.exp().sum()
        assert live.bytes == 1024 + 4, "exp keeps its result"
        loss.backward()
        assert live.bytes == 1024 + 4, "and backward leaves the gradient in its place"


def test_kinds_and_bytes_inside_an_operation_are_told_at_the_peak() -> None:
    existing = torch.zeros(25)
    part = existing[:3]
    exp, add = torch.ops.aten.exp.default, torch.ops.aten.add.Tensor
    with LiveBytes(kinds={add: "sums"}, workspaces={exp: lambda arguments: 5 * arguments[0].nbytes}) as live:
        assert live.watch([existing, part], "given") == [1]
        total = existing + 1.0
        total.exp()
    assert live.peak.by_kind == {"given": 100, "sums": 100, "other": 100, "inside an operation": 500}
    assert live.bytes == 200
    live.restart_peak()
    assert live.peak.bytes == 200


def test_an_operation_that_uses_nothing_inside_leaves_no_trace() -> None:
    exp = torch.ops.aten.exp.default
    with LiveBytes(workspaces={exp: lambda arguments: 0}) as live:
        torch.zeros(256).exp()
    assert [event.bytes for event in live.trace] == [1024, 1024, -1024, -1024]
    assert CachingAllocator().play(live.trace).allocated == 0


def test_fake_tensors_count_as_real_ones() -> None:
    def work() -> None:
        x = torch.ones(64, 32, dtype=torch.bfloat16)
        y = x @ x.t()
        (y.float() + 1.0).sum()

    with LiveBytes() as real:
        work()
    with FakeTensorMode(), LiveBytes() as fake:
        work()
    assert fake.trace == real.trace
    assert fake.peak == real.peak


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


def test_freed_neighbours_are_joined_in_any_order() -> None:
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


def test_nothing_is_lost_over_many_requests() -> None:
    """Whatever is asked for and given back, in the end all is free again, in whole segments."""
    draw = random.Random(0)
    allocator = CachingAllocator()
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
    assert len(free) == allocator._segments
