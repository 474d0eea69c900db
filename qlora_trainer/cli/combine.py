"""Declare `qlora combine`: make one adapter of several.

Modules that import torch are imported inside the command, so that `qlora --help` prints at once.
"""

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from qlora_trainer.adapters.arithmetic.methods import CombineMethod, CombineSettings
from qlora_trainer.cli.arguments import AsJson
from qlora_trainer.cli.console import ProgressBars, print_table, print_warnings, write_out


def combine(
    adapters: Annotated[
        list[str],
        typer.Argument(help="PATH:WEIGHT of each: a run directory, or that of a PEFT adapter; the first run's config."),
    ],
    output: Annotated[Path, typer.Option(help="A new or empty directory for the combined run.")],
    method: Annotated[
        CombineMethod,
        typer.Option(
            help="cat: the weighted sum itself, of the ranks' sum. svd: that, cut to --rank. linear: sums of the "
            "factors, a rough one. ties and dare_…: prune before they sum; with _svd the deltas, else the factors."
        ),
    ] = "cat",
    rank: Annotated[int | None, typer.Option(help="Rank of the result, of svd and …_svd.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of the values that ties and dare_… keep.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of what dare_… drops; 0 by default.")] = None,
    original_base: Annotated[
        bool,
        typer.Option(
            "--original-base",
            help="Of runs whose start was taken out of their base (adapter.init): make one for the original base.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make one LoRA adapter of several of the same base, by a weighted sum.

    The output is a run directory with the adapter in it, which evaluate, generate and merge take.
    """
    from qlora_trainer.common.atomic import refuse_existing

    settings = CombineSettings(method, rank, density, seed)
    settings.check()
    sources = [read_weighted(text) for text in adapters]
    refuse_existing(output)

    from qlora_trainer.runs.combined import combine_runs

    with ProgressBars("No adapter is written.") as progress:
        report = combine_runs(sources, output, settings, original_base=original_base, progress=progress)
    if as_json:
        write_out(json.dumps({"output": str(output), **report.to_json()}) + "\n")
        return
    print_warnings(report.warnings)
    print_table(
        f"Combined adapter in {output}/adapter",
        [
            ("layers", f"{report.layers}, of rank {report.rank} at most"),
            ("method", f"{report.method}; {report.difference:.2%} from the weighted sum"),
        ],
    )


def read_weighted(text: str) -> tuple[Path, float]:
    """Read a directory and its weight.

    Args:
        text: PATH:WEIGHT.

    Returns:
        (directory, weight).

    Raises:
        ConfigError: it has no weight, or one that is no number or has no effect.
    """
    from qlora_trainer.common.errors import ConfigError

    path, _, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        path, weight = "", math.nan
    if not path or not math.isfinite(weight) or weight == 0.0:
        raise ConfigError(
            f"{text} has no weight. Write the directory, a colon and a number that is not 0, such as "
            f"{path or text.rstrip(':')}:0.5"
        )
    return Path(path), weight
