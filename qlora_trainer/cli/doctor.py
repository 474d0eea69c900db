"""Declare `qlora doctor`: print what doctor_checks.py and doctor_base.py find, and exit 1 if something is wrong."""

import json
from pathlib import Path
from typing import Annotated

import typer

from qlora_trainer.cli.arguments import AsJson
from qlora_trainer.cli.console import ProgressBars, print_findings, write_out
from qlora_trainer.cli.findings import Finding


def doctor(
    run: Annotated[
        Path | None, typer.Argument(help="A run directory: check that its base is unchanged, byte for byte.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Examine this machine: versions, devices, and that 4-bit weights are exact. Exit 1 if there is a problem.

    With a run directory, check too that the run's base is unchanged, byte for byte. A run's start skips this while file
    sizes and times are unchanged.
    """
    from dataclasses import asdict

    from qlora_trainer.cli.doctor_checks import examine
    from qlora_trainer.common.cache import user_cache
    from qlora_trainer.common.errors import DiskError

    try:
        findings = examine(user_cache())
    except DiskError as error:  # a user without a home
        findings = [*examine(), Finding("Disk of the cache", "problem", str(error), "Set XDG_CACHE_HOME to a folder.")]
    if run is not None:
        from qlora_trainer.cli.doctor_base import verified_base

        with ProgressBars("Nothing was changed.") as progress:
            findings.append(verified_base(run, progress))
    if as_json:
        write_out(json.dumps([asdict(finding) for finding in findings]) + "\n")
    else:
        print_findings([(each.status, each.name, each.detail, each.advice) for each in findings])
    if any(finding.status == "problem" for finding in findings):
        raise typer.Exit(1)
