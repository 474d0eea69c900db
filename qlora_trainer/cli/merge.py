"""Declare `qlora merge`: fold a run's adapter into its base and print what was verified."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_trainer.cli.arguments import AsJson, RunDirectory
from qlora_trainer.cli.console import ProgressBars, print_table, print_warnings, write_out
from qlora_trainer.common.units import counted, gibibytes


class MergeDtype(StrEnum):
    """List the dtypes of merged weights."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class MergeBaseChoice(StrEnum):
    """List the bases to fold into: the dequantized one that was trained, the original, or whichever measures better."""

    auto = "auto"
    dequantized = "dequantized"
    original = "original"


def merge_command(
    run_dir: RunDirectory,
    output: Annotated[Path, typer.Option(help="A new or empty directory for the merged model.")],
    dtype: Annotated[
        MergeDtype | None,
        typer.Option(help="Dtype of the merged weights; default: float16, or bfloat16 where that is too narrow."),
    ] = None,
    base: Annotated[
        MergeBaseChoice,
        typer.Option(help="Fold into the dequantized base that was trained, or the original; auto measures both."),
    ] = MergeBaseChoice.auto,
    shard_size: Annotated[
        str, typer.Option(help="Largest file of weights, such as 5GB or 2GiB; a larger tensor has a file of its own.")
    ] = "5GB",
    model: Annotated[
        str | None,
        typer.Option(
            help="Merge from this copy of the run's base, such as a prequantized one; default: the run's own."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fold the adapter into the base, verify the result, and write a plain transformers model."""
    import torch

    from qlora_trainer.common.units import parse_bytes
    from qlora_trainer.merging.merge_run import merge_run

    max_shard_bytes = parse_bytes(shard_size)
    left = f"A part of it may be left next to {output}; the next start deletes it."
    with ProgressBars("No merged model is written.", left) as progress:
        done = merge_run(
            run_dir,
            output,
            dtype=getattr(torch, dtype.value) if dtype else None,
            base=base.value,
            model=model,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
    if as_json:
        write_out(json.dumps(done.to_json()) + "\n")
        return
    print_warnings(done.warnings)
    print_table(f"Merged model in {output}", merge_rows(done))


def merge_rows(done: Any) -> list[tuple[str, str]]:
    """Describe a merge for people.

    Args:
        done: the Deployment that `merge_run` returned.

    Returns:
        (name, value) pairs.
    """
    report, checked = done.report, done.report.verification
    difference = checked.difference
    rows = [
        ("base", f"{report.base}: {done.choice.reason}"),
        (
            "weights",
            f"{counted(report.tensors, 'tensor')}, {gibibytes(report.bytes)}, {report.dtype}, {report.folded} folded",
        ),
        (
            "verified",
            f"KL {difference.kl:.1e}, of which rounding to {report.dtype} costs {checked.rounding.kl:.1e} and "
            f"{checked.beyond_rounding.kl:.0e} is beyond it (at most {checked.kl_bound:.0e}); same first choice "
            f"{difference.top1_agreement:.1%}",
        ),
    ]
    if checked.plain:
        rows.append(("transformers", str(checked.plain)))
    rows += [("changed", change) for change in report.changes]
    if report.flushed_to_zero:
        rows.append(
            (
                "flushed",
                f"{counted(report.flushed_to_zero, 'value')} became zero in {report.dtype}; bfloat16 does not "
                f"lose them",
            )
        )
    if done.difference_from_trained:
        rows.append(("trained vs original base", f"KL {done.difference_from_trained.kl:.1e}"))
    return rows
