"""Tensors without memory: what is remembered of them is what torch works out."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import qlora_kernels.nf4  # noqa: F401  registers its ops
from qlora_kernels.torch_internals import FakeTensor, FakeTensorMode
from qlora_trainer.planning.fake_tensors import FakeRun

Work = Callable[[Tensor], Tensor | None]

torch.library.define("qlora_tests::part_of_more", "(Tensor x) -> Tensor")
torch.library.register_fake("qlora_tests::part_of_more", lambda x: x.new_empty(100)[:10])

WORK: dict[str, Work] = {
    "new": lambda x: x * 2.0,
    "other_dtype": lambda x: x.to(torch.bfloat16),
    "promoted": lambda x: x.int() + 1.0,
    "not_promoted": lambda x: x.int() + 1,
    "bool": lambda x: x.int() + True,
    "factory": lambda x: torch.empty(3, 5, dtype=torch.float16),
    "not_contiguous": lambda x: torch.empty_like(x.t()),
    "view": lambda x: x.reshape(2, -1),
    "slice": lambda x: x[1:, 2:],
    "slice_of_slice": lambda x: x[1:][:, ::2],
    "other_view": lambda x: x.contiguous().view(torch.uint8),
    "maybe_a_view": lambda x: x.t().reshape(-1),
    "unsafe_view": lambda x: torch.ops.aten._unsafe_view(x.contiguous(), [-1]),
    "in_place": lambda x: x.add_(1.0),
    "out": lambda x: torch.mm(x, x.t(), out=x.new_empty(len(x), len(x))),
    "out_grown": lambda x: torch.mm(x, x.t(), out=x.new_empty(0)),
    "several": lambda x: x.split(2)[-1],
    "one_of_several": lambda x: x.max(0).values,
    "nothing": lambda x: torch.ops.qlora_kernels.dequantize_nf4(*[x] * 5, 0, 64, 256, x),
    "resized": lambda x: (x * 1.0).resize_(2, 2),
    "transposed": lambda x: (x * 1.0).t_(),
    "set": lambda x: x.new_empty(0).set_(x),  # type: ignore[call-overload]
    "part_of_more": lambda x: torch.ops.qlora_tests.part_of_more(x),
    "expanded": lambda x: x[:1].expand(7, -1),
    "detached": lambda x: x.detach(),
    "meta": lambda x: torch.empty(4, 6, device="meta") * 2.0,
    "known_value": lambda x: torch.tensor([3.0]) * 2.0,
    "unknown_value": lambda x: torch.empty(1) * 2.0,
    "needs_gradient": lambda x: torch.empty(3, 5, dtype=torch.float16, requires_grad=True),
}


def seen(work: Work, x: Tensor) -> tuple[Any, ...]:
    out = work(x)
    if out is None:
        return (None,)
    assert isinstance(out, FakeTensor)
    storage = out.untyped_storage()
    shares = storage._cdata == x.untyped_storage()._cdata
    form = (out.shape, out.stride(), out.storage_offset(), out.dtype, out.device, out.requires_grad)
    return *form, storage.nbytes(), shares, out is x, out.constant is None, torch._C._dispatch_key_set(out)


GIVEN: list[Callable[[], Tensor]] = [
    lambda: torch.empty(4, 6),
    lambda: torch.empty(6, 4).t(),  # strides
    lambda: torch.empty(5, 6)[1:],  # where it begins
    lambda: torch.empty(6, 6)[2:],
    lambda: torch.empty(4, 6, dtype=torch.bfloat16),
    lambda: torch.empty(2, 8),
]


def test_what_is_remembered_is_what_torch_works_out() -> None:
    def all_seen() -> dict[str, list[Any]]:
        return {name: [seen(work, given()) for given in GIVEN] for name, work in WORK.items()}

    with FakeTensorMode():
        expected = all_seen()
    with FakeRun():
        for _ in range(3):
            assert all_seen() == expected


def test_one_and_one_point_zero_are_distinguished() -> None:
    with FakeRun():
        x = torch.empty(3, dtype=torch.int32)
        kinds = [(x * factor).dtype for factor in (1, 1.0, True, 1, 1.0)]
    assert kinds == [torch.int32, torch.float32, torch.int32, torch.int32, torch.float32]


def test_torch_is_asked_once_for_like_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    original = FakeTensorMode.dispatch

    def noting(self: FakeTensorMode, func: Any, *arguments: Any) -> Any:
        asked.append(str(func))
        return original(self, func, *arguments)

    monkeypatch.setattr(FakeTensorMode, "dispatch", noting)
    with FakeRun():
        x = torch.empty(4, 6)
        for row in range(4):
            part = x[:2]
            part.mul_(2.0)
            torch.mm(part, part.t(), out=x[2:, :2])
            x[row].sum()
    assert asked.count("aten.mul_.Tensor") == asked.count("aten.mm.out") == asked.count("aten.sum.default") - 3 == 1


def test_gradients_are_made_as_on_tensors_with_memory() -> None:
    with FakeRun():
        for _ in range(2):
            weight = torch.empty(6, 3, requires_grad=True)
            x = torch.empty(4, 6)
            ((x @ weight)[1:].exp() * 2.0).sum().backward()
            assert weight.grad is not None
            assert (weight.grad.shape, weight.grad.stride()) == ((6, 3), (3, 1))


def test_nothing_that_was_seen_is_kept_alive() -> None:
    def tensors() -> Iterator[Tensor]:
        x = torch.empty(4, 6)
        yield from (x, x * 2.0, x[1:], x.view(-1), x.add_(1.0), x.new_empty(0).set_(x))  # type: ignore[call-overload]

    with FakeRun():
        storages = [weakref.ref(tensor.untyped_storage()) for _ in range(2) for tensor in tensors()]
    assert [reference() for reference in storages] == [None] * 12


@pytest.mark.parametrize(("dtype", "number"), [(torch.float32, 1.0), (torch.int64, 1), (torch.bool, True)])
def test_every_number_read_is_one(dtype: torch.dtype, number: object) -> None:
    with FakeRun():
        read = torch.zeros(3, dtype=dtype)[0].item()
    assert (read, type(read)) == (number, type(number))
