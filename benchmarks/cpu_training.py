"""Measure trained tokens a second and peak private memory on a CPU: ours, a peft + bitsandbytes loop, and TRL.

    python -m benchmarks.cpu_training MODEL ROWS [--steps N] [--batch-size N] [--rank R] [--threads N ...]
                                      [--micro-batch-tokens N] [--allocator returning|default] [--trl-python PYTHON]
                                      [--without NAME ...]

All three learn the same label tokens of the same rows in the same steps, on the same NF4 base with an adapter on every
linear layer, each in a process of its own. Ours and the loop compute in fp32 from the same adapter at the same learning
rates, so their losses must agree: the command fails where they differ by more than 1e-3, relatively. TRL runs at its
defaults, which compute in bf16 and train bf16 adapters at another rate; its losses are shown and not judged. TRL is no
part of this project: `--trl-python` names an interpreter that has it and the same torch, transformers, peft and
bitsandbytes; where it is missing the command says so and goes on.

Useful tokens are those of rows; padding is computed and not counted. Time is that of all steps but the first, which
warms up; per core-second is by the processor's time over all threads, which other work on the machine changes little.
Peak memory is the peak resident set of the steps, less what files back. With `--allocator returning`, the default,
every process gives freed blocks of 64 KiB and more back to the system at once, so that the peak is of what was in use,
not of what the allocator kept; that costs all contenders time. `--allocator default` leaves glibc as it is.

With several numbers of --threads all is measured with each, one after the other, and the last line says how many times
as fast ours is with the last of them as with the first.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.contenders import ON_CPU, Job, Result
from benchmarks.processes import run_job
from qlora_trainer.runs.resume_rules import cpu_name

PEER = "hand-written loop"
TOLERANCE = 1e-3  # of losses, relative
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def measure(name: str, job: Job, python: str, environment: Mapping[str, str]) -> Result | None:
    """Run a contender in a process of its own; None where it failed, after its last lines."""
    found = run_job(name, [python, "-m", "benchmarks.contenders", name], job, Path(job.work), environment)
    return Result(**found) if found else None


def child_environment(threads: int, allocator: str) -> dict[str, str]:
    """Return the environment of every contender."""
    root = str(Path(__file__).resolve().parent.parent)  # for an interpreter in which this project is not installed
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        **(RETURNING if allocator == "returning" else {}),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def has_trl(python: str) -> bool:
    """Return True if that interpreter finds TRL."""
    command = [python, "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('trl') is None)"]
    return subprocess.run(command).returncode == 0


def rate(tokens: list[int], seconds: list[float]) -> float:
    """Compute tokens a second, the first step left out."""
    return sum(tokens[1:]) / sum(seconds[1:])


def largest_difference(result: Result, peer: Result) -> float:
    """Compute the largest difference of the steps' losses, relative to the peer's."""
    return max(abs(one - other) / other for one, other in zip(result.losses, peer.losses, strict=True))


def table(results: Mapping[str, Result]) -> str:
    """Write one line a contender, relative to the hand-written loop where that was measured."""
    cells = [
        ["", "useful", "times", "with", "useful per", "peak private", "times", "losses'"],
        ["", "tokens/s", "the loop", "padding", "core-second", "memory", "the loop", "difference"],
    ]
    peer = results.get(PEER)
    for name, result in results.items():
        useful = rate(result.tokens, result.seconds)
        cells.append(
            [
                name,
                f"{useful:.1f}",
                f"{useful / rate(peer.tokens, peer.seconds):.2f}" if peer else "",
                f"{rate(result.computed_tokens, result.seconds):.1f}",
                f"{rate(result.tokens, result.cpu_seconds):.1f}",
                f"{result.peak_bytes / 2**30:.2f} GiB",
                f"{result.peak_bytes / peer.peak_bytes:.2f}" if peer else "",
                f"{largest_difference(result, peer):.1e}" if peer else "",
            ]
        )
    return "\n".join(f"{name:18}" + "".join(f"{cell:>14}" for cell in line) for name, *line in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of safetensors, or a .gguf file")
    parser.add_argument("rows", type=Path, help="a file of rows that the trainer reads")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps, the first of them to warm up")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, nargs="+", default=[len(os.sched_getaffinity(0))])
    parser.add_argument("--micro-batch-tokens", type=int, help="of ours; by default as `auto` chooses")
    parser.add_argument("--allocator", choices=["returning", "default"], default="returning")
    parser.add_argument("--trl-python", default=sys.executable, help="an interpreter that has TRL")
    parser.add_argument("--without", nargs="*", default=[], choices=[name for name in ON_CPU if name != "ours"])
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first step is left out")

    rates, failed = [], False
    for threads in options.threads:
        results, holds = compare(options, threads)
        failed |= not holds
        if "ours" not in results:
            sys.exit(1)  # the others read what it writes
        rates.append(rate(results["ours"].tokens, results["ours"].seconds))
    if len(rates) > 1:
        print(
            f"ours: {options.threads[-1]} threads are {rates[-1] / rates[0]:.2f} times as fast as {options.threads[0]}"
        )
    sys.exit(1 if failed else 0)


def compare(options: argparse.Namespace, threads: int) -> tuple[dict[str, Result], bool]:
    """Measure all contenders and print their table; return what was measured, and True if losses agree."""
    environment = child_environment(threads, options.allocator)
    results: dict[str, Result] = {}
    holds = True
    with tempfile.TemporaryDirectory() as work:
        rows = str(options.rows.resolve())
        job = Job(
            options.model,
            rows,
            options.steps,
            options.batch_size,
            options.rank,
            work,
            micro_batch_tokens=options.micro_batch_tokens,
        )
        for name in ON_CPU:
            python = options.trl_python if name == "TRL" else sys.executable
            if name in options.without:
                continue
            if name == "TRL" and not has_trl(python):
                print(f"TRL is left out: {python} does not have it. --trl-python names an interpreter that has.")
                continue
            if result := measure(name, job, python, environment):
                results[name] = result
                continue
            holds = False
            if name == "ours":
                return results, False

    mean = sum(results["ours"].tokens) / options.steps
    print(
        f"{cpu_name()}, {threads} threads, torch {torch.__version__}; {options.steps} steps of "
        f"{options.batch_size} rows, {mean:,.0f} tokens a step, rank {options.rank} on all linear layers, "
        f"{options.allocator} allocator"
    )
    print(table(results))
    for name, result in results.items():
        print(f"{name}: {result.settings}; losses {' '.join(f'{loss:.4f}' for loss in result.losses)}")
    if peer := results.get(PEER):
        for name in ("ours", "ours, full"):
            if name in results and not largest_difference(results[name], peer) <= TOLERANCE:
                holds = False
                print(f"The losses of {name} differ from those of the {PEER} by more than {TOLERANCE:g}.")
    return results, holds


if __name__ == "__main__":
    main()
