"""Counting bytes: every storage once, from its making to its end."""

import torch

from qlora_kernels.torch_internals import FakeTensorMode
from qlora_trainer.planning.allocator import CachingAllocator
from qlora_trainer.planning.live_bytes import LiveBytes

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


def test_kinds_and_bytes_inside_an_operation_are_reported_at_the_peak() -> None:
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
