"""Declare `qlora train` and `qlora resume`: make a run, train it under progress bars, and print its summary."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_trainer.cli.arguments import Overrides, RunDirectory
from qlora_trainer.cli.console import ProgressBars, TrainingBar, print_table, print_warnings, say

if TYPE_CHECKING:
    from qlora_trainer.runs.run import Run


def train_command(
    config: Annotated[Path, typer.Argument(help="A YAML config; configs/ has examples.")], overrides: Overrides = None
) -> None:
    """Fine-tune a model: load the base in 4 bits, train adapters, evaluate, save checkpoints, write the report."""
    from qlora_trainer.config.load import load_config
    from qlora_trainer.runs.start import start_run

    settings = load_config(config, overrides or [])
    with ProgressBars() as progress:
        run = start_run(settings, progress)
        run.answer_samples("before", progress)
    _train(run)


def resume(run_dir: RunDirectory, overrides: Overrides = None) -> None:
    """Continue an interrupted run from its newest valid checkpoint, bit for bit.

    Only config fields that do not change the run's result may be set, such as training.activation_checkpointing=full
    after memory ran out.
    """
    from qlora_trainer.runs.start import resume_run

    with ProgressBars() as progress:
        run = resume_run(run_dir, overrides=overrides or [], progress=progress)
    say(f"Resuming {run_dir} at step {run.state.step} of {run.state.total_steps}.")
    _train(run)


def _train(run: "Run") -> None:
    """Train a new or resumed run to its end or interruption, and write its report."""
    from qlora_trainer.runs.report.summary import summarize, write_run_report

    print_warnings(run.warnings)
    print_table("Run", summarize(run))
    with TrainingBar(run.state.total_steps, run.state.step) as bar:
        finished = run.train(bar)
    if finished:
        reported = len(run.warnings)
        with ProgressBars() as progress:
            run.answer_samples("after", progress)
        print_warnings(run.warnings[reported:])
    report = write_run_report(run)
    if not finished:
        say(f"Stopped at step {run.state.step} and saved. To continue: ", command=f"qlora resume {run.directory}")
        return
    say(f"Adapter: {run.directory / 'adapter'}")
    for change in run.changes:
        say(f"         {change}")
    say(f"Report:  {report}")
    say("Next:    ", command=f"qlora merge {run.directory} --output {run.directory}-merged")
