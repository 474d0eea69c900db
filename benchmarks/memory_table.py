"""Compute the memory of a training step of 7B and 8B models: ours, and peft + bitsandbytes with checkpointing.

    python -m benchmarks.memory_table [--model NAME ...] [--only-peak | --only-context] [--layers N] [--json]

Both steps run on fake tensors, from the models' config.json in benchmarks/models, and are counted by the same tracker
and the same simulation of CUDA's allocator; attention's backward needs space inside by the same formula. Nothing here
ran on a card. Two tables:

Peak: what the allocator reserves at one row of 2,048 tokens, rank 16 on all linear layers, and the paged optimizer
state as if it were all resident. The allowances are left out, as they are the same for all.

Context: the longest single row, rank 32, on cards of 8, 12, 16 and 24 GB (10^9 bytes), by plans of whole models: it
fits, and one longer by 1 %, or by 256 tokens where that is more, does not, or is beyond the model's positions. Counted
are reserved bytes, the paged state, and the stated allowances for the CUDA context and cuBLAS' workspace. Reserved is
with all that the simulated allocator wastes; a real one that meets its limit gives empty segments back and tries
again, and so may hold a little more, for both alike. Host memory is what ours keeps there, besides the paged state.

With --layers N models are cut to N layers: to try the command in seconds; those figures say nothing.
The peer is described in peer_memory.py. Whole models take minutes; progress is on stderr.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peer_memory import PeerPlan, allowances, plan_peer
from qlora_trainer.cli.app import prefer_expandable_segments
from qlora_trainer.config.load import make_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning.fit import GRAIN, LONGEST_SEARCHED
from qlora_trainer.planning.memory_plan import CUBLAS, MemoryPlan, plan_memory
from qlora_trainer.planning.step_memory import PAGED
from qlora_trainer.weights.model_directory import ModelDirectory

MODELS = Path(__file__).parent / "models"
PEAK_TOKENS, PEAK_RANK, CONTEXT_RANK = 2048, 16, 32
CARDS = (8, 12, 16, 24)  # GB
FIRST_TOKENS = (2048, 16384)  # planned whatever fits
PRECISION = 0.01  # of the longest row
LEAST_MEMORY = {"training": {"activation_checkpointing": "tiled"}}
MEMORY_OPTIONS = {
    "model": {"embeddings": "cpu", "lm_head": "4bit"},
    "adapter": {"dtype": "bfloat16"},
    "optimizer": {"name": "paged_adamw_8bit"},
}
OURS, MEMORY_EFFICIENT, PEER, PREPARED = (
    "ours",
    "ours, memory-efficient options",
    "peft + bitsandbytes",
    "peft + bitsandbytes, prepared",
)
UNSLOTH = "Unsloth (published)"
PUBLISHED_CONTEXT = {UNSLOTH: {8: 2_972, 12: 21_848, 16: 40_724, 24: 78_475}}  # Llama-3.1-8B, rank 32, one row
PUBLISHED_PEAK = {"torchtune (published; 2 rows of 2,048)": 7.4 * 2**30}  # Llama-3.1-8B
PUBLISHED_MODEL = "llama-3.1-8b"


@dataclass(frozen=True)
class Figure:
    """Hold one plan, ours or the peer's; in bytes."""

    model: str
    who: str
    tokens: int
    rank: int
    resident: int  # reserved by torch but for cuBLAS' workspaces, and the paged state
    allocated: int  # alive at the fullest moment, without either
    paged: int
    total: int  # with the allowances
    host: int  # kept in host memory, besides the paged state
    operation: str  # at which most is alive


def our_config(directory: Path, rank: int, tokens: int, memory_efficient: bool) -> RunConfig:
    raw: dict[str, dict[str, Any]] = {
        "model": {"name": str(directory), "compute_dtype": "bfloat16"},
        "adapter": {"rank": rank, "target_modules": "all-linear"},
        "data": {"train": "rows.jsonl", "max_length": tokens},
        "training": {"global_batch_size": 1},
    }
    for section, options in [*LEAST_MEMORY.items(), *(MEMORY_OPTIONS.items() if memory_efficient else ())]:
        raw[section] = raw.get(section, {}) | options
    return make_config(raw)


def our_figure(model: str, rank: int, memory_efficient: bool, plan: MemoryPlan) -> Figure:
    paged, cublas = plan.components[PAGED], plan.components[CUBLAS]
    return Figure(
        model=model,
        who=MEMORY_EFFICIENT if memory_efficient else OURS,
        tokens=plan.max_length,
        rank=rank,
        resident=plan.reserved - cublas + paged,
        allocated=plan.allocated - cublas,
        paged=paged,
        total=plan.total,
        host=plan.host,
        operation=plan.operation,
    )


def peer_figure(model: str, rank: int, who: str, plan: PeerPlan) -> Figure:
    return Figure(
        model=model,
        who=who,
        tokens=plan.tokens,
        rank=rank,
        resident=plan.resident,
        allocated=plan.allocated,
        paged=plan.paged,
        total=plan.total,
        host=0,
        operation=plan.operation,
    )


def peaks(model: str, directory: Path, say: Callable[[str], None]) -> list[Figure]:
    """Plan the first table's figures of one model."""
    figures = []
    for memory_efficient in (False, True):
        plan = plan_memory(
            ModelDirectory.open(directory), our_config(directory, PEAK_RANK, PEAK_TOKENS, memory_efficient)
        )
        figures.append(our_figure(model, PEAK_RANK, memory_efficient, plan))
        say(f"{model}: {describe(figures[-1])}; {plan.base_parameters / 1e9:.2f}B parameters in the base")
    for who in (PEER, PREPARED):
        peer = plan_peer(directory, PEAK_TOKENS, PEAK_RANK, prepared=who == PREPARED)
        figures.append(peer_figure(model, PEAK_RANK, who, peer))
        say(f"{model}: {describe(figures[-1])}")
    return figures


def contexts(model: str, directory: Path, say: Callable[[str], None]) -> dict[str, dict[int, Figure | None]]:
    """Plan the second table's figures of one model: who -> card -> the longest row, None where not even GRAIN fits."""

    def ours(tokens: int, memory_efficient: bool) -> Figure:
        plan = plan_memory(
            ModelDirectory.open(directory), our_config(directory, CONTEXT_RANK, tokens, memory_efficient)
        )
        return our_figure(model, CONTEXT_RANK, memory_efficient, plan)

    planners: dict[str, Callable[[int], Figure]] = {
        OURS: lambda tokens: ours(tokens, memory_efficient=False),
        MEMORY_EFFICIENT: lambda tokens: ours(tokens, memory_efficient=True),
        PEER: lambda tokens: peer_figure(model, CONTEXT_RANK, PEER, plan_peer(directory, tokens, CONTEXT_RANK)),
    }
    limit = (ModelDirectory.open(directory).facts.positions or LONGEST_SEARCHED) // GRAIN * GRAIN
    found: dict[str, dict[int, Figure | None]] = {}
    for who, planner in planners.items():

        def plan_and_say(tokens: int, planner: Callable[[int], Figure] = planner) -> Figure:
            figure = planner(tokens)
            say(f"{model}: {describe(figure)}, {figure.total / 1e9:.2f} GB in all")
            return figure

        known = {tokens: plan_and_say(tokens) for tokens in sorted({min(first, limit) for first in FIRST_TOKENS})}
        found[who] = {card: longest(plan_and_say, known, limit, card * 10**9) for card in CARDS}
    return found


def longest(
    plan: Callable[[int], Figure],
    known: dict[int, Figure],  # by tokens; two at least, to which is added what is planned here
    limit: int,
    budget: int,
) -> Figure | None:
    """Find the longest row whose plan fits, where one longer by PRECISION, or by GRAIN, was found not to.

    What a row needs is nearly a line, so the next length to plan is where the line meets the budget, or the shortest
    step from what is known.
    """
    while True:
        fits = max((tokens for tokens, figure in known.items() if figure.total <= budget), default=0)
        fails = min((tokens for tokens in known if tokens > fits), default=limit + GRAIN)
        step = max(GRAIN, int(fits * PRECISION) // GRAIN * GRAIN)
        if fails - fits <= step:
            return known.get(fits)
        nearest = sorted(known, key=lambda tokens: abs(known[tokens].total - budget))[:2]
        (x, y), (x2, y2) = ((tokens, known[tokens].total) for tokens in nearest)
        meets = int(x + (budget - y) * (x2 - x) / (y2 - y)) // GRAIN * GRAIN if y2 != y else x
        guess = max(min(meets, fails - step), fits + step)
        known[guess] = plan(guess)


def describe(figure: Figure | None) -> str:
    if figure is None:
        return f"not even {GRAIN} tokens fit"
    host = f", {figure.host / 2**30:.1f} GiB on the host" if figure.host else ""
    return f"{figure.who}: {figure.tokens:,} tokens, {figure.resident / 2**30:.2f} GiB{host}"


def print_peaks(figures: list[Figure]) -> None:
    print(f"Peak at 1 x {PEAK_TOKENS:,} tokens, rank {PEAK_RANK}, GiB reserved with paged state (of it paged; alive):")
    for model in dict.fromkeys(figure.model for figure in figures):
        print(f"  {model}")
        for figure in figures:
            if figure.model == model:
                parts = f"({figure.paged / 2**30:.2f}; {(figure.allocated + figure.paged) / 2**30:.2f})"
                print(f"    {figure.who:<40}{figure.resident / 2**30:>7.2f}  {parts}")
        if model == PUBLISHED_MODEL:
            for who, count in PUBLISHED_PEAK.items():
                print(f"    {who:<40}{count / 2**30:>7.2f}")


def print_contexts(model: str, found: dict[str, dict[int, Figure | None]]) -> None:
    allowance = allowances() / 2**20
    print(f"Longest row of {model}, rank {CONTEXT_RANK}, tokens, {allowance:.0f} MiB allowed for context and cuBLAS:")
    print(f"  {'':<42}" + "".join(f"{f'{card} GB':>12}" for card in CARDS))
    for who, by_card in found.items():
        lengths = [f"{figure.tokens:,}" if figure else "none" for figure in by_card.values()]
        print(f"  {who:<42}" + "".join(f"{length:>12}" for length in lengths))
        if any(figure and figure.host for figure in by_card.values()):
            hosts = [f"{figure.host / 2**30:.1f}" if figure else "-" for figure in by_card.values()]
            print(f"  {'  GiB of host memory':<42}" + "".join(f"{host:>12}" for host in hosts))
    if model == PUBLISHED_MODEL:
        for who, tokens in PUBLISHED_CONTEXT.items():
            print(f"  {who:<42}" + "".join(f"{tokens[card]:>12,}" for card in CARDS))


def cut(directory: Path, layers: int, work: Path) -> Path:
    """Make a directory with the same config but so many layers."""
    raw = json.loads((directory / "config.json").read_text()) | {"num_hidden_layers": layers}
    target = work / directory.name
    target.mkdir()
    (target / "config.json").write_text(json.dumps(raw))
    return target


def main() -> None:
    names = sorted(path.name for path in MODELS.iterdir())
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--model", action="append", choices=names, help="default: all peaks, and llama-3.1-8b's context"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--only-peak", action="store_true")
    only.add_argument("--only-context", action="store_true")
    parser.add_argument("--layers", type=int, help="cut models to so many layers, to try the command")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    prefer_expandable_segments()  # for both
    warnings.filterwarnings("ignore")  # of libraries, about their own future
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {text}", file=sys.stderr, flush=True)

    figures: list[Figure] = []
    longest: dict[str, dict[str, dict[int, Figure | None]]] = {}
    with tempfile.TemporaryDirectory() as work:
        for model in options.model or names:
            directory = MODELS / model if options.layers is None else cut(MODELS / model, options.layers, Path(work))
            if not options.only_context:
                figures += peaks(model, directory, say)
            if not options.only_peak and (options.model or model == PUBLISHED_MODEL):
                longest[model] = contexts(model, directory, say)
    if options.json:
        print(json.dumps({"layers": options.layers, "peaks": figures, "contexts": longest}, default=vars, indent=2))
        return
    if options.layers is not None:
        print(f"Models cut to {options.layers} layers: these figures only show that the command runs.")
    if figures:
        print_peaks(figures)
    for model, found in longest.items():
        print_contexts(model, found)


if __name__ == "__main__":
    main()
