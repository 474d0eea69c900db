"""The output of a norm is made again in backward, bit for bit, by the layers over it: only the norm's input is kept."""

import weakref
from collections.abc import Callable

import pytest
import torch
from layers_together import I, layers, outputs_and_gradients, parameters_of
from random_tensors import normal
from spying import Operations, noting, unchanged
from torch import Tensor

from qlora_kernels.adapter import OutputScale
from qlora_kernels.lora_linear import nf4_linears
from qlora_kernels.made_again import making_of
from qlora_kernels.rms_norm import Form, rms_norm
from qlora_trainer.training.memory.recompute import Recomputation

FORMS: list[Form] = ["scale_after_cast", "scale_before_cast", "weight_before_cast"]
WEIGHT = normal(I, seed=50, dtype=torch.float64)


def normalized(x: Tensor, form: Form = "scale_after_cast") -> Tensor:
    return rms_norm(x, WEIGHT, 1e-5, form)


def with_its_output_kept(x: Tensor) -> Tensor:
    """A norm, of whose output nothing is known any more."""
    return normalized(x).view(x.shape)


def kept_by(function: Callable[[], object]) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(noting(unchanged, kept.append), unchanged):
        function()
    return kept


def activation(*lead: int) -> Tensor:
    """Not a leaf, as a residual is none."""
    return normal(*lead, I, dtype=torch.float64).requires_grad_().mul(0.5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_a_kept_output_to_the_last_bit(form: Form, dropout: float) -> None:
    projections = layers(dropouts=(dropout, 0.0, 0.0))
    x = normal(2, 3, I, dtype=torch.float64).requires_grad_()
    found = outputs_and_gradients(lambda x, p: nf4_linears(normalized(x, form), p), x, projections)
    kept = outputs_and_gradients(lambda x, p: nf4_linears(normalized(x, form).view(x.shape), p), x, projections)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, kept, strict=True))


@pytest.mark.parametrize("kind", ["output kept", "output made again", "input"])
def test_so_are_those_of_trained_scales(kind: str) -> None:
    (projection, *_) = layers(biased="")
    sizes = projection.weight.shape[0], I
    outputs, inputs = (normal(size, seed=60, dtype=torch.float64).requires_grad_() for size in sizes)
    scaled = (
        projection._replace(input_scale=inputs)
        if kind == "input"
        else projection._replace(output_scale=OutputScale(outputs, keeps_output=kind == "output kept"))
    )
    x = normal(2, 3, I, dtype=torch.float64).requires_grad_()
    trained = [x, inputs if kind == "input" else outputs, *parameters_of([projection])]
    found = []
    for normalize in (normalized, with_its_output_kept):
        (output,) = nf4_linears(normalize(x), [scaled])
        found.append(torch.autograd.grad(output.square().sum(), trained))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_norm_and_the_layers_keep_one_tensor() -> None:
    x, projections = activation(2, 3), layers()
    sizes = {}
    for normalize in (normalized, with_its_output_kept):
        kept = kept_by(lambda normalize=normalize: nf4_linears(normalize(x), projections))  # type: ignore[misc]
        wide = [tensor for tensor in kept if tensor.shape == x.shape]
        sizes[normalize] = len({tensor.data_ptr() for tensor in wide}), len(wide)
        assert x.data_ptr() in {tensor.data_ptr() for tensor in wide}
    assert sizes == {normalized: (1, 2), with_its_output_kept: (2, 2)}


def test_backward_makes_the_output_once_for_all_layers_and_only_for_gradients_of_A() -> None:
    for trains_A in (True, False):
        projections = layers()
        for projection in projections:
            assert projection.adapter is not None
            projection.adapter.lora_A.requires_grad_(trains_A)
        with Operations() as seen:
            outputs = nf4_linears(normalized(activation(2, 3)), projections)
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        assert seen.names.count("qlora_kernels::rms_norm") == 1 + trains_A


def test_a_graph_that_is_used_twice_makes_it_twice() -> None:
    x, projections = activation(3), layers()
    loss = torch.cat(nf4_linears(normalized(x), projections), dim=-1).square().sum()
    wanted = [x, *parameters_of(projections)]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    assert all(torch.equal(one, other) for one, other in zip(first, torch.autograd.grad(loss, wanted), strict=True))


def test_an_input_of_the_norm_that_is_written_to_is_refused_in_backward() -> None:
    """By the layers themselves: their backward comes before the norm's."""
    x, projections = activation(3), layers()
    outputs = nf4_linears(normalized(x), projections)
    x.detach().add_(1.0)
    adapter = projections[0].adapter
    assert adapter is not None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outputs[0].sum(), adapter.lora_A)


def test_an_output_that_was_written_to_is_kept_itself() -> None:
    x, projections = activation(3), layers()

    def scaled(x: Tensor) -> Tensor:
        output = normalized(x)
        output.mul_(2.0)
        return output

    found = outputs_and_gradients(lambda x, p: nf4_linears(scaled(x), p), x, projections)
    expected = outputs_and_gradients(lambda x, p: nf4_linears(normalized(x) * 2.0, p), x, projections)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_an_input_without_a_gradient_is_not_kept_in_the_place_of_the_output() -> None:
    """Above a frozen embedding the norm keeps nothing, so the layers' tensor is the only one."""
    x, projections = normal(3, I, dtype=torch.float64), layers()
    kept = kept_by(lambda: nf4_linears(normalized(x), projections))
    assert [tensor.shape for tensor in kept].count(x.shape) == 1
    assert x.data_ptr() not in {tensor.data_ptr() for tensor in kept}
    with torch.no_grad():
        assert making_of(normalized(activation(3))) is None


def test_a_layer_that_is_run_again_makes_no_output_a_third_time() -> None:
    projections = layers()

    def run(x: Tensor) -> Tensor:
        return torch.cat(nf4_linears(normalized(x), projections), dim=-1)

    found = []
    for is_recomputed, times in ((True, 2), (False, 2)):
        x = normal(3, I, dtype=torch.float64).requires_grad_()
        with Operations() as seen:
            output = Recomputation(run, x).run(x) if is_recomputed else run(x)
            found.append(torch.autograd.grad(output.square().sum(), [x, *parameters_of(projections)]))
        assert seen.names.count("qlora_kernels::rms_norm") == times
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_norm_outside_of_a_layer_that_is_run_again_is_kept_as_it_is() -> None:
    """The layer's input is the norm's output, and in backward it is another tensor of the same values."""
    projections = layers()
    x = normal(3, I, dtype=torch.float64).requires_grad_()

    def run(x: Tensor) -> Tensor:
        return torch.cat(nf4_linears(x, projections), dim=-1)

    between = normalized(x)
    output = Recomputation(run, between).run(between)
    found = torch.autograd.grad(output.square().sum(), [x, *parameters_of(projections)])
    plain = torch.autograd.grad(run(normalized(x)).square().sum(), [x, *parameters_of(projections)])
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


def test_the_norms_input_is_let_go_of_with_the_graph() -> None:
    projections, x = layers(), activation(3)
    gone = weakref.ref(x)
    output = normalized(x)
    outputs = nf4_linears(output, projections)
    del x, output
    assert gone() is not None
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    assert gone() is None
