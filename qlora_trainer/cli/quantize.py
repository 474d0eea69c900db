"""Declare `qlora quantize`: write a base in 4 bits, without a run.

Modules that import torch are imported inside the command, so that `qlora --help` prints at once.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora_trainer.cli.arguments import AsJson
from qlora_trainer.cli.console import ProgressBars, print_table, print_warnings, write_out
from qlora_trainer.common.units import counted, gibibytes


def quantize(
    model: Annotated[str, typer.Argument(help="Hub name, directory of safetensors, or a .gguf file.")],
    output: Annotated[Path, typer.Option(help="A new or empty directory for the 4-bit model.")],
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch on the hub.")] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where to quantize; auto: CUDA if there is a GPU.")
    ] = "auto",
    init: Annotated[
        Literal["olora", "pissa", "loftq"] | None,
        typer.Option(help="Take this start of adapters out of the weights, for a run with that adapter.init."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Rank of that start, of all linear layers; its alpha is twice the rank."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model in 4 bits (NF4) that loads in seconds, here and in plain transformers with bitsandbytes.

    It trains as the original does, and takes a third of its space. With --init it is what a start of adapters leaves of
    the weights, and the start is next to it, in OUTPUT/start.
    """
    from qlora_trainer.common.atomic import refuse_existing
    from qlora_trainer.common.errors import ConfigError
    from qlora_trainer.weights.place import local_model

    if init and rank is None:
        raise ConfigError(f"--init {init} needs --rank, such as --rank 16: that of the run's adapters.")
    if rank is not None and not init:
        raise ConfigError("--rank has no effect without --init; leave it out.")
    refuse_existing(output)
    local_model(model)  # before torch is imported

    from qlora_trainer.common.cache import user_cache
    from qlora_trainer.model.device import choose_device
    from qlora_trainer.model.quantized_copy import quantize_checkpoint
    from qlora_trainer.model.source import resolve_model

    left = f"A part of it may be left next to {output}; the next start deletes it."
    with ProgressBars("No 4-bit model is written.", left) as progress:
        directory = resolve_model(model, revision, user_cache(), progress)
        place = choose_device(device)
        if init and rank:
            from qlora_trainer.runs.base_start import command_settings, quantize_with_start

            settings = command_settings(init, rank)
            report = quantize_with_start(
                directory, output, settings, name=model, revision=revision, device=place, progress=progress
            )
        else:
            report = quantize_checkpoint(directory, output, device=place, progress=progress)
    if as_json:
        write_out(json.dumps({"output": str(output), **report.to_json()}) + "\n")
        return
    taken_out = []
    if report.start:
        error, plain = report.start["error"], report.start["plain_error"]
        taken_out = [
            ("start", f"{init} of rank {rank}, in {output}/start"),
            ("error", f"{error:.2%} of the weights with the start; {plain:.2%} in plain NF4"),
        ]
    print_table(
        f"4-bit model in {output}",
        [
            (
                "weights",
                f"{report.weights} in NF4, quantized from {report.source_dtype}; "
                f"{counted(report.dense, 'tensor')} as is",
            ),
            ("size", f"{gibibytes(report.bytes)}, of {gibibytes(report.source_bytes)}"),
            *taken_out,
        ],
    )
    print_warnings(report.warnings)
