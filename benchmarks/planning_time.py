"""Print the processor time in which `qlora plan` chooses how to train an 8B, next to what another checkout takes.

    python -m benchmarks.planning_time [--before DIRECTORY] [--model NAME] [--gpu NAME] [--memory AMOUNT]
                                       [--lengths N ...] [--turns N]

Each plan is a process of its own, on one thread: at every length with policy and size of a micro-batch left open, and
with a policy that the user set, which is planned and next to which a faster way is looked for. The searches for the
longest rows are left out. Imports are counted.

DIRECTORY is a worktree of a commit before the time of a step was estimated, such as 3619388; it plans in turn with this
one, for a card of --memory, as it knows no card by name. Exit 1 where the median of --turns here is more than 1.5 times
that there.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.processes import cpu_seconds

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "benchmarks" / "models"
MOST = 1.5  # times what planning took before
SETTINGS = {"auto": (), "full, set by the user": ("training.activation_checkpointing=full",)}


def planning_seconds(checkout: Path, *words: str) -> float:
    """Plan by the command line of a checkout, and measure its processor time, user and system."""
    paths = [str(checkout), str(checkout / "kernels")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "qlora_trainer", "plan", *words, "--no-search", "--json"]
    before = cpu_seconds(of_children=True)
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{checkout}: {done.stderr.strip()[-1000:]}")
    return cpu_seconds(of_children=True) - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="DIRECTORY")
    parser.add_argument("--model", default="llama-3.1-8b", choices=sorted(path.name for path in MODELS.iterdir()))
    parser.add_argument("--gpu", default="RTX 4090")
    parser.add_argument("--memory", default="24GB")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 40960])
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    holds = True
    print(f"seconds of the processor to plan {options.model} on {options.gpu}, {options.memory}, with imports")
    for length in options.lengths:
        for name, overrides in SETTINGS.items():
            model = ("--model", str(MODELS / options.model), "--rank", "16", "--max-length", str(length))
            words = (*overrides, *model, "--host-memory", "64GB", "--gpu-memory", options.memory)
            here, there = [], []
            for _ in range(options.turns):
                here.append(planning_seconds(ROOT, *words, "--gpu", options.gpu))
                if options.before:
                    there.append(planning_seconds(options.before.resolve(), *words))
            line = f"{length:7,} tokens, {name:22}{statistics.median(here):8.1f} s"
            if there:
                ratio = statistics.median(here) / statistics.median(there)
                holds = holds and ratio <= MOST
                line += f", before {statistics.median(there):.1f} s: {ratio:.2f} times"
            print(line, flush=True)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
