"""What a step prepares changes no gradient: casts, A's of layers over one input as one, gradients added in place."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from marks import slow_but
from spying import Operations
from torch import Tensor

from qlora_trainer.adapters.layers import LoRALinear
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.batching.packing import Pack
from qlora_trainer.runs.start import start_run
from qlora_trainer.training.flat import PreparedAdapters
from qlora_trainer.training.state import TrainState
from qlora_trainer.training.step import accumulate_gradients

Config = Callable[..., RunConfig]


@contextmanager
def nothing_prepared(*_: object) -> Iterator[None]:
    yield


def gradient(state: TrainState, packs: list[Pack]) -> Tensor:
    torch.manual_seed(3)  # of dropout
    accumulate_gradients(state, packs)
    return torch.cat([group.grad for group in state.groups]).float()


def state_of(config: RunConfig) -> tuple[TrainState, list[Pack]]:
    """A run before its first step, whose B's are not zero, and two micro-batches."""
    run = start_run(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in run.state.adapted:
            layer.lora_B.weight.copy_(torch.randn(layer.lora_B.weight.shape, generator=generator) / 10)
    run.state.model.train()
    return run.state, run.state.loader.next() + run.state.loader.next()


@pytest.mark.parametrize(
    ("adapter", "compute_dtype", "tolerance"),
    [
        ({}, "float32", 1e-5),
        ({"target_modules": ["q_proj", "v_proj", "gate_proj"], "bias": "all"}, "float32", 1e-5),
        ({"dropout": 0.3}, "float32", 1e-5),
        ({}, "bfloat16", 0.02),
        ({"dtype": "bfloat16"}, "bfloat16", 0.02),
    ],
    ids=["all", "some, and biases", "dropout", "16 bits", "16-bit adapters"],
)
@pytest.mark.parametrize("policy", slow_but(["none", "full", "tiled"], "full"))
def test_the_gradient_is_that_of_autograd(
    policy: str,
    adapter: dict[str, Any],
    compute_dtype: str,
    tolerance: float,
    tiny_config: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config(
        adapter={"rank": 4, "alpha": 8, **adapter},
        model={"compute_dtype": compute_dtype, "device": "cpu", "name": tiny_config().model.name},
        training={"activation_checkpointing": policy},
    )
    state, packs = state_of(config)
    prepared = [gradient(state, packs)]
    with torch.no_grad():
        state.groups[0].data.mul_(2.0)  # as by a step of the optimizer
    prepared.append(gradient(state, packs))
    monkeypatch.setattr(PreparedAdapters, "for_a_step", nothing_prepared)
    expected = [gradient(state, packs)]
    with torch.no_grad():
        state.groups[0].data.div_(2.0)
    expected.insert(0, gradient(state, packs))
    for found, wanted in zip(prepared, expected, strict=True):
        assert wanted.norm() > 0
        assert (found - wanted).norm() <= tolerance * wanted.norm()


def stacks_in(state: TrainState) -> list[list[LoRALinear]]:
    """Layers by the matrix that holds their A's."""
    found: dict[int, list[LoRALinear]] = {}
    with state.prepared.for_a_step():
        for layer in state.adapted:
            stacked = layer.adapter().stacked
            if stacked is not None:
                found.setdefault(id(stacked), []).append(layer)
                cast = torch.cat([one.lora_A.weight for one in found[id(stacked)]]).to(stacked.A.dtype)
                assert torch.equal(stacked.A[: len(cast)], cast)
    return list(found.values())


def test_the_as_of_layers_over_one_input_are_one_matrix_without_a_copy(tiny_config: Config) -> None:
    state, _ = state_of(tiny_config())
    found = stacks_in(state)
    assert [len(layers) for layers in found] == [3, 2] * 2, "q, k and v; gate and up"
    for layers in found:
        with state.prepared.for_a_step():
            stacked = layers[0].adapter().stacked
            assert stacked is not None
            assert stacked.grad.data_ptr() == layers[0].lora_A.weight.grad.data_ptr()  # type: ignore[union-attr]
            assert stacked.grad.numel() == sum(layer.lora_A.weight.numel() for layer in layers)


def test_adapters_that_are_scaled_apart_are_not_stacked(tiny_config: Config) -> None:
    state, _ = state_of(tiny_config())
    first = state.adapted[0]
    first.scaling *= 2
    state.prepared = PreparedAdapters(state.adapted, state.groups, torch.bfloat16)
    assert not any(first in layers for layers in stacks_in(state))


def test_nothing_is_prepared_after_the_step(tiny_config: Config) -> None:
    """Another step has other adapters; evaluation, another dtype perhaps."""
    state, packs = state_of(tiny_config())
    accumulate_gradients(state, packs)
    assert all(layer.adapter().casts is layer.adapter().grads is None for layer in state.adapted)
    assert all(layer.adapter().stacked is None for layer in state.adapted)


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", ["aten::copy_"]), ("float32", [])])
def test_a_step_casts_a_group_at_once_and_makes_no_view(tiny_config: Config, dtype: str, expected: list[str]) -> None:
    name = tiny_config().model.name
    state, _ = state_of(tiny_config(model={"compute_dtype": dtype, "device": "cpu", "name": name}))
    with Operations() as seen, state.prepared.for_a_step():
        pass
    assert seen.names == expected
