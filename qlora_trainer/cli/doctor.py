"""Declare `qlora doctor`: print what doctor_checks.py finds, and exit 1 if something is wrong."""

import json

import typer

from qlora_trainer.cli.arguments import AsJson
from qlora_trainer.cli.console import print_findings, write_out
from qlora_trainer.cli.findings import Finding


def doctor(as_json: AsJson = False) -> None:
    """Examine this machine: versions, devices, and that 4-bit weights are right. Exit 1 if something is wrong.

    The JSON is a list of findings: name, status (ok, note, problem), detail, advice.
    """
    from dataclasses import asdict

    from qlora_trainer.cli.doctor_checks import examine
    from qlora_trainer.common.cache import user_cache
    from qlora_trainer.common.errors import DiskError

    try:
        findings = examine(user_cache())
    except DiskError as error:  # a user without a home
        findings = [*examine(), Finding("Disk of the cache", "problem", str(error), "Set XDG_CACHE_HOME to a folder.")]
    if as_json:
        write_out(json.dumps([asdict(finding) for finding in findings]) + "\n")
    else:
        print_findings([(each.status, each.name, each.detail, each.advice) for each in findings])
    if any(finding.status == "problem" for finding in findings):
        raise typer.Exit(1)
