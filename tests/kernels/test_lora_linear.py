"""The frozen NF4 layer, alone and with its adapter: exact gradients, little kept, recomputation, a base that stays."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from spying import Operations, noting, unchanged
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlora_kernels import gated as gated_space
from qlora_kernels import gated_linear, lora_linear
from qlora_kernels.dropout import draw_seed, keep_mask
from qlora_kernels.gated_linear import gated_nf4_linear
from qlora_kernels.lora_linear import Adapter, add_lora, nf4_linear
from qlora_kernels.nf4 import NF4Weight, dequantize_nf4, quantize_nf4
from qlora_kernels.torch_internals import FakeTensorMode
from qlora_trainer.planning.live_bytes import LiveBytes


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def weight() -> NF4Weight:
    return quantize_nf4(normal(7, 45) / 45**0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_output_and_gradient_equal_a_dense_layer_with_the_dequantized_weight(
    weight: NF4Weight, lead: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_KERNELS", "reference")  # whose products are torch's own
    dense = dequantize_nf4(weight, dtype)
    x, bias = normal(*lead, 45, dtype=dtype).requires_grad_(), normal(7, seed=1, dtype=dtype)
    grad = normal(*lead, 7, seed=2, dtype=dtype)
    output = nf4_linear(x, weight, bias)
    output.backward(grad)
    assert torch.equal(output, F.linear(x, dense, bias))
    assert x.grad is not None
    assert torch.equal(x.grad, grad @ dense)


def test_gradients_are_those_of_finite_differences(weight: NF4Weight) -> None:
    x = normal(2, 45, dtype=torch.float64).requires_grad_()
    bias = normal(7, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, bias: nf4_linear(x, weight, bias), (x, bias))


def test_bias_gets_a_gradient_only_where_it_is_trained(weight: NF4Weight) -> None:
    x = normal(301, 45, dtype=torch.bfloat16).requires_grad_()  # bf16 has no 301: the sum is in the bias' dtype
    frozen, trained = normal(7), normal(7).requires_grad_()
    nf4_linear(x, weight, frozen).sum().backward()
    nf4_linear(x, weight, trained).sum().backward()
    assert frozen.grad is None
    assert trained.grad is not None
    assert torch.equal(trained.grad, torch.full((7,), 301.0))
    assert frozen.dtype == trained.grad.dtype == torch.float32


def test_frozen_input_costs_no_backward(weight: NF4Weight, monkeypatch: pytest.MonkeyPatch) -> None:
    bias = normal(7).requires_grad_()
    output = nf4_linear(normal(2, 45), weight, bias)

    def refuse(*_arguments: object) -> Tensor:
        raise AssertionError("dequantized for a gradient that nobody wants")

    monkeypatch.setattr("qlora_kernels.lora_linear.dequantized_blocks", refuse)
    output.sum().backward()
    assert bias.grad is not None


def test_a_model_may_add_into_the_output(weight: NF4Weight) -> None:
    """Falcon adds its MLP's output into its attention's, in place."""
    x = normal(2, 3, 45).requires_grad_()
    output = nf4_linear(x, weight, None)
    output += nf4_linear(2 * x, weight, None)
    output.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, 3 * dequantize_nf4(weight, torch.float32).sum(0).expand_as(x), rtol=1e-5)


def test_nothing_is_kept_for_backward(weight: NF4Weight) -> None:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(noting(unchanged, kept.append), unchanged):
        output = nf4_linear(normal(4, 45).requires_grad_(), weight, None)
    assert output.grad_fn is not None
    assert kept == []
    held = [value for value in vars(output.grad_fn).values() if isinstance(value, Tensor)]
    assert held == []


def test_checkpointing_gives_the_same_gradient(weight: NF4Weight) -> None:
    def block(x: Tensor) -> Tensor:
        return F.silu(nf4_linear(F.silu(x), weight, None))

    plain, recomputed = normal(4, 45).requires_grad_(), normal(4, 45).requires_grad_()
    block(plain).sum().backward()
    checkpoint(block, recomputed, use_reentrant=False).sum().backward()
    assert plain.grad is not None
    assert recomputed.grad is not None
    assert torch.equal(plain.grad, recomputed.grad)


def test_without_grad_mode_no_graph_is_made(weight: NF4Weight) -> None:
    x = normal(4, 45).requires_grad_()
    with torch.no_grad():
        assert not nf4_linear(x, weight, None).requires_grad


def test_weight_is_not_changed_by_training_through_it(weight: NF4Weight) -> None:
    before = [tensor.clone() for tensor in vars(weight).values() if isinstance(tensor, Tensor)]
    bias = normal(7)
    x = normal(4, 45, dtype=torch.bfloat16).requires_grad_()
    nf4_linear(x, weight, bias).sum().backward()
    after = [tensor for tensor in vars(weight).values() if isinstance(tensor, Tensor)]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert torch.equal(bias, normal(7))


# With its adapter. `Inputs` are x (..., I), bias (O,), lora_A (R, I), lora_B (O, R).
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
SCALING = 1.7
SEED = torch.tensor(11)


def adapter_inputs(
    *lead: int,
    dtype: torch.dtype = torch.float64,
    parameters: torch.dtype | None = None,
    trained: str = "x bias A B",
    sizes: tuple[int, int, int] = (7, 45, 3),  # O, I, R
) -> Inputs:
    """x of `dtype`; bias, A and B of dtype `parameters` or x's; those named in `trained` require gradients."""
    kind = parameters or dtype
    O, I, R = sizes  # noqa: E741
    tensors = {
        "x": normal(*lead, I, dtype=dtype),
        "bias": normal(O, seed=1, dtype=kind),
        "A": normal(R, I, seed=3, dtype=kind) / I**0.5,
        "B": normal(O, R, seed=4, dtype=kind),
    }
    x, bias, A, B = (tensor.requires_grad_(name in trained.split()) for name, tensor in tensors.items())
    return x, bias, A, B


def fused(weight: NF4Weight, dropout: float = 0.0) -> Callable[..., Tensor]:
    seed = SEED if dropout else None
    return lambda x, bias, A, B: nf4_linear(x, weight, bias, Adapter(A, B, SCALING, dropout, seed))


def mask_like(x: Tensor, dropout: float) -> Tensor:
    return keep_mask(x.reshape(-1, x.shape[-1]), x.shape[-1], dropout, SEED).view(x.shape)


def plain(weight: NF4Weight, dropout: float = 0.0) -> Callable[..., Tensor]:
    """The formula in plain torch; dropout by an explicit mask."""

    def formula(x: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        base = F.linear(x, dequantize_nf4(weight, x.dtype), bias.to(x.dtype))
        mask = mask_like(x, dropout)
        return add_lora(base, x * mask / (1.0 - dropout), A, B, SCALING)

    return formula


def output_and_gradients(function: Callable[..., Tensor], inputs: Inputs) -> list[Tensor]:
    """Output, then the gradients of x, bias, A and B for a random gradient of the output."""
    output = function(*inputs)
    trained = [tensor for tensor in inputs if tensor.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, trained, normal(*output.shape, seed=2, dtype=output.dtype))]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)])
def test_layer_with_adapter_is_the_plain_formula(weight: NF4Weight, lead: tuple[int, ...], dropout: float) -> None:
    inputs = adapter_inputs(*lead)
    found = output_and_gradients(fused(weight, dropout), inputs)
    expected = output_and_gradients(plain(weight, dropout), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("kernels", "most"), [("reference", 1.1), ("auto", 3.0)])
def test_layer_with_adapter_errs_no_more_than_the_plain_formula(
    dtype: torch.dtype, dropout: float, kernels: str, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root mean square errors against fp64 with the same weight and inputs; fp32 adapters, as in training.

    The plain formula's products are torch's own; sums in another order may err more, by much less than bf16 does.
    """
    monkeypatch.setenv("QLORA_KERNELS", kernels)
    weight = quantize_nf4(normal(200, 320) / 320**0.5)
    inputs = adapter_inputs(300, dtype=dtype, parameters=torch.float32, sizes=(200, 320, 16))
    dense = dequantize_nf4(weight, dtype).double()  # what this dtype multiplies; fp64 must multiply the same
    exact_inputs: Inputs = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)  # type: ignore

    def formula(x: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        mask = mask_like(x, dropout)
        return add_lora(F.linear(x, dense, bias), x * mask / (1.0 - dropout), A, B, SCALING)

    exact = output_and_gradients(formula, exact_inputs)
    found = output_and_gradients(fused(weight, dropout), inputs)
    expected = output_and_gradients(plain(weight, dropout), inputs)
    for name, ours, theirs, truth in zip(("y", "x", "bias", "A", "B"), found, expected, exact, strict=True):
        assert ours.dtype == (dtype if name in "yx" else torch.float32)
        error, allowed = ((value.double() - truth).pow(2).mean().sqrt() for value in (ours, theirs))
        assert error <= most * allowed, f"{name}: {float(error / allowed):.2f} times the plain formula's error"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_with_adapter_are_those_of_finite_differences(weight: NF4Weight, dropout: float) -> None:
    assert torch.autograd.gradcheck(fused(weight, dropout), adapter_inputs(2))


def test_layer_with_adapter_takes_an_input_that_is_not_contiguous(weight: NF4Weight) -> None:
    x, bias, A, B = adapter_inputs(4, 5)
    turned = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not turned.is_contiguous()
    expected = output_and_gradients(fused(weight, 0.3), (x, bias, A, B))
    found = output_and_gradients(fused(weight, 0.3), (turned, bias, A, B))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "trained",
    [" ".join(names) for count in range(1, 5) for names in itertools.combinations(["x", "bias", "A", "B"], count)],
)
def test_only_the_gradients_asked_for_are_made(weight: NF4Weight, trained: str) -> None:
    inputs = adapter_inputs(4, trained=trained)
    found = output_and_gradients(fused(weight), inputs)
    expected = output_and_gradients(plain(weight), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_first_layers_backward_does_not_dequantize(weight: NF4Weight, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its input, the embedding, is frozen."""
    inputs = adapter_inputs(4, trained="A B")
    output = fused(weight)(*inputs)

    def refuse(*_arguments: object) -> Tensor:
        raise AssertionError("dequantized for a gradient that nobody wants")

    monkeypatch.setattr("qlora_kernels.lora_linear.dequantized_blocks", refuse)
    output.sum().backward()
    assert inputs[2].grad is not None


def saved_by(function: Callable[..., Tensor], inputs: Inputs) -> list[Tensor]:
    """What autograd saves for backward; asserts that the node itself holds parameters and a seed, and no activation."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(noting(unchanged, kept.append), unchanged):
        output = function(*inputs)
    assert output.grad_fn is not None
    held = [value for value in vars(output.grad_fn).values() if isinstance(value, Tensor)]
    assert all(any(value is parameter for parameter in (*inputs[1:], SEED)) for value in held)
    return kept


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_input_and_a_rank_sized_product_are_all_that_is_saved(
    weight: NF4Weight, dtype: torch.dtype, dropout: float
) -> None:
    inputs = adapter_inputs(4, 5, dtype=dtype, parameters=torch.float32)
    kept = saved_by(fused(weight, dropout), inputs)
    assert [tensor.shape for tensor in kept] == [(4, 5, 45), (20, 3)]
    assert kept[0].data_ptr() == inputs[0].data_ptr()
    assert kept[1].dtype == dtype


def test_layers_with_the_same_input_save_it_once(weight: NF4Weight) -> None:
    inputs = adapter_inputs(4, 5)
    kept = [tensor for _ in range(3) for tensor in saved_by(fused(weight, 0.3), inputs)]
    assert len(kept) == 6
    assert {tensor.data_ptr() for tensor in kept if tensor.shape[-1] == 45} == {inputs[0].data_ptr()}


@pytest.mark.parametrize(("trained", "shapes"), [("x A", [(4, 45)]), ("x B", [(4, 3)]), ("x bias", [])])
def test_what_no_gradient_needs_is_not_saved(weight: NF4Weight, trained: str, shapes: list[tuple[int, int]]) -> None:
    inputs = adapter_inputs(4, trained=trained)
    kept = saved_by(fused(weight), inputs)
    assert [tensor.shape for tensor in kept] == shapes


def test_without_grad_mode_the_adapted_layer_makes_no_graph(weight: NF4Weight) -> None:
    with torch.no_grad():
        output = fused(weight, 0.3)(*adapter_inputs(4))
    assert output.grad_fn is None
    torch.testing.assert_close(output, plain(weight, 0.3)(*adapter_inputs(4)).detach(), rtol=1e-12, atol=1e-13)


def test_dropout_is_the_same_under_the_same_global_random_state() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = draw_seed(), draw_seed()
    torch.set_rng_state(state)
    assert (draw_seed(), draw_seed()) == (first, second)
    assert first != second
    like = normal(50, 7)
    assert torch.equal(keep_mask(like, 64, 0.3, first), keep_mask(like, 64, 0.3, first))
    assert not torch.equal(keep_mask(like, 64, 0.3, first), keep_mask(like, 64, 0.3, second))


@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_the_share_asked_for_everywhere(dropout: float, dtype: torch.dtype) -> None:
    kept = keep_mask(normal(1000, 7, dtype=dtype), 402, dropout, SEED)
    assert (kept.shape, kept.dtype) == ((1000, 402), dtype)
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    variance = dropout * (1.0 - dropout)
    parts = {"all": kept.double().view(1, -1), "rows": kept.double(), "columns": kept.double().T}
    parts |= {f"each fourth from {lane}": kept.view(-1)[lane::4].double().view(1, -1) for lane in range(4)}
    for name, part in parts.items():
        bound = 5.0 * (variance / part.shape[1]) ** 0.5 + 1e-5  # five standard deviations, and the rounding
        assert float((part.mean(1) - (1.0 - dropout)).abs().max()) <= bound, name
    if dropout == 0.5:  # neighbors, drawn together, are independent
        together = (kept[:, 1:] * kept[:, :-1]).double().mean()
        assert float(together) == pytest.approx(0.25, abs=5.0 * (0.25 * 0.75 / kept.numel()) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_an_adapted_layer_changes_no_bit(weight: NF4Weight, dtype: torch.dtype) -> None:
    def block(x: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        # Two layers and so two seeds, drawn where recomputation must draw them again.
        for _ in range(2):
            y = nf4_linear(F.silu(x), weight, bias, Adapter(A, B, SCALING, 0.3, draw_seed()))
            x = F.pad(y, (0, 38))
        return y

    inputs = adapter_inputs(4, dtype=dtype, parameters=torch.float32)
    torch.manual_seed(5)
    kept = output_and_gradients(block, inputs)
    torch.manual_seed(5)
    output = checkpoint(block, *inputs, use_reentrant=False)
    torch.manual_seed(99)  # what happens between forward and backward does not matter
    gradients = torch.autograd.grad(output, inputs, normal(*output.shape, seed=2, dtype=dtype))
    assert all(torch.equal(one, other) for one, other in zip(kept, [output, *gradients], strict=True))


def test_adapted_layer_runs_on_fake_tensors(weight: NF4Weight) -> None:
    with FakeTensorMode():
        fields: Any = {
            name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            for name, value in vars(weight).items()
            if isinstance(value, Tensor)
        }
        inputs = [
            torch.empty(tensor.shape, dtype=dtype, requires_grad=True)
            for tensor, dtype in zip(adapter_inputs(4, 5), [torch.bfloat16] + 3 * [torch.float32], strict=True)
        ]
        x, bias, A, B = inputs
        adapter = Adapter(A, B, SCALING, 0.3, draw_seed())
        output = nf4_linear(x, replace(weight, **fields), bias, adapter)
        assert (output.shape, output.dtype) == ((4, 5, 7), torch.bfloat16)
        output.sum().backward()
        assert all(tensor.grad is not None and tensor.grad.dtype == tensor.dtype for tensor in inputs)


def test_adapted_layer_changes_none_of_its_inputs(weight: NF4Weight) -> None:
    inputs = adapter_inputs(4, dtype=torch.bfloat16, parameters=torch.float32)
    stored = [tensor for tensor in vars(weight).values() if isinstance(tensor, Tensor)]
    before = [tensor.detach().clone() for tensor in (*inputs, *stored)]
    grad = normal(4, 7, dtype=torch.bfloat16)
    output = fused(weight, 0.3)(*inputs)
    output.backward(grad, retain_graph=True)
    first = [tensor.grad.clone() for tensor in inputs if tensor.grad is not None]
    assert torch.equal(grad, normal(4, 7, dtype=torch.bfloat16))
    assert all(torch.equal(old, new) for old, new in zip(before, (*inputs, *stored), strict=True))
    for tensor in inputs:
        tensor.grad = None
    output.backward(grad)  # what was saved is as it was, too
    second = [tensor.grad for tensor in inputs if tensor.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# A workspace, and adapters cast by somebody else.


@pytest.mark.parametrize("rows", [1, 64, 130, 200, 500])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_workspace_of_any_size_gives_the_same_result(rows: int, dropout: float) -> None:
    """From one row of the weight at a time to more than all of it; in fp64, where blocks change only last bits."""
    weight = quantize_nf4(normal(200, 96) / 96**0.5)
    inputs = adapter_inputs(5, sizes=(200, 96, 3))
    roomy = replace(weight, workspace=torch.full((rows * 96,), torch.nan, dtype=torch.float64))
    expected = output_and_gradients(fused(weight, dropout), inputs)
    found = output_and_gradients(fused(roomy, dropout), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_dequantized_values_are_only_in_the_workspace(weight: NF4Weight) -> None:
    """No operation makes a tensor of the weight's size, forward or backward; the largest is x's."""
    inputs = adapter_inputs(2)
    workspace = torch.empty(weight.shape[0] * weight.shape[1], dtype=torch.float64)
    live = LiveBytes()
    live.watch([workspace], "workspace")
    with live:
        output_and_gradients(fused(replace(weight, workspace=workspace)), inputs)
    assert max(event.bytes for event in live.trace[1:]) < workspace.nbytes


def test_a_workspace_of_another_dtype_is_left_alone(weight: NF4Weight) -> None:
    workspace = torch.full((315,), 7.0, dtype=torch.bfloat16)
    inputs = adapter_inputs(5)
    found = output_and_gradients(fused(replace(weight, workspace=workspace)), inputs)
    for ours, theirs in zip(found, output_and_gradients(fused(weight), inputs), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(workspace, torch.full_like(workspace, 7.0))


def test_casts_made_beforehand_change_no_bit(weight: NF4Weight) -> None:
    inputs = adapter_inputs(5, dtype=torch.bfloat16, parameters=torch.float32)

    def with_casts(x: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        casts = A.detach().bfloat16(), B.detach().bfloat16()
        return nf4_linear(x, weight, bias, Adapter(A, B, SCALING, casts=casts))

    found, expected = (output_and_gradients(function, inputs) for function in (with_casts, fused(weight)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


# The end of a gated MLP: gate and up (..., I) in the place of x.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,  # has no name of its own
}


def gated_inputs(*lead: int, dtype: torch.dtype = torch.float64, parameters: torch.dtype | None = None) -> list[Tensor]:
    x, *others = adapter_inputs(*lead, dtype=dtype, parameters=parameters)
    return [x, normal(*lead, 45, seed=9, dtype=dtype).requires_grad_(), *others]


def gated(weight: NF4Weight, activation: str, dropout: float = 0.0) -> Callable[..., Tensor]:
    seed = SEED if dropout else None

    def function(gate: Tensor, up: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        adapter = Adapter(A, B, SCALING, dropout, seed)
        named = activation if activation in gated_space.ACTIVATIONS else ACTIVATIONS[activation]
        return gated_nf4_linear(gate, up, named, weight, bias, adapter)

    return function


def ungated(weight: NF4Weight, activation: str, dropout: float = 0.0) -> Callable[..., Tensor]:
    """The same with the product as autograd keeps it."""
    return lambda gate, up, *others: fused(weight, dropout)(ACTIVATIONS[activation](gate) * up, *others)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_making_the_gated_product_again_changes_no_bit(
    weight: NF4Weight, activation: str, dropout: float, dtype: torch.dtype
) -> None:
    inputs = gated_inputs(2, 3, dtype=dtype, parameters=None if dtype == torch.float64 else torch.float32)
    found = output_and_gradients(gated(weight, activation, dropout), inputs)  # type: ignore[arg-type]
    expected = output_and_gradients(ungated(weight, activation, dropout), inputs)  # type: ignore[arg-type]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_gated_gradients_are_those_of_finite_differences(weight: NF4Weight) -> None:
    assert torch.autograd.gradcheck(gated(weight, "silu", 0.3), gated_inputs(2))


def test_a_gated_layer_without_an_adapter_has_the_same_gradients(weight: NF4Weight) -> None:
    gate, up, *_ = gated_inputs(4)
    grad = normal(4, 7, seed=2, dtype=torch.float64)
    found = torch.autograd.grad(gated_nf4_linear(gate, up, "silu", weight, None), (gate, up), grad)
    expected = torch.autograd.grad(nf4_linear(F.silu(gate) * up, weight, None), (gate, up), grad)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_gate_up_and_a_rank_sized_product_are_all_that_a_gated_layer_saves(weight: NF4Weight) -> None:
    inputs = gated_inputs(4, 5)
    kept = saved_by(gated(weight, "silu", 0.3), inputs)  # type: ignore[arg-type]
    assert [tensor.shape for tensor in kept] == [(4, 5, 45), (4, 5, 45), (20, 3)]
    assert [tensor.data_ptr() for tensor in kept[:2]] == [tensor.data_ptr() for tensor in inputs[:2]]


def test_recomputation_stops_before_the_last_large_product(weight: NF4Weight, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two projections run forward; recomputed, only the first: backward needs nothing from the second's output."""
    inputs = gated_inputs(4)
    outputs = 0

    def counting(*arguments: Any, **settings: Any) -> Tensor:
        nonlocal outputs
        outputs += 1
        return original(*arguments, **settings)

    original = lora_linear.output_of
    for module in (lora_linear, gated_linear):
        monkeypatch.setattr(module, "output_of", counting)

    def block(gate: Tensor, up: Tensor, *others: Tensor) -> Tensor:
        first = F.pad(nf4_linear(gate, weight, None), (0, 38))
        return gated(weight, "silu")(first, up, *others)

    output = checkpoint(block, *inputs, use_reentrant=False)
    assert outputs == 2
    output.sum().backward()
    assert outputs == 3
    assert all(tensor.grad is not None for tensor in inputs)


@pytest.mark.parametrize(
    ("tokens", "is_training", "is_fused"), [(16, False, True), (17, False, False), (4, True, False)]
)
def test_few_tokens_without_gradients_take_the_operation_for_them(
    weight: NF4Weight, tokens: int, is_training: bool, is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which a GPU runs in one pass over the four bits; here it is the same product to the last bit."""
    monkeypatch.setenv("QLORA_KERNELS", "reference")

    x = normal(tokens, 45).requires_grad_(is_training)
    bias = normal(7, seed=5)
    with torch.set_grad_enabled(is_training), Operations() as seen:
        output = nf4_linear(x, weight, bias)
    assert ("qlora_kernels::nf4_matmul_few" in seen.names) == is_fused
    assert torch.equal(output, F.linear(x, dequantize_nf4(weight, x.dtype), bias))
