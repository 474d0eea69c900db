"""Layers over one input as one function: what each gives alone, with the input kept once and no more memory."""

import itertools
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from adapted_layers import SCALING, saved_by
from layers_together import (
    RANKS,
    WIDTHS,
    Function,
    I,
    added_gradients,
    apart,
    assert_same,
    in_one_matrix,
    layers,
    outputs_and_gradients,
    parameters_of,
)
from random_tensors import normal
from spying import Operations, noting, unchanged
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlora_kernels.adapter import Adapter, Projection
from qlora_kernels.adapter_gradients import AdapterBackward
from qlora_kernels.dropout import draw_seed
from qlora_kernels.lora_linear import nf4_linear, nf4_linears
from qlora_kernels.nf4 import quantize_nf4
from qlora_trainer.planning.live_bytes import LiveBytes


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adapted": "qv", "biased": ""},
        {"adapted": "", "biased": "qkv"},
        {"scalings": (1.7, 0.5, 2.0), "biased": "qkv"},
        {"dropouts": (0.3, 0.3, 0.3)},
        {"dropouts": (0.3, 0.0, 0.2), "scalings": (1.7, 0.5, 2.0)},
    ],
    ids=["alike", "one not adapted", "none adapted", "scaled apart", "dropout", "some with dropout"],
)
def test_layers_together_give_what_each_gives_alone(lead: tuple[int, ...], options: dict[str, Any]) -> None:
    x = normal(*lead, I, dtype=torch.float64).requires_grad_()
    projections = layers(**options)
    assert_same(outputs_and_gradients(nf4_linears, x, projections), outputs_and_gradients(apart, x, projections))


@pytest.mark.parametrize("adapted", ["qkv", "qv"])
def test_adapters_in_one_matrix_give_what_each_gives_alone(adapted: str) -> None:
    x = normal(2, 3, I, dtype=torch.float64).requires_grad_()
    projections = layers(adapted, biased="")
    stacked = in_one_matrix(projections)
    outputs = nf4_linears(x, stacked)
    grads = [normal(*output.shape, seed=40 + place, dtype=x.dtype) for place, output in enumerate(outputs)]
    (grad_x,) = torch.autograd.grad(outputs, x, grads)
    found = [*(output.detach() for output in outputs), grad_x, *added_gradients(stacked)]
    assert_same(found, outputs_and_gradients(apart, x, projections))


def test_adapters_in_one_matrix_are_multiplied_at_once() -> None:
    """Forward: the input by all A's, and by each weight. Backward: of each layer the gradient by B, that of B and that
    by the weight; the gradient of all A's once."""
    x = normal(6, I, dtype=torch.float64).requires_grad_()
    projections = in_one_matrix(layers(biased=""))
    with Operations() as forward:
        outputs = nf4_linears(x, projections)
    with Operations() as backward:
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    assert forward.names.count("qlora_kernels::linear") == 1 + 3
    products = backward.names.count("qlora_kernels::product") + backward.names.count("aten::addmm_")
    assert products == 3 + 3 + 3 + 1 + 1, "the last by all A's, into the gradient of x"


def test_with_dropout_nothing_is_stacked() -> None:
    """Each adapter drops other elements of the input."""
    x = normal(2, 3, I, dtype=torch.float64).requires_grad_()
    projections = layers(biased="", dropouts=(0.3, 0.3, 0.3))
    stacked = in_one_matrix(projections)
    found = [output.detach() for output in nf4_linears(x, stacked)]
    assert_same(found, [output.detach() for output in apart(x, projections)])


def test_the_input_is_saved_once_with_one_rank_sized_product() -> None:
    x = normal(4, 5, I, dtype=torch.float64).requires_grad_()
    projections = in_one_matrix(layers(biased=""))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(noting(unchanged, kept.append), unchanged):
        nf4_linears(x, projections)
    assert [tensor.shape for tensor in kept] == [(4, 5, I), (20, sum(RANKS))]
    assert kept[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    "names", [names for count in (0, 1, 2) for names in itertools.combinations(["x", "q", "v"], count)]
)
def test_only_the_gradients_asked_for_are_made(names: tuple[str, ...]) -> None:
    """Of the input, and of the adapters and biases of each layer."""
    x = normal(4, I, dtype=torch.float64).requires_grad_("x" in names)
    projections = layers(biased="qkv")
    for name, projection in zip("qkv", projections, strict=True):
        for tensor in parameters_of([projection]):
            tensor.requires_grad_(name in names)
    if not names:
        assert not any(output.requires_grad for output in nf4_linears(x, projections))
        return
    assert_same(outputs_and_gradients(nf4_linears, x, projections), outputs_and_gradients(apart, x, projections))


def test_a_frozen_adapter_next_to_one_that_trains_gets_nothing() -> None:
    x = normal(4, I, dtype=torch.float64).requires_grad_()
    projections = layers(biased="")
    frozen = projections[1].adapter
    assert frozen is not None
    frozen.lora_A.requires_grad_(False)
    frozen.lora_B.requires_grad_(False)
    outputs = nf4_linears(x, projections)
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    assert frozen.lora_A.grad is None
    assert frozen.lora_B.grad is None
    assert all(t.grad is not None for p in (projections[0], projections[2]) for t in parameters_of([p]))


def test_gradients_are_those_of_finite_differences() -> None:
    projections = layers(dropouts=(0.3, 0.0, 0.0))
    x = normal(2, I, dtype=torch.float64).requires_grad_()

    def function(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return nf4_linears(x, projections)

    assert torch.autograd.gradcheck(function, (x, *parameters_of(projections)))


def test_a_gradient_of_one_output_alone_is_that_of_its_layer() -> None:
    x = normal(4, I, dtype=torch.float64).requires_grad_()
    projections = layers(biased="")
    wanted = [x, *parameters_of(projections[1:2])]
    found = torch.autograd.grad(nf4_linears(x, projections)[1].square().sum(), wanted)
    assert_same(found, torch.autograd.grad(nf4_linear(x, *projections[1]).square().sum(), wanted))


@pytest.mark.parametrize("needs_x", [False, True])
def test_gradients_that_are_added_in_place_need_no_parameter_in_the_graph(needs_x: bool) -> None:
    """One A where the input needs no gradient, as above a frozen embedding; else none: each would be a node."""
    x = normal(4, I, dtype=torch.float64).requires_grad_(needs_x)
    projections = in_one_matrix(layers(biased=""))
    outputs = nf4_linears(x, projections)
    node = outputs[0].grad_fn
    assert node is not None
    others = [follower for follower, _ in node.next_functions if follower is not None]
    assert len(others) == 1
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    assert all(bool(grad.any()) for grad in added_gradients(projections))


def test_the_first_layers_backward_does_not_dequantize(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = nf4_linears(normal(4, I, dtype=torch.float64), layers())

    def refuse(*_arguments: object) -> Tensor:
        raise AssertionError("dequantized for a gradient that nobody wants")

    monkeypatch.setattr("qlora_kernels.lora_linear.dequantized_blocks", refuse)
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_a_workspace_of_any_size_gives_the_same_result(rows: int) -> None:
    x = normal(5, I, dtype=torch.float64).requires_grad_()
    projections = layers(dropouts=(0.3, 0.0, 0.0))
    workspace = torch.full((rows * I,), torch.nan, dtype=torch.float64)
    roomy = [p._replace(weight=replace(p.weight, workspace=workspace)) for p in projections]
    assert_same(outputs_and_gradients(nf4_linears, x, roomy), outputs_and_gradients(apart, x, projections))


def test_recomputing_changes_no_bit() -> None:
    projections = layers(biased="")

    def block(x: Tensor) -> Tensor:
        seeded = [p._replace(adapter=replace(p.adapter, dropout=0.3, dropout_seed=draw_seed())) for p in projections]  # type: ignore[type-var]
        return torch.cat(nf4_linears(x.sin(), seeded), dim=-1)

    found = []
    for is_recomputed in (False, True):
        x = normal(4, I, dtype=torch.float64).requires_grad_()
        torch.manual_seed(5)
        output = checkpoint(block, x, use_reentrant=False) if is_recomputed else block(x)
        torch.manual_seed(99)
        found.append([output.detach(), *torch.autograd.grad(output.square().sum(), [x, *parameters_of(projections)])])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_each_mask_of_dropout_is_made_once_in_backward() -> None:
    """For the gradient of A and for that of the input."""
    x = normal(4, I, dtype=torch.float64)
    projections = layers(dropouts=(0.3, 0.0, 0.2))
    adapters = AdapterBackward([normal(4, width, dtype=x.dtype) for width in WIDTHS], projections, needs_x=True)
    with torch.no_grad(), Operations() as seen:
        adapters.grads_B([None] * 3)
        assert sorted(adapters.grads_A(x, {0, 1, 2})) == [0, 1, 2]
        of_two = adapters.with_dropout()
    assert of_two is not None
    assert of_two.shape == x.shape
    assert seen.names.count("qlora_kernels::keep_mask") == 2


class AllAtOnce(torch.autograd.Function):
    """Gives all its inputs their gradients at once, as attention and the product of a gated MLP do."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.inputs = [tensor.shape for tensor in inputs]
        return torch.stack([tensor.sum() for tensor in inputs]).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ones(shape) for shape in ctx.inputs)


@pytest.mark.parametrize(
    "widths", [(96, 96, 96), (96, 24, 24), (300, 300)], ids=["heads", "grouped heads", "gate and up"]
)
def test_layers_together_take_no_more_memory_than_one_after_another(widths: Sequence[int]) -> None:
    """At the fullest moment of forward and backward; the input's gradient is never there twice."""
    tokens, I, R = 200, 96, 4  # noqa: E741
    workspace = torch.empty(max(widths) * I)
    projections = []
    for place, O in enumerate(widths):  # noqa: E741
        weight = replace(quantize_nf4(normal(O, I, seed=place)), workspace=workspace)
        A, B = normal(R, I).requires_grad_(), normal(O, R).requires_grad_()
        projections.append(Projection(weight, None, Adapter(A, B, SCALING)))

    def peak(function: Function) -> int:
        x = normal(tokens, I).requires_grad_()
        with LiveBytes() as live:
            live.watch([x, workspace, *parameters_of(projections)], "before")
            hidden = x.sin()
            loss = AllAtOnce.apply(*function(hidden, projections))
            del hidden
            loss.backward()
        return live.peak.bytes

    assert peak(nf4_linears) <= peak(apart)


def test_two_threads_at_once_add_to_gradients_of_their_own() -> None:
    """Each on its own tokens, through the same layers and the same A's."""
    projections = layers(biased="")
    alone, at_once = ([in_one_matrix(projections) for _ in range(2)] for _ in range(2))
    inputs = [normal(64, I, seed=place, dtype=torch.float64) for place in range(2)]
    barrier = threading.Barrier(2)

    def run(place: int, ours: Sequence[Projection], waits: bool) -> None:
        x = inputs[place].clone().requires_grad_()
        for _ in range(20):
            if waits:
                barrier.wait()
            outputs = nf4_linears(x, ours)
            torch.autograd.backward(outputs, [output.detach().cos() for output in outputs])

    for place in range(2):
        run(place, alone[place], False)
    threads = [threading.Thread(target=run, args=(place, at_once[place], True)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, at_once, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(added_gradients(one), added_gradients(other), strict=True))


def test_a_node_of_several_layers_holds_no_activation() -> None:
    projections = layers(biased="")
    x = normal(4, I, dtype=torch.float64).requires_grad_()

    def first(x: Tensor, *others: Tensor) -> Tensor:
        return nf4_linears(x, projections)[0]

    kept = saved_by(first, (x, *parameters_of(projections)))  # type: ignore[arg-type]
    assert [tensor.shape for tensor in kept] == [(4, I), *((4, rank) for rank in RANKS)]


def test_few_tokens_without_gradients_take_the_operation_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_KERNELS", "reference")
    projections = layers()
    x = normal(16, I, dtype=torch.float64)
    with torch.no_grad(), Operations() as seen:
        found = nf4_linears(x, projections)
    assert seen.names.count("qlora_kernels::nf4_matmul_few") == 3
    assert_same(found, [output.detach() for output in apart(x, projections)])
