"""Steps that are laid out while the one before runs change nothing that a run computes or saves."""

from collections.abc import Callable
from typing import Any

import pytest
from scarcity import Scarcity, differences, everything, same_end, started
from tiny_runs import quiet

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.batching.loader import StepLoader
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.training.recovery import take_step

Config = Callable[..., RunConfig]


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepLoader, "begin_step_after", lambda self: None)


def test_a_run_is_bit_for_bit_the_same_without_laying_out_ahead(
    wide_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def records(output: str) -> tuple[Any, list[tuple[float, float]]]:
        run, found = started(wide_config(output)), []
        run.train(lambda record: found.append((record["loss"], record["grad_norm"])))
        return run, found

    ahead, found = records("ahead")
    without(monkeypatch)
    plain, expected = records("plain")
    assert found == expected
    assert len(found) == 5
    assert differences(everything(ahead.state), everything(plain.state)) == []
    assert same_end(ahead, plain)


def test_a_run_that_stops_with_a_step_laid_out_resumes_at_that_step(
    wide_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = start_run(wide_config("whole"))
    whole.train(quiet)
    first = start_run(wide_config("parts"))
    first.train(quiet, stop_after=3)
    resumed = resume_run(first.directory)
    assert resumed.state.loader.state_dict() == first.state.loader.state_dict()
    without(monkeypatch)
    resumed.train(quiet)
    assert same_end(whole, resumed)


def test_each_step_but_the_last_lays_out_the_one_after(wide_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[int, int]] = []
    real = StepLoader.begin_step_after

    def noting(self: StepLoader) -> None:
        begun.append((self.epoch, self.step))
        real(self)

    monkeypatch.setattr(StepLoader, "begin_step_after", noting)
    start_run(wide_config()).train(quiet)
    assert begun == [(0, 0), (0, 1), (1, 0), (1, 1)], "of five steps, two an epoch"


def test_a_step_after_memory_ran_out_is_laid_out_for_the_micro_batches_that_fit(
    wide_config: Config, scarcity: Scarcity, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(wide_config())
    largest = max(pack.input_ids.numel() for pack in run.state.loader.peek())
    scarcity.limit = lambda: largest - 1
    take_step(run.state)
    assert scarcity.failures
    lowered = run.state.loader.micro_batch_tokens
    assert lowered < largest
    packs = run.state.loader.peek()
    without(monkeypatch)
    expected = run.state.loader.peek()
    assert [pack.row_lengths for pack in packs] == [pack.row_lengths for pack in expected]
    assert max(sum(pack.row_lengths) for pack in packs) <= lowered


def test_a_row_that_cannot_be_read_stops_the_run_after_the_step_before_it(
    wide_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(wide_config())
    loader = run.state.loader
    broken = int(loader.rows_of_step(loader.order(0), 1)[0])
    rows = loader.examples

    class Rows:
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> Any:
            if index == broken:
                raise OSError("the disk is gone")
            return rows[index]

    loader.examples = Rows()
    take_step(run.state)
    assert run.state.step == 1
    before = everything(run.state)
    with pytest.raises(OSError, match="gone"):
        take_step(run.state)
    assert differences(everything(run.state), before) == []
