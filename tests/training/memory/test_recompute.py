"""What is run again in backward gives the gradient that it would have given, and is run no further than needed."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_trainer.common.errors import ModelError
from qlora_trainer.training.memory.recompute import Recomputation

Function = Callable[[Tensor], Tensor]


def gradients(function: Function, x: Tensor, weight: Tensor, *, again: bool) -> list[Tensor | None]:
    for tensor in (x, weight):
        tensor.grad = None
    torch.manual_seed(0)
    output = Recomputation(function, x).run(x) if again else function(x)
    torch.rand(3)  # other random numbers between forward and backward
    output.square().sum().backward()
    return [x.grad, weight.grad]


@pytest.mark.parametrize("needs_input", [True, False])
def test_gradients_are_those_of_one_run_with_the_same_random_numbers(needs_input: bool) -> None:
    x = torch.randn(5, 4, requires_grad=needs_input)
    weight = torch.randn(4, 4, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return F.dropout(torch.tanh(x @ weight), 0.5) @ weight

    expected, found = (gradients(function, x, weight, again=again) for again in (False, True))
    for theirs, ours in zip(expected, found, strict=True):
        assert (theirs is None) == (ours is None)
        assert theirs is None or torch.equal(theirs, ours)  # type: ignore[arg-type]


def test_random_numbers_after_backward_are_those_that_would_have_come() -> None:
    x = torch.randn(5, 4, requires_grad=True)
    torch.manual_seed(1)
    output = Recomputation(lambda x: F.dropout(x, 0.5), x).run(x)
    state = torch.get_rng_state()
    output.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_what_comes_after_the_last_saved_tensor_is_not_run_again() -> None:
    weight, runs = torch.randn(4, 4, requires_grad=True), []

    def function(x: Tensor) -> Tensor:
        runs.append("begun")
        saved = torch.tanh(x @ weight)
        runs.append("ended")
        return saved + 1.0  # saves nothing

    x = torch.randn(5, 4, requires_grad=True)
    Recomputation(function, x).run(x).sum().backward()
    assert runs == ["begun", "ended", "begun"]  # tanh saves its result, and is the last that saves


def test_a_graph_that_is_used_twice_is_run_again_twice() -> None:
    weight, runs = torch.randn(4, requires_grad=True), []

    def function(x: Tensor) -> Tensor:
        runs.append(1)
        return (x * weight).square()

    x = torch.randn(4, requires_grad=True)
    loss = Recomputation(function, x).run(x).sum()
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    (second,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(first, 2 * x.detach().square() * weight.detach())
    assert torch.equal(first, second)
    assert len(runs) == 3


def test_nothing_but_the_input_is_kept_between() -> None:
    kept: list[Tensor] = []

    class Noting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inside = torch.exp(x)
            kept.append(inside)
            return torch.sin(inside)

    x = torch.randn(8, requires_grad=True)
    output = Recomputation(Noting(), x).run(x)
    inside = weakref.ref(kept.pop())
    assert inside() is None
    output.sum().backward()
    torch.testing.assert_close(x.grad, torch.cos(x.detach().exp()) * x.detach().exp())


def test_an_input_that_is_written_to_before_backward_is_refused() -> None:
    x = torch.randn(4, requires_grad=True)
    between = x * 2
    output = Recomputation(lambda tensor: tensor.sin().sin(), between).run(between)
    with torch.no_grad():
        between.add_(1.0)
    with pytest.raises(ModelError, match=r"training\.activation_checkpointing=none"):
        output.sum().backward()


def test_a_layer_that_computes_otherwise_the_second_time_is_refused() -> None:
    widths = iter([4, 3])
    x = torch.randn(4, requires_grad=True)
    output = Recomputation(lambda tensor: tensor[: next(widths)].exp().exp(), x).run(x)
    with pytest.raises(ModelError, match=r"training\.activation_checkpointing=none"):
        output.sum().backward()
    counts = iter([2, 1])
    output = Recomputation(lambda tensor: _sines(tensor, next(counts)), x).run(x)
    with pytest.raises(ModelError, match=r"1 of 2 agree"):
        output.sum().backward()


def _sines(tensor: Tensor, count: int) -> Tensor:
    for _ in range(count):
        tensor = tensor.sin()
    return tensor
