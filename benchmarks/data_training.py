"""Compare packed with padded training on a CPU, in useful tokens a second.

All train the same rows in the same steps, from the same adapter, each in a process of its own; so their losses must
agree, and the command fails where they differ by more than 1e-4, relatively.

  packed            rows end to end, attention keeps them apart: no token is padding
  padded, sorted    `data.packing=false`: micro-batches of rows of like length, padded to their longest
  padded, in order  micro-batches of the step's rows as they come, padded to their longest, as most trainers do

Useful tokens are those of rows; padding is computed and not counted. Time is that of all steps but the first, which
warms up; per core-second is by the processor's time, which other work on the machine changes little. Memory is the
peak of what the processes held privately in the steps.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.contenders import Meter, Result
from benchmarks.cpu_training import child_environment, rate
from benchmarks.processes import end_job, run_job
from qlora_trainer.runs.resume_rules import cpu_name

LAYOUTS = ("packed", "padded, sorted", "padded, in order")
TOLERANCE = 1e-4  # of losses, relative


@dataclasses.dataclass(frozen=True)
class LayoutJob:
    """Hold what one process does."""

    layout: str
    model: str
    rows: str
    steps: int
    batch_size: int
    max_length: int
    micro_batch_tokens: int
    work: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="directory of safetensors, or a .gguf file")
    parser.add_argument("rows", type=Path, help="a file of rows that the trainer reads")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps, the first of them to warm up")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of a step")
    parser.add_argument("--max-length", type=int, default=512, help="longest row, in tokens")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))


def run(options: argparse.Namespace) -> None:
    """Measure all layouts and print the table.

    Args:
        options: of the command line.
    """
    if options.steps < 2:
        sys.exit("--steps must be at least 2: the first step is left out")
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as work:
        for layout in LAYOUTS:
            job = LayoutJob(
                layout,
                options.model,
                str(options.rows.resolve()),
                options.steps,
                options.batch_size,
                options.max_length,
                options.micro_batch_tokens,
                work,
            )
            results[layout] = _measure(job, options.threads)
    packed = results["packed"]
    print(
        f"{cpu_name()}, {options.threads} threads, torch {torch.__version__}; {options.steps} steps of "
        f"{options.batch_size} rows of up to {options.max_length} tokens, {sum(packed.tokens) / options.steps:,.0f} "
        f"tokens a step in micro-batches of up to {options.micro_batch_tokens:,}"
    )
    print(table(results))
    differences = [
        abs(one - other) / other
        for result in results.values()
        for one, other in zip(result.losses, packed.losses, strict=True)
    ]
    print(f"losses {' '.join(f'{loss:.4f}' for loss in packed.losses)}, differing by at most {max(differences):.1e}")
    if not max(differences) <= TOLERANCE:
        sys.exit(f"The losses differ by more than {TOLERANCE:g}.")


def table(results: dict[str, Result]) -> str:
    """Write one line a layout; `times` compares core-seconds with rows padded in order.

    Args:
        results: by layout.

    Returns:
        The lines.
    """
    cells = [
        ["", "useful", "with", "useful per", "times", "fill", "peak private"],
        ["", "tokens/s", "padding", "core-second", "in order", "", "memory"],
    ]
    in_order = results["padded, in order"]
    for name, result in results.items():
        per_core = rate(result.tokens, result.cpu_seconds)
        cells.append(
            [
                name,
                f"{rate(result.tokens, result.seconds):.1f}",
                f"{rate(result.computed_tokens, result.seconds):.1f}",
                f"{per_core:.1f}",
                f"{per_core / rate(in_order.tokens, in_order.cpu_seconds):.2f}",
                f"{sum(result.tokens) / sum(result.computed_tokens):.0%}",
                f"{result.peak_bytes / 2**30:.2f} GiB",
            ]
        )
    return "\n".join(f"{name:18}" + "".join(f"{cell:>14}" for cell in line) for name, *line in cells)


def _measure(job: LayoutJob, threads: int) -> Result:
    """Run a job in a process of its own; exits with its last lines where it fails."""
    command = [sys.executable, "-m", "benchmarks.data_training"]
    found = run_job(job.layout, command, job, Path(job.work), child_environment(threads, "returning"))
    return Result(**found) if found else sys.exit(1)


def train(job: LayoutJob) -> Result:
    """Train as the job says, at the trainer's defaults otherwise, in fp32.

    Args:
        job: layout, model and rows.

    Returns:
        Losses and figures.
    """
    from qlora_trainer.config.load import make_config
    from qlora_trainer.data.batching import packing
    from qlora_trainer.runs.start import start_run

    if job.layout == "padded, in order":
        packing._group_padded = _in_order
    config = make_config(
        {
            "model": {"name": job.model, "device": "cpu", "compute_dtype": "float32"},
            "data": {
                "train": job.rows,
                "eval": 0.0,
                "max_length": job.max_length,
                "packing": job.layout == "packed",
            },
            "training": {
                "output_dir": str(Path(job.work) / job.layout),
                "max_steps": job.steps,
                "global_batch_size": job.batch_size,
                "micro_batch_tokens": job.micro_batch_tokens,
            },
        }
    )
    made = start_run(config)
    loader = made.state.loader
    packs = [loader.next() for _ in range(job.steps)]
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "step": 0})
    meter = Meter()
    made.train(lambda record: meter.note(record["loss"], record["tokens"] / record["tokens_per_second"]))
    return Result(
        losses=meter.losses,
        seconds=meter.seconds,
        cpu_seconds=meter.cpu_seconds,
        tokens=[sum(pack.tokens for pack in step) for step in packs],
        computed_tokens=[sum(pack.input_ids.numel() for pack in step) for step in packs],
        peak_bytes=meter.peak_bytes,
        settings=job.layout,
    )


def _in_order(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Group rows in their order, as many as fit when padded to the longest of them."""
    groups: list[list[int]] = []
    for index, length in enumerate(lengths):
        if groups and (len(groups[-1]) + 1) * max(length, *(lengths[i] for i in groups[-1])) <= limit:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


if __name__ == "__main__":
    end_job(sys.argv[1], sys.argv[2], lambda job: train(LayoutJob(**job)))
