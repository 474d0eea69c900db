"""What functions save for backward: once, let go of early, and handed over at once where only that is wanted."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_kernels.saved_tensors import KeptBy, Saved, fetch, keep, visible


class Product(torch.autograd.Function):
    """x * y * 2; notes what is alive once its backward has fetched, and whether forward came to its end."""

    ended = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        keep(ctx, x, None, y)
        Product.ended += 1
        return x * y * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, nothing, y = fetch(ctx)
        assert nothing is None
        assert x is not None
        assert y is not None
        with pytest.raises(RuntimeError, match="freed"):
            _ = ctx.saved_tensors
        return grad * y * 2, grad * x * 2


def test_what_is_kept_comes_back_once_and_is_let_go_of() -> None:
    x, y = (torch.tensor(value, requires_grad=True) for value in (3.0, 5.0))
    Product.apply(x, y).backward()
    assert (x.grad, y.grad) == (torch.tensor(10.0), torch.tensor(6.0))


def test_what_is_collected_is_handed_over_before_the_function_ends() -> None:
    class EnoughError(Exception):
        pass

    taken: list[float] = []

    def take(tensors: Saved) -> None:
        taken.extend(float(tensor) for tensor in tensors if tensor is not None)
        raise EnoughError

    def unused(_: object) -> Saved:
        raise AssertionError("nothing is asked for")

    x, y = (torch.tensor(value, requires_grad=True) for value in (3.0, 5.0))
    before = Product.ended
    with pytest.raises(EnoughError), KeptBy(take, unused):
        Product.apply(x, y)
    assert taken == [3.0, 5.0]
    assert Product.ended == before
    Product.apply(x, y).backward()  # the block has left nothing behind
    assert Product.ended == before + 1


def test_something_else_can_be_kept_in_the_place_of_tensors() -> None:
    """Numbers, for which backward gets tensors; autograd saves none."""
    held: list[Saved] = []

    def put(tensors: Saved) -> int:
        held.append(tensors)
        return len(held) - 1

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            keep(ctx, None, x)
            return x * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            nothing, x = fetch(ctx)
            assert nothing is None
            assert x is held[0][1]
            assert x is not None
            assert ctx.saved_tensors == ()
            return 2 * grad * x

    x = torch.tensor(3.0, requires_grad=True)
    with KeptBy(put, held.__getitem__):
        output = Square.apply(x)
    for _ in range(2):  # a graph that is used again asks again
        assert torch.autograd.grad(output, x, retain_graph=True) == (torch.tensor(6.0),)


def test_a_function_under_no_grad_sees_inputs_that_need_no_gradient() -> None:
    x = torch.ones(2, requires_grad=True)
    assert visible(x, None) == (x, None)
    with torch.no_grad():
        shown, nothing = visible(x, None)
    assert shown is not None
    assert not shown.requires_grad
    assert nothing is None
