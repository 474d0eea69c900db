"""Promises for when memory runs out: the same step is taken again with less, and nothing else changes."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from marks import slow, slow_but
from scarcity import Scarcity, differences, everything, same_end, started
from tiny_runs import quiet
from torch import Tensor

from qlora_trainer.cli.console import TrainingBar, console
from qlora_trainer.common.errors import InsufficientMemoryError, MicroBatchError
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.batching.packing import Pack
from qlora_trainer.runs.metrics import read_metrics
from qlora_trainer.runs.report.summary import write_run_report
from qlora_trainer.runs.run import Run
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.training import recovery, step
from qlora_trainer.training.memory.activations import Policy, offloaded_bytes
from qlora_trainer.training.recovery import lower, take_step
from qlora_trainer.training.state import TrainState
from qlora_trainer.training.step import train_step

Config = Callable[..., RunConfig]


@pytest.mark.parametrize("packing", slow_but([True, False], True), ids=["packed", "padded"])
@pytest.mark.parametrize(
    ("where", "activations"), [slow(("forward", "none")), slow(("backward", "none")), ("backward", "full")]
)
def test_a_step_that_ran_out_of_memory_is_taken_again_with_the_same_gradient(
    wide_config: Config, scarcity: Scarcity, where: str, activations: str, packing: bool
) -> None:
    """As if the smaller micro-batches had been configured from the start: dropout's draws are the same, too."""
    changes = {"data": {"packing": packing}, "training": {"activation_checkpointing": activations}}
    small = started(wide_config("small", **changes))
    largest = max(pack.input_ids.numel() for pack in small.state.loader.peek())
    torch.manual_seed(7)
    run = started(wide_config("run", **changes))
    if where == "backward":
        scarcity.fail_in_backward(run.state)
    scarcity.limit = lambda: largest - 1
    metrics = take_step(run.state)
    assert scarcity.failures >= 1
    assert run.state.loader.micro_batch_tokens < largest
    found = everything(run.state)
    run.state.groups[0].check_views()

    scarcity.limit = None
    small.state.loader.micro_batch_tokens = run.state.loader.micro_batch_tokens
    torch.manual_seed(small.config.training.seed)
    expected_metrics = train_step(small.state, small.state.loader.next())
    assert differences(found, everything(small.state)) == []
    assert metrics == expected_metrics


def test_a_failure_after_good_micro_batches_leaves_nothing_of_them(wide_config: Config, scarcity: Scarcity) -> None:
    """The gradients hold their sums by then, and the random state has moved."""
    run = started(wide_config(training={"micro_batch_tokens": 200}))
    sizes = [pack.input_ids.numel() for pack in run.state.loader.peek()]
    begun = iter([False] * (len(sizes) - 1) + [True] + [False] * 1000)
    real = step.loss_sum

    def only_the_last(*arguments: Any) -> Tensor:
        part = real(*arguments)
        if next(begun):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "loss_sum", only_the_last)
        take_step(run.state)
    small = started(wide_config("small", training={"micro_batch_tokens": 200}))
    small.state.loader.micro_batch_tokens = run.state.loader.micro_batch_tokens
    train_step(small.state, small.state.loader.next())
    assert len(sizes) > 1
    assert run.state.loader.micro_batch_tokens < 200
    assert differences(everything(run.state), everything(small.state)) == []


@pytest.mark.slow
def test_rows_are_split_before_the_policy_needs_less_memory(wide_config: Config, scarcity: Scarcity) -> None:
    run = started(wide_config(training={"micro_batch_tokens": 900}))
    tried: list[tuple[int, str]] = []

    def limit() -> int:
        now = run.state.loader.micro_batch_tokens, run.state.policy.level
        if not tried or tried[-1] != now:
            tried.append(now)
        return 10_000 if run.state.policy.level == "tiled" else 0

    scarcity.limit = limit
    take_step(run.state)
    limits, levels = [limit for limit, _ in tried], [level for _, level in tried]
    assert limits == sorted(limits, reverse=True)
    splits = len(set(limits))
    assert splits > 2
    assert levels == ["none"] * splits + ["full", "offload", "tiled"]
    assert run.state.policy == Policy("tiled")


@pytest.mark.slow
def test_a_row_that_fits_under_no_policy_is_named_and_nothing_is_lost(wide_config: Config, scarcity: Scarcity) -> None:
    changes = {"training": {"global_batch_size": 3, "micro_batch_tokens": 128, "max_steps": 4, "save_every": 100}}
    whole = start_run(wide_config("whole", **changes))
    whole.train(quiet)

    run = start_run(wide_config("run", **changes))
    longest_of_third = 0

    def limit() -> int:
        nonlocal longest_of_third
        if run.state.step < 2:
            return 10_000
        longest_of_third = max(max(pack.row_lengths) for pack in run.state.loader.peek())
        return longest_of_third - 1

    scarcity.limit = limit
    with pytest.raises(InsufficientMemoryError) as raised:
        run.train(quiet)
    assert f"A row of {longest_of_third} tokens does not fit" in str(raised.value)
    assert f"data.max_length below {longest_of_third}" in str(raised.value)
    assert (run.state.step, run.state.loader.micro_batch_tokens, run.state.policy) == (2, 128, Policy("none"))

    scarcity.limit = None
    resumed = resume_run(run.directory)
    assert resumed.state.step == 2
    assert resumed.train(quiet)
    assert same_end(whole, resumed)


@pytest.mark.parametrize("stop_at", slow_but([2, 4], 4), ids=["stopped before", "stopped after"])
def test_a_run_that_recovered_resumes_bit_for_bit(wide_config: Config, scarcity: Scarcity, stop_at: int) -> None:
    """Memory runs out at the third step of both; a run that goes on from the fifth does not run out once more."""

    def short_of_memory(run: Run) -> Run:
        scarcity.limit = lambda: (115 if run.state.policy.level == "full" else 90) if run.state.step >= 2 else 10_000
        return run

    uninterrupted = short_of_memory(start_run(wide_config("whole")))
    assert uninterrupted.train(quiet)
    stopped = short_of_memory(start_run(wide_config("parts")))
    assert not stopped.train(quiet, stop_after=stop_at)
    torch.manual_seed(12345)
    scarcity.failures = 0
    resumed = short_of_memory(resume_run(stopped.directory))
    assert resumed.train(quiet)

    assert (scarcity.failures == 0) == (stop_at == 4)
    assert resumed.state.policy == uninterrupted.state.policy == Policy("full")
    assert resumed.state.loader.micro_batch_tokens == uninterrupted.state.loader.micro_batch_tokens < 128
    assert same_end(uninterrupted, resumed)
    whole, parts = (read_metrics(run.directory / "metrics.jsonl") for run in (uninterrupted, resumed))
    for key in (
        "step",
        "loss",
        "grad_norm",
        "eval_loss",
        "micro_batch_tokens",
        "activation_checkpointing",
        "recovered",
    ):
        assert [record.get(key) for record in whole] == [record.get(key) for record in parts], key


@pytest.mark.slow
def test_on_resume_a_setting_that_the_user_changed_is_the_users(wide_config: Config) -> None:
    run = start_run(wide_config())
    run.state.set_memory(50, Policy("full"))
    run.save()

    def resumed(*overrides: str) -> tuple[int, Policy]:
        state = resume_run(run.directory, overrides).state
        return state.loader.micro_batch_tokens, state.policy

    assert resumed() == (50, Policy("full"))
    assert resumed("training.evaluate_every=3") == (50, Policy("full"))
    assert resumed("training.activation_checkpointing=none") == (50, Policy("none"))
    assert resumed("training.micro_batch_tokens=256") == (256, Policy("none"))


def test_a_smaller_choice_made_on_resume_is_not_undone_by_what_was_saved(wide_config: Config) -> None:
    """`auto` may choose otherwise on another device."""
    state = start_run(wide_config()).state
    tensors, saved = state.state_dict()
    state.set_memory(90, Policy("offload"))
    state.load_state_dict(tensors, saved)
    assert (state.loader.micro_batch_tokens, state.policy) == (90, Policy("offload"))


def test_recovery_is_said_once_and_recorded(wide_config: Config, scarcity: Scarcity) -> None:
    run = start_run(wide_config())
    scarcity.limit = lambda: 115 if run.state.step >= 2 else 10_000
    with console.capture() as captured:
        run.train(TrainingBar(run.state.total_steps))
    records = read_metrics(run.directory / "metrics.jsonl")
    (recovered,) = (record for record in records if "recovered" in record)
    limit = run.state.loader.micro_batch_tokens
    assert recovered["step"] == 3
    assert "Memory ran out in step 3, on " in recovered["recovered"]
    assert f"micro-batches of at most {limit} tokens (before: 400), which" in recovered["recovered"]
    assert [record["micro_batch_tokens"] for record in records] == [400, 400] + [limit] * 3
    assert {record["activation_checkpointing"] for record in records} == {"none"}
    printed = " ".join(captured.get().split())
    assert printed.count("Memory ran out") == 1
    page = write_run_report(run).read_text()
    assert page.count("Memory ran out") == 1
    scarcity.limit = None
    assert write_run_report(resume_run(run.directory)).read_text().count("Memory ran out") == 1


def test_what_a_failed_attempt_held_is_free_before_the_next(wide_config: Config, monkeypatch: Any) -> None:
    """An error's traceback holds every frame, and they their tensors."""
    run = started(wide_config())
    held: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []
    real = step.loss_sum

    def loss_sum(model: Any, pack: Pack, path: Any) -> Tensor:
        alive.extend(reference() is not None for reference in held)
        activations = torch.zeros(1000)
        held.append(weakref.ref(activations))
        loss = real(model, pack, path)
        if pack.tokens > 115:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss

    monkeypatch.setattr(step, "loss_sum", loss_sum)
    gc.disable()
    try:
        take_step(run.state)
    finally:
        gc.enable()
    assert len(alive) > 1
    assert not any(alive)


def test_other_failures_are_not_taken_for_a_lack_of_memory(wide_config: Config, monkeypatch: Any) -> None:
    run = started(wide_config())

    def fail(*arguments: Any) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(step, "loss_sum", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        take_step(run.state)
    assert run.state.loader.micro_batch_tokens == 400


@pytest.mark.slow
def test_a_model_that_cannot_recompute_has_no_smaller_policy(wide_config: Config, scarcity: Scarcity) -> None:
    run = started(wide_config())
    run.state.model.supports_gradient_checkpointing = False
    scarcity.limit = lambda: 0
    with pytest.raises(InsufficientMemoryError, match="even with activation checkpointing none") as raised:
        take_step(run.state)
    assert not isinstance(raised.value, MicroBatchError)


@pytest.mark.parametrize(
    ("free", "expected"), [(10.0, Policy("offload")), (0.6, Policy("offload", offload_every_n_layers=2)), (0.1, None)]
)
def test_nothing_is_offloaded_that_the_host_has_no_space_for(
    wide_config: Config, monkeypatch: pytest.MonkeyPatch, free: float, expected: Policy | None
) -> None:
    """`free`: of what every layer's input would take."""
    state = start_run(wide_config(training={"activation_checkpointing": "full"})).state
    every = offloaded_bytes(state.model, Policy("offload"), 100)
    assert every > 0
    monkeypatch.setattr(recovery, "spare_host_memory", lambda: int(every * free))
    monkeypatch.setattr(TrainState, "device", property(lambda state: torch.device("cuda")))
    assert lower(state, [100]) == (expected is not None)
    assert state.policy == (expected or Policy("full"))
    if expected is None:
        assert "GiB of host memory, more than is free there" in recovery._no_space([100], "full", state)
