"""Promises for when memory runs out: the same step is taken again with less, and nothing else changes."""

import errno
import gc
import itertools
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow, slow_but
from safetensors.torch import load_file
from torch import Tensor

from qlora_trainer.cli.console import TrainingBar, console
from qlora_trainer.common.errors import InsufficientMemoryError, MicroBatchError, is_out_of_memory
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.batching.packing import Pack
from qlora_trainer.model.device import current_card
from qlora_trainer.runs.metrics import read_metrics
from qlora_trainer.runs.report.summary import write_run_report
from qlora_trainer.runs.run import Run
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.training import loop as training
from qlora_trainer.training import recovery, step
from qlora_trainer.training.loop import measure_eval
from qlora_trainer.training.memory.activations import Policy, offloaded_bytes
from qlora_trainer.training.recovery import lower, probe, take_step
from qlora_trainer.training.state import TrainState
from qlora_trainer.training.step import train_step

Config = Callable[..., RunConfig]


class Scarcity:
    """Play a device: a micro-batch of more tokens than there is space for runs out of memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.limit: Callable[[], int] | None = None
        self.in_backward = False
        self.sizes: list[int] = []  # tokens, padding counted, of every micro-batch begun, this one last
        self.failures = 0
        self.succeeded_before_failure = 0
        real = step.loss_sum

        def loss_sum(model: Any, pack: Pack, path: Any) -> Tensor:
            self.sizes.append(pack.input_ids.numel())
            if not self.in_backward:
                self.check()
            return real(model, pack, path)

        monkeypatch.setattr(step, "loss_sum", loss_sum)

    def check(self, gradient: Tensor | None = None) -> None:
        if self.limit is not None and self.sizes[-1] > self.limit():
            self.failures += 1
            self.succeeded_before_failure = max(self.succeeded_before_failure, len(self.sizes) - 1)
            self.sizes.clear()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def fail_in_backward(self, state: TrainState) -> None:
        """When the gradients of later layers have been added, before the first layer's."""
        self.in_backward = True
        next(iter(state.groups[0].parameters.values())).register_hook(self.check)


@pytest.fixture
def scarcity(monkeypatch: pytest.MonkeyPatch) -> Scarcity:
    return Scarcity(monkeypatch)


@pytest.fixture
def wide_config(tiny_config: Config) -> Config:
    """Five steps of 8 rows, two an epoch, in one or a few micro-batches, with dropout."""

    def config(output: str = "run", **changes: dict[str, Any]) -> RunConfig:
        own = {"global_batch_size": 8, "micro_batch_tokens": 400, "max_steps": 5}
        training = {**own, **changes.pop("training", {})}
        return tiny_config(output, adapter={"rank": 4, "alpha": 8, "dropout": 0.2}, training=training, **changes)

    return config


def started(config: RunConfig) -> Run:
    """A run whose every adapter tensor gets a gradient at once: lora_B starts at zero, which would hide lora_A's."""
    run = start_run(config)
    with torch.no_grad():
        for group in run.state.groups:
            group.data.add_(torch.linspace(-0.05, 0.05, group.data.numel()))
    run.state.model.train()
    return run


def everything(state: TrainState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that a step could change, gradients and random state included."""
    tensors, rest = state.state_dict()
    buffers = {f"{g.name}.data": g.data.detach().clone() for g in state.groups}
    return tensors | buffers | {f"{g.name}.grad": g.grad.clone() for g in state.groups}, rest


def differences(one: tuple[dict[str, Tensor], dict], other: tuple[dict[str, Tensor], dict]) -> list[str]:
    assert one[0].keys() == other[0].keys()
    assert one[1].keys() == other[1].keys()
    tensors = [name for name in one[0] if not torch.equal(one[0][name], other[0][name])]
    return tensors + [name for name in one[1] if one[1][name] != other[1][name]]


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
    whole.train(lambda record: None)

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
        run.train(lambda record: None)
    assert f"A row of {longest_of_third} tokens does not fit" in str(raised.value)
    assert f"data.max_length below {longest_of_third}" in str(raised.value)
    assert (run.state.step, run.state.loader.micro_batch_tokens, run.state.policy) == (2, 128, Policy("none"))

    scarcity.limit = None
    resumed = resume_run(run.directory)
    assert resumed.state.step == 2
    assert resumed.train(lambda record: None)
    assert same_end(whole, resumed)


def same_end(one: Run, other: Run) -> bool:
    files = "adapter_model.safetensors", "trainer_state.safetensors"
    ends = [max((run.directory / "checkpoints").iterdir()) for run in (one, other)]
    a, b = ({f"{f}:{k}": t for f in files for k, t in load_file(end / f).items()} for end in ends)
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stop_at", slow_but([2, 4], 4), ids=["stopped before", "stopped after"])
def test_a_run_that_recovered_resumes_bit_for_bit(wide_config: Config, scarcity: Scarcity, stop_at: int) -> None:
    """Memory runs out at the third step of both; a run that goes on from the fifth does not run out once more."""

    def short_of_memory(run: Run) -> Run:
        scarcity.limit = lambda: (115 if run.state.policy.level == "full" else 90) if run.state.step >= 2 else 10_000
        return run

    uninterrupted = short_of_memory(start_run(wide_config("whole")))
    assert uninterrupted.train(lambda record: None)
    stopped = short_of_memory(start_run(wide_config("parts")))
    assert not stopped.train(lambda record: None, stop_after=stop_at)
    torch.manual_seed(12345)
    scarcity.failures = 0
    resumed = short_of_memory(resume_run(stopped.directory))
    assert resumed.train(lambda record: None)

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


@pytest.mark.parametrize("limit", [10_000, 115], ids=["fits", "does not fit"])
def test_probing_changes_nothing(wide_config: Config, scarcity: Scarcity, limit: int) -> None:
    run = started(wide_config())
    take_step(run.state)
    run.state.optimizer.zero_grad()
    before = everything(run.state)
    base = {name: buffer.clone() for name, buffer in run.state.model.named_buffers()}
    scarcity.limit = lambda: limit
    probe(run.state, run.prepared.train.lengths)
    assert (
        run.state.loader.micro_batch_tokens == 400 if limit == 10_000 else run.state.loader.micro_batch_tokens <= limit
    )
    assert differences(before, everything(run.state)) == ([] if limit == 10_000 else ["memory"])
    assert all(torch.equal(base[name], buffer) for name, buffer in run.state.model.named_buffers())
    run.state.groups[0].check_views()


def test_a_probed_run_equals_one_that_was_not(wide_config: Config) -> None:
    plain, probed = start_run(wide_config("plain")), start_run(wide_config("probed"))
    torch.manual_seed(plain.config.training.seed)
    plain.train(lambda record: None)
    torch.manual_seed(plain.config.training.seed)
    probe(probed.state, probed.prepared.train.lengths)
    probed.train(lambda record: None)
    assert same_end(plain, probed)


@pytest.mark.parametrize("packing", slow_but([True, False], True), ids=["packed", "padded"])
def test_the_probe_takes_the_longest_micro_batch_of_the_run(
    wide_config: Config, scarcity: Scarcity, packing: bool
) -> None:
    run = started(
        wide_config(
            data={"packing": packing}, training={"micro_batch_tokens": 200, "global_batch_size": 5, "max_steps": 6}
        )
    )
    probe(run.state, run.prepared.train.lengths)
    (probed,) = scarcity.sizes
    scarcity.sizes.clear()
    run.train(lambda record: None)
    assert run.state.loader.epoch >= 1
    assert len(set(scarcity.sizes)) > 3
    assert probed == max(scarcity.sizes)


def test_after_a_probe_that_lowered_no_step_runs_out(wide_config: Config, scarcity: Scarcity) -> None:
    run = started(wide_config())
    scarcity.limit = lambda: 115
    probe(run.state, run.prepared.train.lengths)
    assert scarcity.failures > 0
    scarcity.failures = 0
    assert run.train(lambda record: None)
    assert scarcity.failures == 0
    first, *others = read_metrics(run.directory / "metrics.jsonl")
    assert "in the longest micro-batch, tried before the first step" in first["recovered"]
    assert not any("recovered" in record for record in others)


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


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (MemoryError(), True),
        (InsufficientMemoryError("Loading ran out of memory."), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_a_lack_of_memory_is_known_however_it_is_reported(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


@pytest.mark.slow
def test_a_model_that_cannot_recompute_has_no_smaller_policy(wide_config: Config, scarcity: Scarcity) -> None:
    run = started(wide_config())
    run.state.model.supports_gradient_checkpointing = False
    scarcity.limit = lambda: 0
    with pytest.raises(InsufficientMemoryError, match="even with activation checkpointing none") as raised:
        take_step(run.state)
    assert not isinstance(raised.value, MicroBatchError)


def test_eval_rows_are_measured_in_micro_batches_of_the_size_in_force(
    wide_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(wide_config())
    limits: list[int] = []

    def noting(model: Any, examples: Any, forward: Any, micro_batch_tokens: int) -> float:
        limits.append(micro_batch_tokens)
        return 1.0

    monkeypatch.setattr(training, "eval_loss", noting)
    run.state.set_memory(77, run.state.policy)
    measure_eval(run.state, run.prepared.eval)
    assert limits == [77]


def long_rows(path: Path, count: int) -> Path:
    """Plain text, two rows of up to 256 tokens each line."""
    text = "the quick brown fox jumps over a lazy dog " * 60
    path.write_text("".join(json.dumps({"text": f"{index} {text}"}) + "\n" for index in range(count)))
    return path


LIMITED_RUN = """
import gc, resource, sys
from pathlib import Path
from qlora_trainer.runs.start import resume_run

run = resume_run(Path(sys.argv[1]))
gc.collect()
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 60 * 2**20, resource.RLIM_INFINITY))
assert run.train(lambda record: None)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells and limits a process's address space")
def test_a_host_that_is_too_small_recovers(tiny_config: Config, tmp_path: Path) -> None:
    """A real allocation fails: the process may take 60 MiB more than it has before its step, which takes some 300."""
    config = {
        "data": {"train": str(long_rows(tmp_path / "long.jsonl", 32)), "eval": 0, "max_length": 256},
        "training": {
            "global_batch_size": 64,
            "micro_batch_tokens": 64 * 256,
            "max_steps": 1,
            "activation_checkpointing": "none",
        },
    }
    roomy, tight = start_run(tiny_config("roomy", **config)), start_run(tiny_config("tight", **config))
    roomy.train(lambda record: None)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED_RUN, str(tight.directory)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (expected,), (found,) = (read_metrics(run.directory / "metrics.jsonl") for run in (roomy, tight))
    assert "recovered" not in expected
    assert "Memory ran out in step 1, on 64 rows" in found["recovered"]
    assert found["micro_batch_tokens"] < found["tokens"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


class BrokenAllocator:
    """In the place of torch's: an allocation of the embedding runs out of memory, and all after it fail a check."""

    TEXT = (
        '!handles_.at(i) INTERNAL ASSERT FAILED at "c10/cuda/CUDACachingAllocator.cpp":487, please report a bug to '
        "PyTorch."
    )

    def __init__(self, run: Run, runs_out: Callable[[], bool], fails: Callable[[], bool] = lambda: True) -> None:
        self.ran_out = False
        self.runs_out, self.fails = runs_out, fails
        embedding = run.base.model.get_input_embeddings()
        self.hook = embedding.register_forward_pre_hook(self.allocate)

    def allocate(self, module: Any, arguments: Any) -> None:
        if self.ran_out and self.fails():
            raise RuntimeError(self.TEXT)
        if self.runs_out() and not self.ran_out:
            self.ran_out = True
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.slow
def test_a_run_whose_allocator_broke_is_saved_and_goes_on_bit_for_bit(wide_config: Config) -> None:
    """As the run where memory ran out at the same step, and whose allocator lived."""
    whole = start_run(wide_config("whole"))
    BrokenAllocator(whole, lambda: whole.state.step == 2, fails=lambda: False)
    assert whole.train(lambda record: None)

    run = start_run(wide_config("run"))
    again = itertools.count()  # micro-batches of the second attempt; the first of them draws dropout's masks
    BrokenAllocator(run, lambda: run.state.step == 2, fails=lambda: next(again) > 0)
    with pytest.raises(InsufficientMemoryError) as raised:
        run.train(lambda record: None)
    assert "INTERNAL ASSERT FAILED" in str(raised.value)
    command = f"PYTORCH_ALLOC_CONF=expandable_segments:False qlora resume {run.directory}"
    assert str(raised.value).endswith(f"Resume after step 2 in a new process, without them: {command}")

    torch.manual_seed(12345)
    resumed = resume_run(run.directory)
    assert resumed.state.step == 2
    assert resumed.state.loader.micro_batch_tokens == whole.state.loader.micro_batch_tokens < 400
    assert resumed.train(lambda record: None)
    assert same_end(whole, resumed)


def test_an_allocator_that_breaks_later_ends_the_run_in_the_same_way(wide_config: Config) -> None:
    """Memory runs out in the first step and the check fails when the eval rows are measured after the fourth."""
    run = start_run(wide_config(training={"evaluate_every": 4, "save_every": 100}))
    BrokenAllocator(run, lambda: True, fails=lambda: not run.base.model.training)
    with pytest.raises(InsufficientMemoryError, match="Resume after step 4 in a new process, without them: "):
        run.train(lambda record: None)
    assert resume_run(run.directory).state.step == 4


def test_where_a_broken_run_cannot_be_saved_the_last_checkpoint_is_named(
    wide_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run(wide_config(training={"save_every": 2, "evaluate_every": 100}))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def runs_out() -> bool:
        if run.state.step == 3:
            monkeypatch.setattr(os, "fsync", full)
        return run.state.step == 3

    BrokenAllocator(run, runs_out)
    with pytest.raises(InsufficientMemoryError) as raised:
        run.train(lambda record: None)
    assert "Saving step 3 failed too: DiskError: " in str(raised.value)
    assert "Resume after step 2 in a new process, without them: " in str(raised.value)


def test_an_update_that_failed_between_its_groups_is_not_saved(
    tiny_config: Config, tiny_models: Callable[[str], Path]
) -> None:
    settings = {"save_every": 2, "evaluate_every": 100, "global_batch_size": 8, "micro_batch_tokens": 400}
    run = start_run(tiny_config(model={"name": str(tiny_models("qwen2"))}, adapter={"bias": "all"}, training=settings))
    assert len(run.state.groups) == 2
    BrokenAllocator(run, lambda: run.state.step == 3, fails=lambda: False)
    optimizer: Any = run.state.optimizer.optimizer
    real = optimizer.update_step

    def update_step(group: Any, p: Any, gindex: int, pindex: int) -> None:
        if run.state.step == 3 and gindex == 1:
            raise RuntimeError(BrokenAllocator.TEXT)
        real(group, p, gindex, pindex)

    optimizer.update_step = update_step
    with pytest.raises(InsufficientMemoryError, match="Resume after step 2 in a new process, without them: "):
        run.train(lambda record: None)


def test_a_failed_check_of_the_allocator_is_no_lack_of_memory_where_none_ran_out(wide_config: Config) -> None:
    run = start_run(wide_config())
    broken = BrokenAllocator(run, lambda: False)
    broken.ran_out = True
    with pytest.raises(RuntimeError, match="INTERNAL ASSERT FAILED"):
        run.train(lambda record: None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_card_that_is_too_small_recovers(tiny_config: Config, tmp_path: Path) -> None:
    """A real allocation fails: torch may take no more than half of what the first step took besides the weights."""
    whole_step = 256 * 256
    config = {
        "data": {"train": str(long_rows(tmp_path / "long.jsonl", 300)), "eval": 0.1, "max_length": 256},
        "training": {
            "global_batch_size": 256,
            "micro_batch_tokens": whole_step,
            "max_steps": 2,
            "activation_checkpointing": "none",
        },
    }
    device = current_card()
    roomy = start_run(tiny_config("roomy", **config))
    gc.collect()
    torch.cuda.empty_cache()
    at_rest = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    roomy.train(lambda record: None)
    assert roomy.state.loader.micro_batch_tokens == whole_step, "the whole step fits an unlimited card"
    needed = torch.cuda.max_memory_reserved(device) - at_rest
    assert needed > 100 * 2**20, "what a step takes must be out from the allocator's 20 MiB segments"
    expected = [record["loss"] for record in read_metrics(roomy.directory / "metrics.jsonl")]
    roomy.release()

    run = start_run(tiny_config("tight", **config))
    gc.collect()
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved(device) + needed // 2
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(device).total_memory, device)
    try:
        assert run.train(lambda record: None)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    records = read_metrics(run.directory / "metrics.jsonl")
    assert "tried before the first step" in records[0]["recovered"]
    assert run.state.loader.micro_batch_tokens < whole_step
    assert run.state.policy == Policy("none"), "splitting was enough"
    assert max(record["peak_memory_bytes"] for record in records) <= allowed
    assert [record["loss"] for record in records] == pytest.approx(expected, rel=2e-2)


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
