"""Compare the starts of adapters: eval losses after as many steps, on several data sets and seeds, with intervals.

    python -m benchmarks.adapter_starts [--model MODEL] [--steps 60] [--seeds 0 1 2] [--data NAME ...] [--results FILE]

Every start trains rank --rank on each data set with each seed, which draws A and orders the rows, for --steps steps of
--batch-size rows; then its eval loss is measured. Starts that change the base have a copy each, made once (`qlora
quantize --init`). With several --rates each start has the rate whose losses are lowest on average, as a start may want
another one; that choice is made on the losses that are shown, for all starts alike.

Printed are the mean loss of each start and data set, and its mean difference from Kaiming's of the same data set and
seed, with the 95 % interval of Student's t: over the seeds of a data set, and over all pairs. A start gains where the
last interval is below zero. Results are appended to --results as they come, and a run that is there is not run again.

The data sets are directories of --folder with train.jsonl and test.jsonl. A trial: --steps 2 --seeds 0 1 --data
snips_json --rows 32.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.adapters.arithmetic.starts import STARTS
from qlora_trainer.cli.demo_run import packaged_model
from qlora_trainer.common.cache import user_cache
from qlora_trainer.config.load import make_config
from qlora_trainer.config.schema import AdapterConfig, RunConfig
from qlora_trainer.model.device import choose_device
from qlora_trainer.model.source import resolve_model
from qlora_trainer.runs.base_start import quantize_with_start
from qlora_trainer.runs.start import start_run
from qlora_trainer.training.loop import measure_eval

KAIMING = "kaiming"
ALL_STARTS = (KAIMING, "gaussian", *STARTS)
DATA = ("snips_json", "wikisql", "e2e_facts")
FOLDER = Path(__file__).parents[2] / "shared" / "data"
# Student's t of 95 %, by degrees of freedom from 1 on; beyond the last the normal distribution's is near.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)

Case = tuple[str, str, int, float]
"""(start, data set, seed, learning rate)"""


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Average values; returns the mean and half the width of its 95 % interval, infinite for one value."""
    mean = sum(values) / len(values)
    freedom = len(values) - 1
    if not freedom:
        return mean, math.inf
    variance = sum((value - mean) ** 2 for value in values) / freedom
    return mean, (T95[freedom - 1] if freedom <= len(T95) else 1.96) * math.sqrt(variance / len(values))


def config_of(case: Case, model: str, rows: Path, work: Path, options: argparse.Namespace) -> RunConfig:
    """Make the config of a run."""
    start, data, seed, rate = case
    return make_config(
        {
            "model": {"name": model},
            "adapter": {"rank": options.rank, "alpha": 2.0 * options.rank, "init": start},
            "data": {
                "train": str(rows / data / "train.jsonl"),
                "eval": str(rows / data / "test.jsonl"),
                "max_length": options.max_length,
            },
            "optimizer": {"learning_rate": rate, "schedule": "cosine", "warmup_ratio": 0.05},
            "training": {
                "output_dir": str(work / "-".join(map(str, case))),
                "max_steps": options.steps,
                "global_batch_size": options.batch_size,
                "seed": seed,
                "evaluate_every": 10**6,
                "save_every": 10**6,
            },
            "evaluation": {"samples": 0},
        }
    )


def eval_loss_of(config: RunConfig) -> float:
    """Train to the end, and measure."""
    run = start_run(config)
    run.train(lambda record: None)
    loss = measure_eval(run.state, run.prepared.eval)
    run.release()
    return loss


def copies(model: str, work: Path, options: argparse.Namespace) -> dict[str, str]:
    """Make the base of each start; returns the models by start."""
    models = {}
    for start in options.starts:
        models[start] = model
        if start in STARTS:
            output = work / f"base-{start}"
            settings = AdapterConfig(init=start, rank=options.rank, alpha=2.0 * options.rank)
            device = choose_device("auto")
            directory = resolve_model(model, None, user_cache())
            report = quantize_with_start(directory, output, settings, name=model, device=device)
            assert report.start is not None
            found = report.start
            print(
                f"{start}: error {found['error']:.2%} of the weights, plain NF4's {found['plain_error']:.2%}",
                flush=True,
            )
            models[start] = str(output)
    return models


def first_rows(folder: Path, data: Sequence[str], work: Path, count: int | None) -> Path:
    """Return the folder of the data sets; with a count a copy that has only so many rows of each file."""
    if count is None:
        return folder
    for name, file in product(data, ("train.jsonl", "test.jsonl")):
        (work / "rows" / name).mkdir(parents=True, exist_ok=True)
        with (folder / name / file).open(encoding="utf-8") as lines:
            (work / "rows" / name / file).write_text("".join(islice(lines, count)), encoding="utf-8")
    return work / "rows"


def best_rates(losses: Mapping[Case, float], starts: Sequence[str], rates: Sequence[float]) -> dict[str, float]:
    """Choose for each start the rate with the lowest mean loss."""

    def mean(start: str, rate: float) -> float:
        return mean_and_interval([loss for case, loss in losses.items() if (case[0], case[3]) == (start, rate)])[0]

    return {start: min(rates, key=lambda rate: mean(start, rate)) for start in starts}


def table(losses: Mapping[Case, float], options: argparse.Namespace) -> str:
    """Write a line for each start: its losses, and how they differ from Kaiming's."""
    rates = best_rates(losses, options.starts, options.rates)
    lines = [["start", "rate", *options.data, *(f"{name} - kaiming" for name in options.data), "all - kaiming"]]
    for start in options.starts:
        cells, pairs = [], []
        differences: list[str] = []
        for data in options.data:
            own = [losses[start, data, seed, rates[start]] for seed in options.seeds]
            base = [losses[KAIMING, data, seed, rates[KAIMING]] for seed in options.seeds]
            each = [one - other for one, other in zip(own, base, strict=True)]
            pairs += each
            cells.append(_in_words(own))
            differences.append(_in_words(each, signed=True))
        total = [*differences, _in_words(pairs, signed=True)] if start != KAIMING else []
        lines.append([start, f"{rates[start]:g}", *cells, *total])
    return "\n".join(f"{name:10}{rate:>8}" + "".join(f"{cell:>26}" for cell in line) for name, rate, *line in lines)


def _in_words(values: Sequence[float], signed: bool = False) -> str:
    mean, half = mean_and_interval(values)
    return f"{mean:+.4f} ± {half:.4f}" if signed else f"{mean:.4f} ± {half:.4f}"


def read_results(path: Path | None, subject: dict[str, Any]) -> dict[Case, float]:
    """Read the losses that were measured before, with the same model, steps and sizes."""
    if path is None or not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {tuple(line["case"]): line["eval_loss"] for line in lines if line["subject"] == subject}


def arguments() -> argparse.ArgumentParser:
    """Declare the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="directory or .gguf file; by default the demo's")
    parser.add_argument("--starts", nargs="+", choices=ALL_STARTS, default=list(ALL_STARTS))
    parser.add_argument("--data", nargs="+", default=list(DATA), help="names of directories in --folder")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--rows", type=int, default=None, help="only the first rows of each file")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3], help="learning rates")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step")
    parser.add_argument("--max-length", type=int, default=512, help="longest row, in tokens")
    parser.add_argument("--results", type=Path, default=None, help="a file that losses are appended to")
    return parser


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    if KAIMING not in options.starts:
        parser.error(f"--starts needs {KAIMING}, which the others are compared with")
    model = options.model or packaged_model()
    names = ("rows", "steps", "rank", "batch_size", "max_length")
    subject = {"model": Path(model).name, **{name: getattr(options, name) for name in names}}
    losses = read_results(options.results, subject)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        models, rows = copies(model, work, options), first_rows(options.folder, options.data, work, options.rows)
        for case in product(options.starts, options.data, options.seeds, options.rates):
            if case in losses:
                continue
            losses[case] = eval_loss_of(config_of(case, models[case[0]], rows, work, options))
            print(*case, f"{losses[case]:.4f}", flush=True)
            if options.results:
                with options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"subject": subject, "case": case, "eval_loss": losses[case]}) + "\n")
    print(f"torch {torch.__version__}, {subject}, seeds {options.seeds}: eval losses with 95 % intervals")
    print(table(losses, options))


if __name__ == "__main__":
    main()
