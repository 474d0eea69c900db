"""Promises of a trained adapter that is opened: the newest there is, evaluated on the rows of its run."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from marks import slow_but
from tiny_runs import edit_config, quiet

from qlora_trainer.common.errors import CheckpointError
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.runs.trained import evaluate_trained, open_trained

Config = Callable[..., RunConfig]


@pytest.mark.parametrize("bias", slow_but(["lora_only", "all"], "all"))
def test_a_bias_mode_that_differs_between_save_and_load_is_refused_by_name(finished: Path, bias: str) -> None:
    edit_config(finished, "adapter", bias=bias)
    with pytest.raises(CheckpointError, match=rf"adapter\.bias is {bias} in config\.yaml and none there"):
        open_trained(finished)
    with pytest.raises(CheckpointError, match=rf"adapter\.bias: none → {bias}"):
        resume_run(finished)


@pytest.mark.parametrize("has_ended", slow_but([True, False], False))
def test_evaluating_on_rows_that_changed_since_training_says_so(tiny_config: Config, has_ended: bool) -> None:
    """Rows kept for evaluation now may have been trained on."""
    run = start_run(tiny_config("own", training={"max_steps": 2}))
    if has_ended:
        run.train(quiet)
    trained = open_trained(run.directory)
    evaluate_trained(trained)
    assert trained.warnings == []
    assert isinstance(run.config.data.train, str)
    rows = Path(run.config.data.train)
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    evaluate_trained(trained)
    (warning,) = trained.warnings
    assert "changed since training" in warning


@pytest.mark.slow
def test_a_finished_run_needs_no_checkpoints(finished: Path) -> None:
    expected = evaluate_trained(open_trained(finished))
    shutil.rmtree(finished / "checkpoints")
    trained = open_trained(finished)
    assert trained.source == "the final adapter"
    assert evaluate_trained(trained) == expected


@pytest.mark.slow
def test_the_adapter_with_more_steps_is_opened(tiny_config: Config, finished: Path) -> None:
    longer = start_run(tiny_config("longer", training={"max_steps": 4}))
    longer.train(quiet, stop_after=3)
    shutil.copytree(finished / "adapter", longer.directory / "adapter")
    assert open_trained(longer.directory).source == "the checkpoint of step 3; training has not ended"
    shutil.rmtree(longer.directory / "checkpoints")
    assert open_trained(longer.directory).source == "the final adapter"
