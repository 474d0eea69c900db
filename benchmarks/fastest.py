"""Compare the time of a step by formula with what it takes on this CPU, and with published figures of cards.

    python -m benchmarks.fastest cpu MODEL ROWS [ROWS ...] [--limits N ...] [--tokens N] [--rank R] [--budgets N]
                                    [--turns N] [--processor]
    python -m benchmarks.fastest cards [--model NAME] [--rows N] [--length N]

`cpu` trains MODEL (a directory, or a GGUF file) on steps of about --tokens tokens of the rows in each file, under every
policy of POLICIES and every limit of a micro-batch, and prints the seconds that the formula predicts next to the median
of --turns, in which each setting is timed once, after one that warms up. With --processor these are seconds of the
processor, which other work on the machine changes less; on one thread they are the same. Then, for --budgets amounts of
memory, such that each policy is the best in one if it is in any, it prints what `auto` would take, and how much longer
that took than the fastest setting that fits; and Kendall's tau of the predicted and the measured order. Memory is
planned as on a card, where an offloaded input is not on it: on a CPU it is in the same memory, and offloading would
never pay. Exit 1 where a choice is more than 7 % slower than the best, or tau is below 0.8.

`cards` plans an 8B's step for each card of the table, within its memory, and prints the estimate, the share of it in
which the card waits for the host, and the tokens a second that others published. More memory must never make an
estimate slower: the same card is asked with a half more, too. Nothing ran on these cards. Exit 1 where more memory is
slower, a card waits for a third of a step or more, or an estimate is not between half and twice what was published.
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.common.cache import user_cache
from qlora_trainer.common.units import gib
from qlora_trainer.config.load import make_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.model.source import resolve_model
from qlora_trainer.planning.fit import fastest_plan, reserve_of
from qlora_trainer.planning.memory_plan import Budget, MemoryPlan, plan_memory
from qlora_trainer.planning.speed.candidates import Candidate, Pace, candidates
from qlora_trainer.planning.speed.cards import TABLE, CardFigures
from qlora_trainer.planning.speed.choice import search
from qlora_trainer.planning.speed.rates import rates_of_card
from qlora_trainer.planning.speed.rows import full_rows
from qlora_trainer.planning.speed.shape import count_shape
from qlora_trainer.runs.pace import pace_here
from qlora_trainer.runs.start import start_run
from qlora_trainer.training.memory.activations import Policy
from qlora_trainer.training.recovery import take_step
from qlora_trainer.training.state import with_micro_batch, with_policy
from qlora_trainer.weights.model_directory import ModelDirectory

MODELS = Path(__file__).parent / "models"
POLICIES = (
    Policy("none"),
    Policy("full"),
    Policy("offload"),
    Policy("offload", offload_every_n_layers=3),
    Policy("tiled"),
)
LIMITS = (512, 1024, 2048, 4096)
SLOWER, LEAST_TAU = 1.07, 0.8
MOST_WAITING = (
    1 / 3
)  # of a step, for the host, where memory allows a larger micro-batch; it does on each of these cards
HOST_MEMORY = 64 * 2**30

PUBLISHED: dict[str, tuple[tuple[str, float], ...]] = {  # tokens a second of an 8B, QLoRA, one card
    "RTX 4090": (("torchtune", 2413),),
    "RTX 5090": (("Unsloth, in Surogate's table", 3400),),
    "H100": (("Surogate, in its table", 9400),),
    "H200": (("Unsloth, in Surogate's table", 8400),),
}


@dataclasses.dataclass
class Setting:
    """Hold a way to take a step, what it needs, and what it took."""

    candidate: Candidate
    needed: int  # bytes of a card, by plan
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def measured(self) -> float:
        return statistics.median(self.seconds)


def config_of(model: str, rows: Path, output: Path, rank: int, length: int, batch: int) -> RunConfig:
    return make_config(
        {
            "model": {"name": model, "device": "cpu"},
            "adapter": {"rank": rank},
            "data": {"train": str(rows), "max_length": length, "max_skipped": 1.0},
            "training": {"global_batch_size": batch, "output_dir": str(output), "activation_checkpointing": "none"},
            "evaluation": {"samples": 0},
        }
    )


def rows_of_a_step(run: Any, tokens: int) -> int:
    """Return how many rows have about so many tokens."""
    return max(round(tokens / float(run.prepared.train.lengths.mean())), 1)


def measure(config: RunConfig, settings: Sequence[Setting], turns: int, now: Callable[[], float]) -> None:
    """Take the same step under every setting, in turn."""
    run = start_run(config)
    run.state.model.train()
    for turn in range(turns + 1):  # the first warms up
        for setting in settings:
            run.state.set_memory(setting.candidate.micro_batch_tokens, setting.candidate.policy)
            run.state.loader.step = 0  # the same rows each time
            started = now()
            take_step(run.state)
            seconds = now() - started
            print(f"turn {turn}: {setting.candidate}: {seconds:.2f} s", file=sys.stderr, flush=True)
            if turn:
                setting.seconds.append(seconds)
    run.release()


def kendall(pairs: Sequence[tuple[float, float]]) -> float:
    """Compute Kendall's tau of two orders."""
    signs = [
        (1 if (a[0] - b[0]) * (a[1] - b[1]) > 0 else -1)
        for a, b in itertools.combinations(pairs, 2)
        if a[0] != b[0] and a[1] != b[1]
    ]
    return sum(signs) / len(signs) if signs else 1.0


def budgets_between(settings: Sequence[Setting], count: int) -> list[int]:
    """Choose amounts of memory such that each policy is the best in one of them, if it is in any."""
    needs = sorted({setting.needed for setting in settings})
    best_at: dict[Policy, int] = {}
    for need in needs:
        best = min((one for one in settings if one.needed <= need), key=lambda one: one.measured)
        best_at.setdefault(best.candidate.policy, need)
    evenly = [needs[round(place * (len(needs) - 1) / max(count - 1, 1))] for place in range(count)]
    others = [budget for budget in dict.fromkeys(evenly) if budget not in best_at.values()]
    return sorted([*best_at.values(), *others[: max(count - len(best_at), 0)]])


def choose(settings: Sequence[Setting], budget: int) -> tuple[Setting, Setting]:
    """Return what `auto` takes within a budget, and what was the fastest there."""
    by_candidate = {id(setting.candidate): setting for setting in settings}

    def needed(one: Candidate) -> int | None:
        size = by_candidate[id(one)].needed
        return size if size <= budget else None

    ordered = sorted((setting.candidate for setting in settings), key=lambda one: one.seconds)
    found = search(ordered, needed, lambda one: one, lambda one, chosen: False)
    assert found is not None
    fitting = [setting for setting in settings if setting.needed <= budget]
    return by_candidate[id(found.chosen)], min(fitting, key=lambda setting: setting.measured)


def compare_on_cpu(model: str, rows: Path, options: argparse.Namespace) -> bool:
    """Print the comparison of one file of rows; True if it holds."""
    with tempfile.TemporaryDirectory() as work:
        small = config_of(model, rows, Path(work) / "first", options.rank, min(options.limits), 1)
        first = start_run(small)
        batch = rows_of_a_step(first, options.tokens)
        config = small.replace(
            {"training.output_dir": f"{work}/run", "training.global_batch_size": batch, "training.max_steps": 10_000}
        )
        pace = pace_here(config, first.prepared, torch.device("cpu"))
        directory = first.base.directory
        first.release()
        shape = count_shape(directory, config, torch.float32)
        settings = []
        for candidate in candidates(shape, pace, POLICIES, options.limits):
            as_on_card = config.replace({"model.device": "auto", "model.compute_dtype": "float32"})
            sized = with_micro_batch(as_on_card, candidate.micro_batch_tokens, min(options.limits))
            settings.append(Setting(candidate, plan_memory(directory, with_policy(sized, candidate.policy)).total))
        measure(config, settings, options.turns, time.process_time if options.processor else time.perf_counter)
    print(f"\n{rows}: {batch} rows a step, {pace.steps.tokens:,.0f} tokens, on {pace.rates.name}")
    print(f"{'policy':50}{'limit':>7}{'predicted':>11}{'measured':>10}{'on a card':>12}")
    for setting in settings:
        one = setting.candidate
        print(
            f"{one.policy!s:50}{one.micro_batch_tokens:>7,}{one.seconds:>9.2f} s{setting.measured:>8.2f} s"
            f"{gib(setting.needed):>12}"
        )
    tau = kendall([(setting.candidate.seconds, setting.measured) for setting in settings])
    worst = 1.0
    for budget in budgets_between(settings, options.budgets):
        taken, best = choose(settings, budget)
        slower = taken.measured / best.measured
        worst = max(worst, slower)
        print(f"  {gib(budget)}: {taken.candidate}; {slower - 1:+.1%} against {best.candidate}")
    print(f"Kendall's tau {tau:.2f}; the worst choice takes {worst - 1:.1%} longer than the best that fits")
    return tau >= LEAST_TAU and worst <= SLOWER


def plan_for(directory: ModelDirectory, card: CardFigures, memory: int, rows: int, length: int) -> MemoryPlan | None:
    config = make_config(
        {
            "model": {"name": str(directory), "compute_dtype": "bfloat16"},
            "adapter": {"rank": 16},
            "data": {"train": "rows.jsonl", "max_length": length},
            "training": {"global_batch_size": rows},
        }
    )
    pace = Pace(rates_of_card(card), full_rows(length, rows, packing=True))
    return fastest_plan(directory, config, Budget(memory, HOST_MEMORY, reserve_of(memory)), pace=pace)


def compare_cards(model: str, rows: int, length: int) -> bool:
    """Print the table of cards; True if it holds."""
    directory, holds = ModelDirectory.open(MODELS / model), True
    print(f"{model}, rank 16, {rows} rows of {length:,} tokens a step; estimated, nothing ran on these cards\n")
    header = ("card", "tokens/s", "waits for host", "plan", "with half more memory", "published")
    print("{:12}{:>10}{:>16}{:>12}{:>23}  {}   (choice)".format(*header))
    for card in TABLE:
        plan = plan_for(directory, card, card.memory, rows, length)
        if plan is None or plan.speed is None:
            print(f"{card.name:12}{'does not fit':>10}")
            continue
        more = plan_for(directory, card, card.memory * 3 // 2, rows, length)
        assert more is not None
        assert more.speed is not None
        speed, rate = plan.speed, plan.speed.tokens / plan.speed.seconds
        others = PUBLISHED.get(card.name, ())
        published = ", ".join(f"{who} {theirs:,.0f} ({rate / theirs:.2f})" for who, theirs in others)
        within = all(0.5 <= rate / theirs <= 2 for _, theirs in others)
        is_no_slower = more.speed.seconds <= speed.seconds
        holds = holds and within and is_no_slower and speed.host_share < MOST_WAITING
        print(
            f"{card.name:12}{rate:>10,.0f}{speed.host_share:>16.0%}{gib(plan.total):>12}"
            f"{more.speed.tokens / more.speed.seconds:>23,.0f}  {published}"
            f"   ({plan.policy}, {speed.micro_batch_tokens:,})",
            flush=True,
        )
    return holds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    cpu = commands.add_parser("cpu")
    cpu.add_argument("model")
    cpu.add_argument("rows", type=Path, nargs="+")
    cpu.add_argument("--limits", type=int, nargs="+", default=list(LIMITS))
    cpu.add_argument("--tokens", type=int, default=4096)
    cpu.add_argument("--rank", type=int, default=16)
    cpu.add_argument("--turns", type=int, default=3)
    cpu.add_argument("--processor", action="store_true")
    cpu.add_argument("--budgets", type=int, default=8)
    cards = commands.add_parser("cards")
    cards.add_argument("--model", default="llama-3.1-8b", choices=sorted(path.name for path in MODELS.iterdir()))
    cards.add_argument("--rows", type=int, default=8)
    cards.add_argument("--length", type=int, default=2048)
    options = parser.parse_args()
    if options.command == "cards":
        return 0 if compare_cards(options.model, options.rows, options.length) else 1
    model = str(resolve_model(options.model, None, user_cache()).path)
    holds = [compare_on_cpu(model, rows, options) for rows in options.rows]
    return 0 if all(holds) else 1


if __name__ == "__main__":
    sys.exit(main())
