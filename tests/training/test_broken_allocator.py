"""Promises for an allocator that broke when memory ran out: the run is saved, and goes on in a new process."""

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scarcity import same_end
from tiny_runs import quiet

from qlora_trainer.common.errors import InsufficientMemoryError
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.runs.run import Run
from qlora_trainer.runs.start import resume_run, start_run

Config = Callable[..., RunConfig]


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
    assert whole.train(quiet)

    run = start_run(wide_config("run"))
    again = itertools.count()  # micro-batches of the second attempt; the first of them draws dropout's masks
    BrokenAllocator(run, lambda: run.state.step == 2, fails=lambda: next(again) > 0)
    with pytest.raises(InsufficientMemoryError) as raised:
        run.train(quiet)
    assert "INTERNAL ASSERT FAILED" in str(raised.value)
    command = f"PYTORCH_ALLOC_CONF=expandable_segments:False qlora resume {run.directory}"
    assert str(raised.value).endswith(f"Resume after step 2 in a new process, without them: {command}")

    torch.manual_seed(12345)
    resumed = resume_run(run.directory)
    assert resumed.state.step == 2
    assert resumed.state.loader.micro_batch_tokens == whole.state.loader.micro_batch_tokens < 400
    assert resumed.train(quiet)
    assert same_end(whole, resumed)


def test_an_allocator_that_breaks_later_ends_the_run_in_the_same_way(wide_config: Config) -> None:
    """Memory runs out in the first step and the check fails when the eval rows are measured after the fourth."""
    run = start_run(wide_config(training={"evaluate_every": 4, "save_every": 100}))
    BrokenAllocator(run, lambda: True, fails=lambda: not run.base.model.training)
    with pytest.raises(InsufficientMemoryError, match="Resume after step 4 in a new process, without them: "):
        run.train(quiet)
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
        run.train(quiet)
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
        run.train(quiet)


def test_a_failed_check_of_the_allocator_is_no_lack_of_memory_where_none_ran_out(wide_config: Config) -> None:
    run = start_run(wide_config())
    broken = BrokenAllocator(run, lambda: False)
    broken.ran_out = True
    with pytest.raises(RuntimeError, match="INTERNAL ASSERT FAILED"):
        run.train(quiet)
