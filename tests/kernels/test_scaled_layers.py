"""Layers whose output or input a trained vector scales: exact gradients, with the output kept or computed again."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from adapted_layers import SCALING
from layers_together import I, added_gradients, apart, assert_same, in_one_matrix, layers, outputs_and_gradients
from random_tensors import normal
from scaled_layers import Layer, Tensors, assert_close, results
from spying import Operations
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlora_kernels import scale_gradients
from qlora_kernels.adapter import OutputScale, Projection
from qlora_kernels.lora_linear import add_lora, nf4_linear, nf4_linears
from qlora_kernels.nf4 import NF4Weight, dequantize_nf4, quantize_nf4
from qlora_kernels.scale_gradients import scaled, summed_products
from qlora_trainer.training.memory.recompute import Recomputation

LAYERS = [
    Layer(f"{bias} {adapter} {scales}", dropout, keeps, is_gated)
    for scales in ("c", "l", "c l")
    for adapter, dropout in (("", 0.0), ("A B", 0.0), ("A B", 0.3))
    for bias in ("", "bias")
    for keeps in ((False, True) if "c" in scales else (False,))
    for is_gated in (False, True)
]


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_scaled_layer_is_the_plain_formula(weight: NF4Weight, layer: Layer, lead: tuple[int, ...]) -> None:
    given = layer.tensors(*lead)
    assert_close(results(layer.fused(weight), given), results(layer.plain(weight), given))


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("is_gated", [False, True])
def test_gradients_are_those_of_finite_differences(weight: NF4Weight, keeps: bool, is_gated: bool) -> None:
    layer = Layer("bias A B c l", 0.3, keeps, is_gated)
    given = layer.tensors(2)

    def function(*tensors: Tensor) -> Tensor:
        return layer.fused(weight)(dict(zip(given, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(given.values()))


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("is_gated", [False, True])
def test_only_the_gradients_asked_for_are_made(weight: NF4Weight, keeps: bool, is_gated: bool) -> None:
    """Of each set of the inputs and parameters; the others are frozen, a scale too."""
    layer = Layer("bias A B c l", 0.0, keeps, is_gated)
    names = list(layer.tensors(4))
    for count in range(len(names) + 1):
        for trained in itertools.combinations(names, count):
            given = layer.tensors(4, trained=trained)
            assert_close(results(layer.fused(weight), given), results(layer.plain(weight), given))


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("rows", [1, 64, 130, 200, 500])
def test_a_workspace_of_any_size_gives_the_same_result(rows: int, keeps: bool) -> None:
    weight = quantize_nf4(normal(200, 96) / 96**0.5)
    roomy = replace(weight, workspace=torch.full((rows * 96,), torch.nan, dtype=torch.float64))
    for layer in (Layer("bias A B c l", 0.3, keeps), Layer("A B c", 0.0, keeps)):
        given = layer.tensors(5, sizes=(200, 96, 3))
        assert_close(results(layer.fused(roomy), given), results(layer.plain(weight), given))


@pytest.mark.parametrize("trained", [("x", "A", "B", "c"), ("c",)])
def test_backward_dequantizes_each_block_once(trained: Sequence[str]) -> None:
    """For the output that is computed again and for the input's gradient; where the output is kept, for the latter."""
    weight = quantize_nf4(normal(200, 96))
    weight = replace(weight, workspace=torch.empty(70 * 96, dtype=torch.float64))
    for keeps, blocks in ((False, 4), (True, 4 if "x" in trained else 0)):  # of 64 rows
        layer = Layer("A B c", 0.0, keeps)
        given = layer.tensors(5, sizes=(200, 96, 3), trained=trained)
        output = layer.fused(weight)(given)
        with Operations() as seen:
            output.sum().backward()
        assert seen.names.count("qlora_kernels::dequantize_nf4") == blocks


@pytest.mark.parametrize("layer", [Layer("A B c"), Layer("A B c", 0.0, True), Layer("A B c l", 0.3)], ids=str)
def test_what_is_saved_is_as_it_was_after_backward(weight: NF4Weight, layer: Layer) -> None:
    given = layer.tensors(4)
    output, grad = layer.fused(weight)(given), normal(4, 7, dtype=torch.float64)
    before = [tensor.detach().clone() for tensor in given.values()]
    first = torch.autograd.grad(output, list(given.values()), grad, retain_graph=True)
    second = torch.autograd.grad(output, list(given.values()), grad)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(before, given.values(), strict=True))
    assert torch.equal(grad, normal(4, 7, dtype=torch.float64))


@pytest.mark.parametrize("keeps", [False, True])
def test_a_model_may_add_into_a_scaled_output(weight: NF4Weight, keeps: bool) -> None:
    layer = Layer("A B c", 0.0, keeps)

    def added(given: Tensors) -> Tensor:
        output = layer.fused(weight)(given)
        output += 1.0
        return output.square()

    given = layer.tensors(2, 3)
    assert_close(results(added, given), results(lambda given: (layer.plain(weight)(given) + 1.0).square(), given))


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_a_scaled_layer_changes_no_bit(
    weight: NF4Weight, keeps: bool, is_gated: bool, dtype: torch.dtype
) -> None:
    """By torch's checkpointing and by ours, with a scale that is computed inside from what trains."""
    layer = Layer("bias A B c l", 0.3, keeps, is_gated)
    first = "gate" if is_gated else "x"

    def block(given: Tensors) -> Tensor:
        inner = {**given, first: given[first].sin(), "c": given["c"] / given["c"].detach().exp()}
        return layer.fused(weight)(inner)

    def ours(given: Tensors) -> Tensor:
        return Recomputation(lambda x: block({**given, first: x}), given[first]).run(given[first])

    given = layer.tensors(4, dtype=dtype, parameters=torch.float32)
    expected = results(block, given)
    for again in (ours, lambda given: checkpoint(block, given, use_reentrant=False)):
        found = results(again, given)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize(("kernels", "most"), [("reference", 1.1), ("auto", 3.0)])
def test_a_scaled_layer_errs_no_more_than_the_plain_formula(
    dtype: torch.dtype, keeps: bool, kernels: str, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root mean square errors against fp64 with the same weight and inputs; fp32 adapters, as in training.

    Where an output is computed again, its scale's gradient is a sum in another order: over tokens, then over ranks.
    """
    monkeypatch.setenv("QLORA_KERNELS", kernels)
    weight = quantize_nf4(normal(200, 320) / 320**0.5)
    layer = Layer("bias A B c l", 0.3, keeps)
    given = layer.tensors(300, dtype=dtype, parameters=torch.float32, sizes=(200, 320, 16))
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}
    dense = dequantize_nf4(weight, dtype).double()  # what this dtype multiplies; fp64 must multiply the same
    truths = results(layer.plain(weight, dense), exact)
    found, expected = results(layer.fused(weight), given), results(layer.plain(weight), given)
    for name, ours, theirs, truth in zip(("y", *given), found, expected, truths, strict=True):
        assert ours.dtype == (dtype if name in "yx" else torch.float32)
        error, allowed = ((value.double() - truth).pow(2).mean().sqrt() for value in (ours, theirs))
        factor = max(most, 2.0) if name == "c" and not keeps else most
        assert error <= factor * allowed, f"{name}: {float(error / allowed):.2f} times the plain formula's error"


def test_a_scale_of_more_bits_than_the_output_is_not_rounded_first() -> None:
    """In bf16 1 + 2^-9 is 1, and what a scale has learned by then would be lost."""
    y, c = normal(6, 50, dtype=torch.bfloat16), 1.0 + normal(50) * 2.0**-9
    assert torch.equal(scaled(y, c), (y.float() * c).bfloat16())
    assert not torch.equal(scaled(y, c), y * c.bfloat16())
    same = y.clone()
    assert scaled(same, c, same) is same
    assert torch.equal(same, scaled(y, c))


@pytest.mark.parametrize("at_once", [1, 7, 30, 1 << 22])
def test_sums_over_tokens_are_fp32(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of ones in bf16 stays at 256; products are not rounded either."""
    monkeypatch.setattr(scale_gradients, "SUMMED_AT_ONCE", at_once)
    ones = torch.ones(5000, 3, dtype=torch.bfloat16)
    assert torch.equal(summed_products(ones, ones), torch.full((3,), 5000.0))
    one, other = (normal(10, 7, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    torch.testing.assert_close(summed_products(one, other), (one.float() * other.float()).sum(0))
    assert summed_products(one.double(), other.double()).dtype == torch.float64
    assert torch.equal(summed_products(ones[:0], ones[:0]), torch.zeros(3))


@pytest.mark.parametrize("tokens", [4, 17])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_without_gradients_scales_are_taken_too(weight: NF4Weight, layer: Layer, tokens: int) -> None:
    given = layer.tensors(tokens)
    with torch.no_grad(), Operations() as seen:
        output = layer.fused(weight)(given)
    assert not output.requires_grad
    assert ("qlora_kernels::nf4_matmul_few" in seen.names) == (tokens <= 16)
    assert_close([output], [layer.plain(weight)(given).detach()])


# Layers over one input, each with its own scale or none.


def scaled_layers(keeps: Sequence[bool | None], **options: object) -> list[Projection]:
    """q, k and v with a scale of their output, which is kept or not; None: no scale."""
    found = []
    for place, (projection, is_kept) in enumerate(zip(layers(**options), keeps, strict=True)):  # type: ignore[arg-type]
        values = normal(projection.weight.shape[0], seed=60 + place, dtype=torch.float64).requires_grad_()
        found.append(projection._replace(output_scale=None if is_kept is None else OutputScale(values, is_kept)))
    return found


def scales_of(projections: Sequence[Projection]) -> list[Tensor]:
    return [p.output_scale.values for p in projections if p.output_scale is not None]


def formulas(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    found = []
    for weight, bias, adapter, scale, _ in projections:
        y = torch.nn.functional.linear(x, dequantize_nf4(weight, x.dtype))
        if adapter is not None:
            y = add_lora(y, x, adapter.lora_A, adapter.lora_B, SCALING)
        y = y if scale is None else y * scale.values
        found.append(y if bias is None else y + bias)
    return tuple(found)


KEEPS = [(False, False, False), (True, True, True), (True, None, False), (None, True, None), (None, False, True)]


@pytest.mark.parametrize("keeps", KEEPS)
@pytest.mark.parametrize("adapted", ["qkv", "qv", ""])
def test_each_layer_over_one_input_has_its_own_scale(keeps: Sequence[bool | None], adapted: str) -> None:
    x = normal(2, 3, I, dtype=torch.float64).requires_grad_()
    projections = scaled_layers(keeps, adapted=adapted, biased="qv")
    found, expected = ([], [])  # type: ignore[var-annotated]
    for function, into in ((nf4_linears, found), (formulas, expected)):
        outputs = function(x, projections)
        grads = [normal(*output.shape, seed=40 + place, dtype=x.dtype) for place, output in enumerate(outputs)]
        biases = [p.bias for p in projections if p.bias is not None]
        adapters = [t for p in projections if p.adapter is not None for t in (p.adapter.lora_A, p.adapter.lora_B)]
        wanted = [x, *biases, *adapters, *scales_of(projections)]
        into += [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, wanted, grads)]
    assert_same(found, expected)


@pytest.mark.parametrize("keeps", KEEPS)
def test_adapters_in_one_matrix_may_be_on_scaled_layers(keeps: Sequence[bool | None]) -> None:
    x = normal(2, 3, I, dtype=torch.float64).requires_grad_()
    projections = scaled_layers(keeps, biased="")
    stacked = in_one_matrix(projections)
    outputs = nf4_linears(x, stacked)
    grads = [normal(*output.shape, seed=40 + place, dtype=x.dtype) for place, output in enumerate(outputs)]
    grad_x, *of_scales = torch.autograd.grad(outputs, [x, *scales_of(stacked)], grads)
    alone = outputs_and_gradients(apart, x, projections)
    assert_same([*(output.detach() for output in outputs), grad_x, *added_gradients(stacked)], alone)
    expected = torch.autograd.grad(formulas(x, projections), scales_of(projections), grads)
    assert_same(of_scales, expected)


def test_a_layer_next_to_a_scaled_one_has_the_bits_it_has_alone() -> None:
    x = normal(4, I).requires_grad_()
    plain, scaled = layers()[0], scaled_layers([None, True, False])[1]
    outputs = nf4_linears(x, [plain, scaled])
    alone = nf4_linear(x, *plain)
    assert torch.equal(outputs[0], alone)
    wanted = [x, plain.bias, plain.adapter.lora_A, plain.adapter.lora_B]  # type: ignore[union-attr]
    grads = [torch.autograd.grad(output, wanted, normal(4, 22)) for output in (outputs[0], alone)]  # type: ignore[arg-type]
    for ours, theirs in zip(grads[0][1:], grads[1][1:], strict=True):
        assert torch.equal(ours, theirs)


def test_layers_over_one_input_have_no_scale_of_it() -> None:
    projections = layers()
    projections[1] = projections[1]._replace(input_scale=torch.ones(I))
    with pytest.raises(AssertionError, match="one scaled input"):
        nf4_linears(normal(4, I), projections)
