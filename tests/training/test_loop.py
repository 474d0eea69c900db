"""Promises of the loop: a step is a set of rows, and a resumed run is the uninterrupted one, bit for bit."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from safetensors.torch import load_file
from scarcity import started
from tiny_runs import gradients_of_one_step, quiet
from torch import Tensor

from qlora_trainer.common.errors import CheckpointError, TrainingError
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.runs.metrics import read_metrics
from qlora_trainer.runs.run import Run
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.training import loop as training
from qlora_trainer.training.loop import measure_eval, stop_requests
from qlora_trainer.training.step import train_step

Config = Callable[..., RunConfig]


def gradient_of_one_step(config: RunConfig) -> tuple[float, Tensor]:
    """(loss, flat gradient of lora_A and lora_B) of the first step, before clipping."""
    loss, (gradient,) = gradients_of_one_step(config)
    return loss, gradient


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"micro_batch_tokens": 128, "global_batch_size": 12}},
        {"data": {"packing": False}, "training": {"global_batch_size": 12}},
        {"training": {"activation_checkpointing": "full", "global_batch_size": 12}},
    ],
    ids=["several micro-batches", "padded", "recomputed"],
)
def test_a_steps_gradient_does_not_depend_on_how_its_rows_are_laid_out(tiny_config: Config, changes: dict) -> None:
    whole = tiny_config(
        "whole", training={"global_batch_size": 12, "micro_batch_tokens": 4096}, optimizer={"max_grad_norm": 1e9}
    )
    expected_loss, expected = gradient_of_one_step(whole)
    changed = tiny_config("changed", optimizer={"max_grad_norm": 1e9}, **changes)
    loss, gradient = gradient_of_one_step(changed)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5


def test_recomputing_activations_changes_no_bit_even_with_dropout(tiny_config: Config) -> None:
    kept = gradient_of_one_step(
        tiny_config("kept", adapter={"dropout": 0.3}, training={"activation_checkpointing": "none"})
    )
    again = gradient_of_one_step(
        tiny_config("again", adapter={"dropout": 0.3}, training={"activation_checkpointing": "full"})
    )
    assert kept[0] == again[0]
    assert torch.equal(kept[1], again[1])


@pytest.mark.parametrize("activations", ["none", "full"])
def test_after_one_step_every_adapter_has_a_gradient_and_every_lora_b_moved(
    tiny_config: Config, activations: str
) -> None:
    run = start_run(tiny_config(training={"max_steps": 1, "activation_checkpointing": activations}))
    assert run.train(quiet)
    (group,) = run.state.groups
    for name, parameter in group.parameters.items():
        assert parameter.grad is not None, name
        if ".lora_B." in name:
            assert parameter.abs().sum() > 0, name
            assert parameter.grad.abs().sum() > 0, name


def adapter_and_state(directory: Path) -> dict[str, Tensor]:
    newest = max((directory / "checkpoints").iterdir())
    return load_file(newest / "adapter_model.safetensors") | load_file(newest / "trainer_state.safetensors")


@pytest.mark.parametrize("optimizer", slow_but(["paged_adamw_32bit", "paged_adamw_8bit", "adamw"], "paged_adamw_32bit"))
@pytest.mark.parametrize("stop_at", slow_but([3, 5], 5))
def test_resumed_run_equals_uninterrupted_run(tiny_config: Config, optimizer: str, stop_at: int) -> None:
    """With several micro-batches a step, dropout, and an epoch's end between: 16 rows are 6 steps of 3."""
    changes = {
        "adapter": {"dropout": 0.2, "rank": 16},
        "optimizer": {"name": optimizer},
        "training": {"micro_batch_tokens": 128, "max_steps": 8},
    }
    uninterrupted = start_run(tiny_config("whole", **changes))
    assert uninterrupted.train(quiet)

    stopped = start_run(tiny_config("parts", **changes))
    assert not stopped.train(quiet, stop_after=stop_at)
    torch.manual_seed(12345)  # what a new process would hold
    resumed = resume_run(stopped.directory)
    assert resumed.state.step == stop_at
    assert resumed.warnings == []
    assert resumed.train(quiet)

    expected = adapter_and_state(uninterrupted.directory)
    found = adapter_and_state(resumed.directory)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    whole, parts = (read_metrics(run.directory / "metrics.jsonl") for run in (uninterrupted, resumed))
    for key in ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens", "eval_loss"):
        assert [record.get(key) for record in whole] == [record.get(key) for record in parts], key


def test_an_interrupted_run_saves_at_the_next_step_boundary(tiny_config: Config) -> None:
    run = start_run(tiny_config())

    def interrupt(record: dict[str, Any]) -> None:
        if record["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    assert not run.train(interrupt)
    assert run.state.step in (2, 3)
    assert signal.getsignal(signal.SIGINT) is before
    resumed = resume_run(run.directory)
    assert resumed.state.step == run.state.step


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT as Python has it in a terminal: a shell's background job begins with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_a_second_interrupt_acts_at_once() -> None:
    with stop_requests() as requested:
        os.kill(os.getpid(), signal.SIGINT)
        assert requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_step_without_a_finite_gradient_updates_nothing(tiny_config: Config) -> None:
    run = start_run(tiny_config())
    state = run.state
    state.model.train()
    train_step(state, state.loader.next())
    adapters = state.groups[0].data.detach().clone()
    optimizer = {name: tensor.clone() for name, tensor in state.optimizer.state_dict()[0].items()}
    embedding = state.model.get_input_embeddings().weight
    saved = embedding.detach().clone()
    with torch.no_grad():
        embedding.fill_(float("nan"))
    metrics = train_step(state, state.loader.next())
    with torch.no_grad():
        embedding.copy_(saved)
    assert metrics["grad_norm"] != metrics["grad_norm"]
    assert (state.step, state.updates, state.skipped_in_a_row) == (2, 1, 1)
    assert torch.equal(adapters, state.groups[0].data)
    assert all(torch.equal(tensor, optimizer[name]) for name, tensor in state.optimizer.state_dict()[0].items())
    train_step(state, state.loader.next())
    assert (state.updates, state.skipped_in_a_row) == (2, 0)


def test_several_steps_without_a_finite_gradient_end_with_a_message(tiny_config: Config) -> None:
    run = start_run(tiny_config())

    def poison(module: Any, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: grad * float("nan"))

    run.state.adapted[0].register_forward_hook(poison)
    with pytest.raises(TrainingError, match=r"5 steps in a row .* Lower optimizer\.learning_rate"):
        run.train(quiet)


def test_the_frozen_base_does_not_change(tiny_config: Config) -> None:
    run = start_run(tiny_config(training={"max_steps": 2}))
    model = run.base.model

    def frozen() -> dict[str, Tensor]:
        parameters = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        return parameters | {name: buffer.clone() for name, buffer in model.named_buffers()}

    before = frozen()
    run.answer_samples("before")
    assert run.train(quiet)
    after = frozen()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.slow
def test_loss_falls(tiny_config: Config) -> None:
    run = start_run(tiny_config(training={"max_steps": 30, "global_batch_size": 16}, optimizer={"learning_rate": 1e-2}))
    losses: list[float] = []
    run.train(lambda record: losses.append(record["loss"]))
    assert losses[-1] < 0.8 * losses[0]


def test_a_changed_data_file_is_refused_on_resume(tiny_config: Config, rows: Path) -> None:
    run = start_run(tiny_config())
    run.train(quiet, stop_after=2)
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    with pytest.raises(CheckpointError, match="data of this run changed"):
        resume_run(run.directory)


def test_another_base_is_refused_on_resume(tiny_config: Config, tiny_models: Any, tmp_path: Path) -> None:
    from tiny_models import make_model_directory

    own = make_model_directory(tmp_path / "own", "llama")
    run = start_run(tiny_config(model={"name": str(own)}))
    run.train(quiet, stop_after=2)
    (own / "model.safetensors").unlink()
    make_model_directory(own, "llama", seed=1)
    with pytest.raises(CheckpointError, match=r"is not the one this run trains on: 14 of 14 layers hold other weights"):
        resume_run(run.directory)


def test_a_checkpoint_of_another_machine_is_resumed_with_a_warning(tiny_config: Config) -> None:
    from qlora_trainer.runs.resume_rules import environment_differences

    here = {"threads": 2, "torch": "2.13.0"}
    assert environment_differences(here, here) == []
    (warning,) = environment_differences({"threads": 8, "torch": "2.13.0"}, here)
    assert "threads was 8 and is 2" in warning
    assert environment_differences({"torch": "2.13.0"}, here) == [], "an earlier version recorded no threads"


def test_a_new_run_starts_from_an_adapter_with_a_fresh_optimizer(tiny_config: Config) -> None:
    first = start_run(tiny_config("first"))
    first.train(quiet)
    second: Run = start_run(tiny_config("second", adapter={"init_from": str(first.directory / "adapter")}))
    trained = load_file(first.directory / "adapter" / "adapter_model.safetensors")
    started = {name: p for group in second.state.groups for name, p in group.parameters.items()}
    assert all(torch.equal(trained[name], parameter.detach()) for name, parameter in started.items())
    assert second.state.step == 0
    assert all(not tensor.any() for tensor in second.state.optimizer.state_dict()[0].values())


def test_metrics_hold_what_they_promise(tiny_config: Config) -> None:
    run = start_run(tiny_config())
    run.train(quiet)
    lines = (run.directory / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    promised = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens"}
    assert all(promised | {"tokens_per_second", "peak_memory_bytes"} <= record.keys() for record in records)
    assert [record["step"] for record in records if "eval_loss" in record] == [4, 8]


def test_eval_rows_are_measured_in_micro_batches_of_the_size_in_force(
    wide_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(wide_config())
    limits: list[int] = []

    def noting(model: Any, examples: Any, forward: Any, micro_batch_tokens: int, workers: int) -> float:
        limits.append(micro_batch_tokens)
        return 1.0

    monkeypatch.setattr(training, "eval_loss", noting)
    run.state.set_memory(77, run.state.policy)
    measure_eval(run.state, run.prepared.eval)
    assert limits == [77]
