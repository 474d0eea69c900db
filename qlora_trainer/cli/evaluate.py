"""Declare `qlora evaluate`: measure a run's adapter, the final one or the newest checkpoint's."""

import json
import math
from typing import Annotated

import typer

from qlora_trainer.cli.arguments import AsJson, RunDirectory
from qlora_trainer.cli.console import ProgressBars, print_table, print_warnings, write_out


def evaluate(
    run_dir: RunDirectory,
    answers: Annotated[int, typer.Option(help="Also answer this many eval rows and count exact matches; -1: all.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure a run's adapter on its eval rows: loss, perplexity and, with --answers, exact match."""
    from qlora_trainer.data.preparation.source_keys import check_files
    from qlora_trainer.runs.directory import read_run_config
    from qlora_trainer.runs.trained import evaluate_trained, open_trained

    check_files(read_run_config(run_dir).data)  # before the base is read
    with ProgressBars("Nothing was written.") as progress:
        trained = open_trained(run_dir, progress=progress)
        result = evaluate_trained(trained, answers, progress)
    print_warnings(trained.warnings)
    if as_json:
        write_out(json.dumps({key: value if math.isfinite(value) else None for key, value in result.items()}) + "\n")
    else:
        print_table(f"{run_dir}, {trained.source}", [(key, f"{value:.6g}") for key, value in result.items()])
