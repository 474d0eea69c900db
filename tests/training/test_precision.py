"""Promises of the loop in 16 bits: adapters and updates stay fp32, and fp16's loss scale is part of the state."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from tiny_runs import quiet
from torch import Tensor

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.batching.packing import make_packs
from qlora_trainer.data.types import Example
from qlora_trainer.runs.metrics import read_metrics
from qlora_trainer.runs.run import Run
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.training.step import train_step

Config = Callable[..., RunConfig]
Models = Callable[[str], Path]
STEPS = 3


def run_in(tiny_config: Config, model: Path, dtype: str, name: str = "run", **sections: Any) -> Run:
    training = {"max_steps": STEPS, **sections.pop("training", {})}
    return start_run(
        tiny_config(name, model={"name": str(model), "compute_dtype": dtype}, training=training, **sections)
    )


def records_of(run: Run) -> list[dict[str, Any]]:
    assert run.train(quiet)
    return read_metrics(run.directory / "metrics.jsonl")


@pytest.fixture(scope="module")
def fp32_records() -> dict[str, list[dict[str, Any]]]:
    """Metrics of the fp32 runs by family, as they are made."""
    return {}


@pytest.mark.parametrize("activations", slow_but(["none", "full"], "full"))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", slow_but(["llama", "gemma2", "qwen2"], "gemma2"))
def test_training_in_16_bits_follows_fp32(
    tiny_config: Config, tiny_models: Models, fp32_records: dict, family: str, dtype: str, activations: str
) -> None:
    if family not in fp32_records:
        fp32_records[family] = records_of(run_in(tiny_config, tiny_models(family), "float32", "fp32"))
    run = run_in(tiny_config, tiny_models(family), dtype, training={"activation_checkpointing": activations})
    records = records_of(run)
    error = torch.finfo(getattr(torch, dtype)).eps  # 0.8 % and 0.1 %
    for record, expected in zip(records, fp32_records[family], strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=error)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2 * error)
    assert run.state.updates == STEPS
    assert run.state.grad_scale.enabled == (dtype == "float16")

    parameters = list(run.base.model.parameters())
    assert {p.dtype for p in parameters if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in parameters if not p.requires_grad} == {getattr(torch, dtype)}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters if p.requires_grad)


@pytest.mark.slow
def test_a_resumed_fp16_run_equals_the_uninterrupted_one(tiny_config: Config, tiny_llama: Path) -> None:
    """With dropout, and a loss scale that is not the one a run begins with."""

    def begin(name: str) -> Run:
        run = run_in(tiny_config, tiny_llama, "float16", name, adapter={"dropout": 0.2}, training={"max_steps": 5})
        run.state.grad_scale.value, run.state.grad_scale.good_steps = 2.0**12, 7
        return run

    whole = begin("whole")
    expected = records_of(whole)
    stopped = begin("parts")
    assert not stopped.train(quiet, stop_after=2)
    torch.manual_seed(12345)  # what a new process would hold
    resumed = resume_run(stopped.directory)
    assert resumed.state.grad_scale.state_dict() == {"enabled": True, "value": 2.0**12, "good_steps": 9}
    found = records_of(resumed)
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [record[key] for record in found] == [record[key] for record in expected], key
    for ours, theirs in zip(resumed.state.groups, whole.state.groups, strict=True):
        assert torch.equal(ours.data, theirs.data)
    assert resumed.state.grad_scale.state_dict() == whole.state.grad_scale.state_dict()


def test_an_overflow_in_fp16_halves_the_scale_and_leaves_everything_else(tiny_config: Config, tiny_llama: Path) -> None:
    """A scale that is too large is found and lowered; the schedule and the adapters wait for it."""
    state = run_in(tiny_config, tiny_llama, "float16").state
    state.model.train()
    packs = state.loader.next()
    state.grad_scale.value = 2.0**60
    adapters = state.groups[0].data.detach().clone()
    first = train_step(state, packs)
    assert not math.isfinite(first["grad_norm"])
    assert math.isfinite(first["loss"])  # only the scaled gradient overflowed
    assert (state.step, state.updates, state.skipped_in_a_row) == (1, 0, 1)
    assert state.grad_scale.value == 2.0**59
    assert torch.equal(state.groups[0].data, adapters)
    assert all(not tensor.any() for tensor in state.optimizer.state_dict()[0].values())

    state.grad_scale.value = 2.0**16
    second = train_step(state, packs)
    assert second["learning_rate"] == first["learning_rate"]
    assert (state.updates, state.skipped_in_a_row, state.grad_scale.value) == (1, 0, 2.0**16)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_step_without_labels_updates_nothing(tiny_config: Config, tiny_llama: Path, dtype: str) -> None:
    state = run_in(tiny_config, tiny_llama, dtype, optimizer={"weight_decay": 0.5}).state
    state.model.train()
    train_step(state, state.loader.next())
    before = (state.groups[0].data.detach().clone(), state.optimizer.state_dict(), state.grad_scale.value)
    untrained = make_packs([Example([5, 6, 7, 8], [-100] * 4)] * 2, 64, packing=True)
    metrics = train_step(state, untrained)
    assert (metrics["loss"], metrics["grad_norm"], metrics["trained_tokens"], metrics["tokens"]) == (0.0, 0.0, 0, 8)
    assert (state.step, state.updates, state.skipped_in_a_row) == (2, 1, 0)
    assert torch.equal(state.groups[0].data, before[0])
    tensors, description = state.optimizer.state_dict()
    assert description == before[1][1]
    assert all(torch.equal(tensor, before[1][0][name]) for name, tensor in tensors.items())
    assert state.grad_scale.value == before[2]


def test_rows_without_labels_next_to_others_change_nothing(tiny_config: Config, tiny_llama: Path) -> None:
    gradients: list[Tensor] = []
    for name, extra in (("alone", 0), ("with others", 2)):
        state = run_in(tiny_config, tiny_llama, "float32", name).state
        state.model.train()
        packs = state.loader.next() + make_packs([Example([5, 6, 7], [-100] * 3)] * extra, 64, packing=False)
        train_step(state, packs)
        gradients.append(state.groups[0].grad.clone())
    assert torch.equal(*gradients)


def test_weight_decay_is_of_adapters_only(tiny_config: Config, tiny_models: Models) -> None:
    """With gradients of zero, Adam moves nothing and decay alone is seen."""
    run = run_in(
        tiny_config,
        tiny_models("qwen2"),
        "bfloat16",
        adapter={"bias": "all"},
        optimizer={"weight_decay": 0.1, "learning_rate": 0.01},
    )
    weights, biases = run.state.groups
    assert (weights.weight_decay, biases.weight_decay) == (0.1, 0.0)
    assert all(".lora_" in name for name in weights.parameters)
    assert biases.parameters
    assert all(name.endswith(".bias") for name in biases.parameters)
    for group in (weights, biases):
        group.data.data.fill_(1.0)
        group.zero_grad()
    run.state.optimizer.step(0.01)
    assert torch.allclose(weights.data, torch.tensor(1.0 - 0.01 * 0.1), rtol=1e-6)
    assert torch.equal(biases.data, torch.ones_like(biases.data))
