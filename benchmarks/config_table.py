"""Print what the configs for 8 to 24 GB take by plan, as the table that docs/benchmarks.md has.

    python -m benchmarks.config_table [SIZE ...]

Cards have SIZE times 10^9 bytes. The models' config.json are in benchmarks/models; no weights are needed, and nothing
here ran on a card. Options are those that `auto` chose because the run fits only so. Whole plans take minutes.
"""

import argparse
from pathlib import Path

from qlora_trainer.cli.app import prefer_expandable_segments
from qlora_trainer.common.units import gib, parse_bytes
from qlora_trainer.config.load import load_config
from qlora_trainer.planning.fit import check_fits, reserve_of
from qlora_trainer.planning.memory_plan import Budget
from qlora_trainer.planning.options import options_of
from qlora_trainer.weights.model_directory import ModelDirectory

ROOT = Path(__file__).parents[1]
MODELS = {"Qwen/Qwen3-8B": "qwen3-8b"}  # directories of benchmarks/models
SIZES = (8, 12, 16, 24)  # GB
HOST = parse_bytes("32GB")
HEADER = "| config | rows of up to | rank | memory planned | activation checkpointing | options |"


def table_row(size: int) -> str:
    """Plan the config for a card of so many GB, as a row of the table."""
    config = load_config(ROOT / "configs" / f"{size}gb.yaml")
    directory = ModelDirectory.open(ROOT / "benchmarks" / "models" / MODELS[config.model.name])
    card = parse_bytes(f"{size}GB")
    plan = check_fits(directory, config, Budget(card, HOST, reserve_of(card)))
    options = options_of(plan)
    cells = (
        f"`{size}gb.yaml`",
        f"{plan.max_length:,} tokens",
        f"{config.adapter.rank}",
        gib(plan.total) + (f", and {gib(plan.host)} of the host" if plan.host else ""),
        f"{plan.policy}",
        f"`{options}`" if options else "none",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, default=SIZES, metavar="SIZE")
    prefer_expandable_segments()
    print(HEADER)
    print("|---" * HEADER.count(" | ") + "|---|")
    for size in parser.parse_args().sizes:
        print(table_row(size), flush=True)


if __name__ == "__main__":
    main()
