"""Declare `qlora train` and `qlora resume`: make a run, train it under progress bars, and print its summary."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_trainer.cli.arguments import (
    ConfigFile,
    MaxLength,
    ModelName,
    Overrides,
    Rank,
    RowFiles,
    RunDirectory,
    check_inputs,
    read_settings,
)
from qlora_trainer.cli.console import ProgressBars, TrainingBar, answers, console, print_table, print_warnings, say
from qlora_trainer.cli.stopping import Training, doing
from qlora_trainer.common.command_line import command_line

if TYPE_CHECKING:
    from qlora_trainer.runs.run import Run


def train_command(
    config: ConfigFile = None,
    overrides: Overrides = None,
    model: ModelName = None,
    data: RowFiles = None,
    eval_set: Annotated[
        str | None, typer.Option("--eval", help="File of eval rows, or the share of rows to keep for it (data.eval).")
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="The run directory, new or empty (training.output_dir); default: runs/my-run.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the rows (training.epochs).")] = None,
    rank: Rank = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate (optimizer.learning_rate).")] = None,
    max_length: MaxLength = None,
) -> None:
    """Fine-tune a model: load the base in 4 bits, train adapters, evaluate, save checkpoints, write the report.

    Without a config: qlora train --model Qwen/Qwen3-8B --data rows.jsonl. An option sets the key in its parentheses,
    over what a config says; all keys are in the run's config.yaml.
    """
    from qlora_trainer.common.atomic import refuse_existing

    options = {
        "model.name": model,
        "data.train": data,
        "data.eval": eval_set,
        "training.output_dir": output,
        "training.epochs": epochs,
        "adapter.rank": rank,
        "optimizer.learning_rate": learning_rate,
        "data.max_length": max_length,
    }
    settings = read_settings("train", config, overrides or [], options)
    refuse_existing(Path(settings.training.output_dir))
    check_inputs(settings)

    from qlora_trainer.runs.start import start_run  # imports torch

    left = "A part of it may be left next to training.output_dir; the next start deletes it."
    with ProgressBars("No run directory is made.", left) as progress:
        run = start_run(settings, progress)
    with ProgressBars(_continue_later(run)) as progress:
        run.answer_samples("before", progress)
    _train(run)


def resume(run_dir: RunDirectory, overrides: Overrides = None) -> None:
    """Continue an interrupted run from its newest valid checkpoint, bit for bit.

    Only config fields that do not change the run's result may be set, such as training.activation_checkpointing=full
    after memory ran out.
    """
    from qlora_trainer.runs.start import resume_run

    with ProgressBars("The run is as it was.") as progress:
        run = resume_run(run_dir, overrides=overrides or [], progress=progress)
    say(f"Resuming {run_dir} at step {run.state.step} of {run.state.total_steps}.")
    _train(run)


def _train(run: "Run") -> None:
    """Train a new or resumed run to its end or interruption, and write its report."""
    from qlora_trainer.adapters.kinds.table import adapter_kind
    from qlora_trainer.planning.other_ways import side_by_side
    from qlora_trainer.runs.report.summary import next_to_full, summarize, write_run_report

    print_warnings(run.warnings)
    print_table("Run", summarize(run), to=console)
    header, *parts = side_by_side(next_to_full(run))
    print_table("Memory next to full fine-tuning", parts, to=console, header=header)
    finished, asked_to_stop = train_with_bar(run)
    left_out = f"The adapter is saved. For samples and report: {_resume_command(run)}"
    with ProgressBars(left_out if finished else _continue_later(run)) as progress:
        if finished and not asked_to_stop:
            reported = len(run.warnings)
            run.answer_samples("after", progress)
            print_warnings(run.warnings[reported:])
        report = write_run_report(run)
    if not finished:
        say_stopped(run)
        return
    say(f"Adapter: {run.directory / 'adapter'}", to=answers)
    for change in run.changes:
        say(f"         {change}", to=answers)
    say(f"Report:  {report}", to=answers)
    kind = adapter_kind(run.config.adapter)
    if not kind.merges:
        say(f"Merges:  {kind.merges_in_words}", to=answers)
        return
    directory = run.directory if run.directory.name not in ("", "..") else run.directory.resolve()
    merged = directory.with_name(f"{directory.name}-merged")
    say("Next:    ", command=command_line("merge", directory, "--output", merged), to=answers)


def train_with_bar(run: "Run", stop_after: int | None = None) -> tuple[bool, bool]:
    """Train under a bar, and answer signals.

    Args:
        run: new or resumed.
        stop_after: the step to stop after; None: the last one.

    Returns:
        (True if the end was reached, True if a signal asked to stop).
    """
    state, training = run.state, run.config.training
    work = Training(
        run.directory, state.step, state.total_steps, training.evaluate_every * bool(len(run.prepared.eval))
    )
    with doing(work), TrainingBar(state.total_steps, state.step, peak_memory_of(run)) as bar:

        def on_step(record: dict[str, Any]) -> None:
            work(record)
            bar(record)

        return run.train(on_step, stop_after, work.progress), work.signals > 0


def peak_memory_of(run: "Run") -> str:
    """Name the memory whose peak a run's metrics have.

    Args:
        run: on a GPU or a CPU.

    Returns:
        Such as "memory of the process".
    """
    return "GPU memory in tensors" if run.base.device.type == "cuda" else "memory of the process"


def say_stopped(run: "Run") -> None:
    """Print where a run stopped and how it is continued.

    Args:
        run: stopped and saved.
    """
    say(f"Stopped at step {run.state.step} and saved. To continue: ", command=_resume_command(run), to=answers)


def _resume_command(run: "Run") -> str:
    return command_line("resume", run.directory)


def _continue_later(run: "Run") -> str:
    return f"The run is saved at step {run.state.step}. To continue: {_resume_command(run)}"
