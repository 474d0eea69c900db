"""What a layer with scales saves for backward, and what is alive in it: an output kept, or nothing of its size."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from random_tensors import normal
from scaled_layers import Layer, Tensors
from spying import Operations, noting, unchanged
from torch import Tensor

from qlora_kernels import scale_gradients
from qlora_kernels.adapter import OutputScale, Projection
from qlora_kernels.lora_linear import nf4_linears
from qlora_kernels.nf4 import NF4Weight, quantize_nf4
from qlora_kernels.torch_internals import FakeTensorMode
from qlora_trainer.planning.live_bytes import LiveBytes
from qlora_trainer.training.memory.recompute import Recomputation


def saved(layer: Layer, weight: NF4Weight, given: Tensors) -> list[Tensor]:
    """What autograd saves for backward; asserts that the node itself holds no activation."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(noting(unchanged, kept.append), unchanged):
        output = layer.fused(weight)(given)
    assert output.grad_fn is not None
    assert not any(isinstance(value, Tensor) for value in vars(output.grad_fn).values())
    return kept


X, LOW, OUTPUT = (4, 5, 45), (20, 3), (20, 7)


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (Layer("bias A B c"), [X, LOW]),
        (Layer("bias A B c", 0.3), [X, LOW]),
        (Layer("bias A B c l"), [X, LOW]),
        (Layer("bias A B c", 0.0, True), [X, LOW, OUTPUT]),
        (Layer("bias A B c l", 0.3, True), [X, LOW, OUTPUT]),
        (Layer("c"), [X]),
        (Layer("c", 0.0, True), [OUTPUT]),
        (Layer("l"), [X]),
        (Layer("c", 0.0, False, True), [X, X]),
        (Layer("l", 0.0, False, True), [X, X]),
        (Layer("A B c l", 0.3, False, True), [X, X, LOW]),
        (Layer("A B c l", 0.3, True, True), [X, X, LOW, OUTPUT]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_is_saved_only_where_it_is_to_be_kept(
    weight: NF4Weight, layer: Layer, shapes: Sequence[Any], dtype: torch.dtype
) -> None:
    given = layer.tensors(4, 5, dtype=dtype, parameters=torch.float32)
    kept = saved(layer, weight, given)
    assert [tensor.shape for tensor in kept] == shapes
    assert {tensor.dtype for tensor in kept} == {dtype}
    inputs = {given[name].data_ptr() for name in ("x", "gate", "up") if name in given}
    assert {tensor.data_ptr() for tensor in kept if tensor.shape == X} <= inputs


@pytest.mark.parametrize("names", ["A B c", "A B c l", "A B l"])
def test_a_frozen_scale_saves_nothing(weight: NF4Weight, names: str) -> None:
    layer = Layer(names)
    given = layer.tensors(4, 5, trained=["x", "B"])
    assert [tensor.shape for tensor in saved(layer, weight, given)] == [LOW]
    given = layer.tensors(4, 5, trained=["x"])
    assert saved(layer, weight, given) == []


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("keeps", [False, True])
def test_recomputation_makes_the_last_product_again_only_for_an_output_that_is_kept(
    weight: NF4Weight, keeps: bool, is_gated: bool
) -> None:
    """Once in forward, once in backward either way: where recomputation ends, or next to the input's gradient."""
    layer = Layer("A B c", 0.0, keeps, is_gated)
    given, first = layer.tensors(4), "gate" if is_gated else "x"

    def run(x: Tensor) -> Tensor:
        return layer.fused(weight)({**given, first: x})

    output = Recomputation(run, given[first]).run(given[first])
    with Operations() as seen:
        output.sum().backward()
    # By A where it is recomputed, and by W.
    assert seen.names.count("qlora_kernels::linear") == 2
    assert seen.names.count("qlora_kernels::dequantize_nf4") == (2 if keeps else 1)
    assert seen.names.count("aten::addmm_") == (2 if keeps else 1), "by B where the output is made, by A for the input"


TOKENS, IN, OUT = 256, 64, 96


def peak(keeps: bool | None, layers: int, is_fake: bool = False) -> int:
    """Bytes alive at the fullest moment of backward beyond those alive at its start; keeps=None: without scales."""
    weight = replace(quantize_nf4(normal(OUT, IN)), workspace=torch.empty(OUT * IN))

    def run() -> int:
        x = torch.ones(TOKENS, IN).requires_grad_()
        fields: Any = {
            name: torch.empty_like(value) for name, value in vars(weight).items() if isinstance(value, Tensor)
        }
        ours = replace(weight, **fields)
        scales = [torch.ones(OUT).requires_grad_() for _ in range(layers)]
        projections = []
        for values in scales:
            scale = None if keeps is None else OutputScale(values, keeps)
            projections.append(Projection(ours, None, None, scale))
        outputs = nf4_linears(x, projections)
        grads = [torch.ones(TOKENS, OUT) for _ in outputs]
        before = [*fields.values(), *scales, *grads, *outputs, x]
        with LiveBytes() as live:
            live.watch(before, "before")
            torch.autograd.backward(outputs, grads)
        return live.peak.bytes - sum(tensor.nbytes for tensor in before)

    if not is_fake:
        return run()
    with FakeTensorMode(allow_non_fake_inputs=True):
        return run()


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("keeps", [False, True])
def test_backward_needs_one_tensor_of_an_outputs_size_more(
    layers: int, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one layer after another: the output as it was before its scale, and in its memory the gradient of that."""
    monkeypatch.setattr(scale_gradients, "SUMMED_AT_ONCE", 16 * OUT)
    one_output, block, vectors = TOKENS * OUT * 4, 16 * OUT * 4, 4 * OUT * (layers + 2)
    assert peak(keeps, layers) <= peak(None, layers) + one_output + block + vectors


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("keeps", [False, True])
def test_a_plan_counts_what_a_scaled_layer_takes(keeps: bool, layers: int) -> None:
    assert peak(keeps, layers, is_fake=True) == peak(keeps, layers)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("is_gated", [False, True])
def test_a_scaled_layer_runs_on_fake_tensors(weight: NF4Weight, keeps: bool, is_gated: bool) -> None:
    layer = Layer("bias A B c l", 0.0, keeps, is_gated)
    real = layer.tensors(4, 5, dtype=torch.bfloat16, parameters=torch.float32)
    with FakeTensorMode():
        fields: Any = {
            name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            for name, value in vars(weight).items()
            if isinstance(value, Tensor)
        }
        given = {name: torch.empty(t.shape, dtype=t.dtype, requires_grad=True) for name, t in real.items()}
        output, *gradients = results_of_fake(layer, replace(weight, **fields), given)
    assert (output.shape, output.dtype) == ((4, 5, 7), torch.bfloat16)
    for gradient, tensor in zip(gradients, given.values(), strict=True):
        assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)


def results_of_fake(layer: Layer, weight: NF4Weight, given: Tensors) -> list[Tensor]:
    output = layer.fused(weight)(given)
    return [output.detach(), *torch.autograd.grad(output.sum(), list(given.values()))]
