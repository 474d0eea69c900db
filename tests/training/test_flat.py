"""Flat groups: views that hold through backward and steps, and one norm over all of them."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from qlora_trainer.adapters.inject import add_adapters, lora_layers
from qlora_trainer.config.schema import AdapterConfig, OptimizerConfig
from qlora_trainer.training.flat import (
    ALIGNMENT,
    FlatGroup,
    PreparedAdapters,
    clip_,
    flatten_parameters,
    grad_norm,
    group_trainable,
)


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.lora_A": (3, 5), "a.lora_B": (7, 3), "b.bias": (1,), "c.lora_A": (2, 64)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def loss_of(named: dict[str, nn.Parameter]) -> Tensor:
    terms = [(weight**2 * (index + 1)).sum() for index, weight in enumerate(named.values())]
    return torch.stack(terms).sum()


def flatten(named: dict[str, nn.Parameter]) -> FlatGroup:
    return flatten_parameters(named.items(), name="decay", weight_decay=0.1)


def test_flattening_keeps_values_identity_and_order() -> None:
    named, before = parameters(), parameters()
    group = flatten(named)
    assert list(group.slices) == list(named)
    for name, parameter in named.items():
        assert group.parameters[name] is parameter
        assert torch.equal(parameter, before[name])
        assert torch.equal(group.data.detach()[group.slices[name]].view(parameter.shape), before[name])
    assert group.layout()[2] == {"name": "b.bias", "shape": [1]}
    group.check_views()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_aligned_and_do_not_overlap(dtype: torch.dtype) -> None:
    named = {name: nn.Parameter(parameter.detach().to(dtype)) for name, parameter in parameters().items()}
    slices = list(flatten(named).slices.values())
    assert all(piece.start * dtype.itemsize % ALIGNMENT == 0 for piece in slices)
    assert all(left.stop <= right.start for left, right in itertools.pairwise(slices))


def test_backward_fills_the_flat_gradient_through_views() -> None:
    named = parameters()
    group = flatten(named)
    plain = parameters()
    for _ in range(2):  # two micro-batches accumulate
        loss_of(named).backward()
        loss_of(plain).backward()
    group.check_views()
    for name, parameter in plain.items():
        assert parameter.grad is not None
        assert torch.equal(group.grad[group.slices[name]].view(parameter.shape), parameter.grad)
    inside = torch.zeros(len(group.grad), dtype=torch.bool)
    for piece in group.slices.values():
        inside[piece] = True
    assert not group.grad[~inside].any(), "padding must keep a zero gradient"
    group.zero_grad()
    group.check_views()
    assert not group.grad.any()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in named.values())


def test_gradients_stay_views_with_recomputation() -> None:
    from torch.utils.checkpoint import checkpoint

    weight = nn.Parameter(torch.eye(4))
    group = flatten_parameters([("weight", weight)], name="decay", weight_decay=0.0)
    hidden = torch.ones(2, 4)
    checkpoint(lambda x: x @ weight, hidden, use_reentrant=False).sum().backward()
    group.check_views()
    assert torch.equal(group.grad.view(4, 4), torch.full((4, 4), 2.0))


@pytest.mark.parametrize("how", ["data", "grad", "none"])
def test_a_detached_parameter_is_noticed(how: str) -> None:
    named = parameters()
    group = flatten(named)
    parameter = named["a.lora_B"]
    if how == "data":
        parameter.data = parameter.data.clone()
    elif how == "grad":
        parameter.grad = torch.zeros_like(parameter)
    else:
        parameter.grad = None
    with pytest.raises(AssertionError, match=r"a\.lora_B"):
        group.check_views()


def test_norm_and_clipping_equal_torch_over_the_plain_parameters() -> None:
    named, plain = parameters(), parameters()
    items = list(named.items())
    groups = [
        flatten_parameters(items[:2], name="one", weight_decay=0.0),
        flatten_parameters(items[2:], name="two", weight_decay=0.0),
    ]
    loss_of(named).backward()
    loss_of(plain).backward()
    expected = torch.nn.utils.clip_grad_norm_(list(plain.values()), 1.0)
    norm = grad_norm(groups)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0.0)
    clip_(groups, 1.0, norm)
    for name, parameter in plain.items():
        torch.testing.assert_close(named[name].grad, parameter.grad, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(grad_norm(groups), torch.tensor(1.0), rtol=1e-5, atol=0.0)


def test_the_norm_of_16_bit_gradients_is_summed_in_fp32() -> None:
    group = flatten({"a": nn.Parameter(torch.zeros(300, 300, dtype=torch.bfloat16))})
    assert group.grad.dtype == group.data.dtype == torch.bfloat16
    group.grad.copy_(torch.randn(90_000, generator=torch.Generator().manual_seed(0)))
    norm = grad_norm([group])
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm, group.grad.double().norm().float(), rtol=1e-5, atol=0.0)


def test_one_group_holds_one_dtype() -> None:
    named = {"a": nn.Parameter(torch.zeros(4)), "b": nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))}
    with pytest.raises(AssertionError, match=r"b is torch\.bfloat16, the others torch\.float32"):
        flatten(named)


def test_small_gradients_are_not_scaled_up() -> None:
    named = parameters()
    group = flatten(named)
    loss_of(named).backward()
    before = group.grad.clone()
    clip_([group], 1e9, grad_norm([group]))
    assert torch.equal(group.grad, before)


def test_one_bad_gradient_makes_the_norm_non_finite() -> None:
    for bad in (float("nan"), float("inf")):
        named = parameters()
        group = flatten(named)
        named["b.bias"].grad.fill_(bad)  # type: ignore[union-attr]
        assert not torch.isfinite(grad_norm([group]))


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 5))


def test_what_trains_is_grouped_by_decay_and_rate() -> None:
    model = two_layers()
    add_adapters(model, AdapterConfig(rank=2, bias="all"))
    groups = group_trainable(model, OptimizerConfig(weight_decay=0.1), workers=2)
    assert [(group.name, group.weight_decay, group.rate_factor) for group in groups] == [
        ("lora", 0.1, 1.0),
        ("bias", 0.0, 1.0),
    ]
    assert [len(group.grads) for group in groups] == [2, 2]
    prefix = "base_model.model."
    assert list(groups[1].parameters) == [f"{prefix}{p}" for p in ("0.base_layer.bias", "1.bias", "2.base_layer.bias")]


def test_lora_plus_gives_lora_b_a_rate_of_its_own() -> None:
    model = two_layers()
    add_adapters(model, AdapterConfig(rank=2, dtype="bfloat16", bias="lora_only"))
    groups = group_trainable(model, OptimizerConfig(lora_plus_ratio=16.0, weight_decay=0.1))
    assert {group.name: (group.rate_factor, group.weight_decay, group.data.dtype) for group in groups} == {
        "lora_A": (1.0, 0.1, torch.bfloat16),
        "lora_B": (16.0, 0.1, torch.bfloat16),
        "bias": (1.0, 0.0, torch.float32),
    }
    assert all(name.endswith(f"{group.name}.weight") for group in groups[:2] for name in group.parameters)


def test_the_casts_of_a_step_are_there_for_both_groups_of_lora_plus() -> None:
    """In bf16, as on a card: A and B are cast as one buffer each, and the layer takes both."""
    model = two_layers()
    add_adapters(model, AdapterConfig(rank=2))
    groups = group_trainable(model, OptimizerConfig(lora_plus_ratio=16.0))
    adapted = list(lora_layers(model).values())
    prepared = PreparedAdapters(adapted, groups, torch.bfloat16)
    assert [cast.dtype for cast in prepared.casts] == [torch.bfloat16] * 2
    with prepared.for_a_step():
        for layer in adapted:
            casts = layer.adapter().casts
            assert casts is not None
            assert torch.equal(casts[0], layer.lora_A.weight.bfloat16())
            assert torch.equal(casts[1], layer.lora_B.weight.bfloat16())
