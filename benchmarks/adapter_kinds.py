"""Compare the kinds of adapters on the demo's task: numbers, file, planned memory, speed, and what equal time gives.

    python -m benchmarks.adapter_kinds [--model MODEL] [--minutes N] [--kinds NAME ...] [--answers N]

Every kind trains the demo's rows for --minutes by the clock: a first run of a few steps tells how long a step takes,
and a second has as many steps as fit, with its learning rate going down to the last of them. Then its eval loss is
measured and --answers eval requests are answered. Learning rates differ by kind
(RATES): LoRA's is the demo's, the others were chosen once and not tuned.

Tokens a second are useful tokens of the second run. On a busy machine they fall for all kinds, and so do steps; only
what one run prints can be compared.
"""

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

from qlora_trainer.cli.demo_run import copy_demo_rows, demo_settings, packaged_model
from qlora_trainer.common.units import gib
from qlora_trainer.config.load import make_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning.memory_plan import plan_memory
from qlora_trainer.runs.run import Run
from qlora_trainer.runs.start import start_run
from qlora_trainer.training.evaluation import answer_prompts, eval_prompts, exact_match
from qlora_trainer.training.loop import measure_eval

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 16, "alpha": 32},
    "dora": {"kind": "dora", "rank": 16, "alpha": 32},
    "ia3": {"kind": "ia3"},
    "bottleneck": {"kind": "bottleneck", "bottleneck_size": 64},
    "prompt": {"kind": "prompt", "virtual_tokens": 20},
    "prefix": {"kind": "prefix", "virtual_tokens": 20},
}
RATES = {"lora": 1e-3, "dora": 1e-3, "ia3": 1e-2, "bottleneck": 1e-3, "prompt": 3e-2, "prefix": 1e-2}
FIRST_STEPS = 4
"""Steps of the run that tells how long a step takes; the first of them is left out."""


def config_of(kind: str, model: str, work: Path, steps: int) -> RunConfig:
    """Make the config of a run in the directory that has the rows."""
    settings = demo_settings(model, work, work)
    settings["adapter"] = KINDS[kind]
    settings["optimizer"] = {**settings["optimizer"], "learning_rate": RATES[kind]}
    settings["training"] = {
        **settings["training"],
        "output_dir": str(work / f"{kind}-{steps}"),
        "max_steps": steps,
        "evaluate_every": 10**6,
        "save_every": 10**6,
    }
    settings["evaluation"] = {"samples": 0}
    return make_config(settings)


def train(config: RunConfig) -> tuple[Run, list[float], int]:
    """Train to the end; returns the run, the seconds of each step, and the tokens of all steps but the first."""
    run, seconds, tokens = start_run(config), [], []

    def note(record: dict[str, Any]) -> None:
        seconds.append(record["tokens"] / record["tokens_per_second"])
        tokens.append(record["tokens"])

    run.train(note)
    return run, seconds, sum(tokens[1:])


def measure(kind: str, model: str, work: Path, minutes: float, answers: int) -> list[str]:
    """Train a kind for so many minutes; returns the cells of its line."""
    first, seconds, _ = train(config_of(kind, model, work, FIRST_STEPS))
    first.release()
    steps = max(math.floor(60 * minutes / (sum(seconds[1:]) / (len(seconds) - 1))), FIRST_STEPS)
    config = config_of(kind, model, work, steps)
    run, seconds, tokens = train(config)
    planned = plan_memory(run.base.directory, run.config)
    size = (run.directory / "adapter" / "adapter_model.safetensors").stat().st_size
    loss = measure_eval(run.state, run.prepared.eval)
    prompts = eval_prompts(run.renderer, run.prepared.eval, answers)
    given = answer_prompts(run.base.model.eval(), run.renderer.tokenizer, prompts, max_new_tokens=32)
    cells = [
        kind,
        f"{planned.adapter_parameters:,}",
        f"{size / 2**20:.2f} MiB",
        gib(planned.total),
        f"{tokens / sum(seconds[1:]):.0f}",
        f"{steps}",
        f"{loss:.4f}",
        f"{exact_match(given):.1%}",
    ]
    run.release()
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="directory or .gguf file; by default the demo's")
    parser.add_argument("--minutes", type=float, default=3.0, help="of training, for each kind")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--answers", type=int, default=70, help="eval requests that are answered")
    options = parser.parse_args()
    header = ["kind", "trained", "file", "on a card", "tokens/s", "steps", "eval loss", "exact match"]
    with tempfile.TemporaryDirectory() as work:
        copy_demo_rows(Path(work))
        lines = [
            measure(kind, options.model or packaged_model(), Path(work), options.minutes, options.answers)
            for kind in options.kinds
        ]
    print(f"{options.minutes:g} minutes of training each, rates {RATES}")
    for name, *cells in [header, *lines]:
        print(f"{name:12}" + "".join(f"{cell:>14}" for cell in cells))


if __name__ == "__main__":
    main()
