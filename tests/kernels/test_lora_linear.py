"""The frozen NF4 layer, alone and with its adapter: exact gradients, little kept, recomputation, a base that stays."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapted_layers import SCALING, Inputs, adapter_inputs, fused, mask_like, output_and_gradients, plain, saved_by
from random_tensors import normal
from spying import Operations, noting, unchanged
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlora_kernels.adapter import Adapter
from qlora_kernels.dropout import draw_seed
from qlora_kernels.lora_linear import add_lora, nf4_linear
from qlora_kernels.nf4 import NF4Weight, dequantize_nf4, quantize_nf4
from qlora_kernels.torch_internals import FakeTensorMode
from qlora_trainer.planning.live_bytes import LiveBytes


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
        casts = A.detach().bfloat16(), B.detach().bfloat16(), B.detach().bfloat16().T
        return nf4_linear(x, weight, bias, Adapter(A, B, SCALING, casts=casts))

    found, expected = (output_and_gradients(function, inputs) for function in (with_casts, fused(weight)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


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
