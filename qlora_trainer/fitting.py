"""What fits on a card: the longest context and the largest micro-batch, and a run that cannot fit refused.

A plan of a large model takes seconds for each length. Its live bytes are linear in the number of like layers (a test
shows it), so the search goes by two models of a few layers, and only its outcome is planned whole; what the allocator
wastes is not linear, and its share is taken from the last whole plan. What is found fits, and the next size was found
not to.
"""

import bisect
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from qlora_trainer.config import RunConfig
from qlora_trainer.errors import ConfigError, InsufficientMemoryError
from qlora_trainer.model import choose_device
from qlora_trainer.model_source import max_positions
from qlora_trainer.planning import CUDA_CONTEXT_BYTES, SLACK, MemoryPlan, longest_row, plan_memory
from qlora_trainer.progress import Progress, silent
from qlora_trainer.skeleton import layer_kinds

GRAIN = 256  # tokens
LONGEST_SEARCHED = 2**18  # tokens, where a model's config names no limit
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def longest_context(
    directory: Path, config: RunConfig, near: MemoryPlan, budget: int, progress: Progress = silent
) -> MemoryPlan | None:
    """The plan of the longest row that fits `budget` bytes, alone in its micro-batch; None where not even GRAIN does.

    `near` is a plan of the same model.
    """
    limit = max_positions(directory) or LONGEST_SEARCHED
    sizes = list(range(GRAIN, limit + 1, GRAIN)) or [limit]
    progress("planning other lengths", 0, None)
    return _largest(directory, sizes, lambda size: with_length(config, size), near, budget)


def largest_micro_batch(
    directory: Path, config: RunConfig, near: MemoryPlan, budget: int, progress: Progress = silent
) -> MemoryPlan | None:
    """The plan of the most rows of full length of a step that fit in one micro-batch; None where not one does."""
    length = longest_row(directory, config)
    sizes = [rows * length for rows in range(1, config.training.batch_size + 1)]
    progress("planning other micro-batches", 0, None)
    return _largest(directory, sizes, lambda size: with_micro_batch(config, size), near, budget)


def check_fits_card(directory: Path, config: RunConfig, progress: Progress = silent) -> MemoryPlan | None:
    """`check_fits` for the CUDA card that the run will use; None where it runs on a CPU."""
    device = choose_device(config.model.device)
    if device.type != "cuda":
        return None
    plan = check_fits(directory, config, torch.cuda.mem_get_info(device)[0] + CUDA_CONTEXT_BYTES, progress)
    progress(f"the run fits: {gib(plan.total)} planned", 0, None)
    return plan


def check_fits(directory: Path, config: RunConfig, free: int, progress: Progress = silent) -> MemoryPlan:
    """The plan of a run, which fits `free` bytes.

    Raises:
        InsufficientMemoryError: it does not; the message says what would.
    """
    progress("planning memory", 0, None)
    plan = plan_memory(directory, config)
    if plan.total <= free:
        return plan
    found = (
        f"This run needs {gib(plan.total)} on the card, {gib(plan.components[SLACK])} of it for fragmentation, and "
        f"{gib(free)} are free."
    )
    leaner = _set(config, training={"activations": "recompute"})
    if plan.activations != "recompute" and plan_memory(directory, leaner).total <= free:
        raise InsufficientMemoryError(f"{found} It fits with training.activations=recompute.")
    shorter = longest_context(directory, leaner, plan, free, progress)
    if shorter is not None:
        recompute = "" if plan.activations == "recompute" else " training.activations=recompute"
        raise InsufficientMemoryError(
            f"{found} It fits with data.max_length={shorter.max_length} training.micro_batch_tokens=auto{recompute}."
        )
    raise InsufficientMemoryError(
        f"{found} No length of rows fits. Take a smaller base; a lower adapter.rank or "
        "optimizer.name=paged_adamw_8bit saves a little."
    )


def describe(
    plan: MemoryPlan, budget: int | None, longest: MemoryPlan | None = None, largest: MemoryPlan | None = None
) -> list[tuple[str, str]]:
    """A plan for people: (name, value)."""
    rows = [
        (
            "planned",
            f"{plan.micro_batch_tokens:,} tokens at once, rows of up to {plan.max_length:,}, {plan.activations}",
        ),
        *((name, gib(count)) for name, count in plan.components.items() if count),
        ("all that the card must hold", gib(plan.total)),
        ("of it reserved by torch", f"{gib(plan.reserved)}, with {gib(plan.allocated)} alive at {plan.operation}"),
    ]
    if budget:
        verdict, margin = ("it fits", "to spare") if plan.total <= budget else ("it does not fit", "too much")
        rows.append((f"on a card of {gib(budget)}", f"{verdict}, {gib(abs(budget - plan.total))} {margin}"))
    if longest:
        rows.append(("longest rows that fit", f"{longest.max_length:,} tokens ({gib(longest.total)})"))
    if largest:
        rows.append(("largest micro-batch that fits", f"{largest.micro_batch_tokens:,} tokens ({gib(largest.total)})"))
    rules = {"16-bit LoRA": "2 bytes a base weight", "full fine-tuning": "16 bytes a weight"}
    rows += [(f"{name} would need", f"{gib(count)} ({rules[name]})") for name, count in plan.elsewhere.items()]
    return rows


def card_memory() -> int | None:
    """Bytes of the CUDA card here; None where there is none."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None


def with_length(config: RunConfig, max_length: int) -> RunConfig:
    return _set(config, data={"max_length": max_length}, training={"micro_batch_tokens": "auto"})


def with_micro_batch(config: RunConfig, tokens: int) -> RunConfig:
    return _set(config, training={"micro_batch_tokens": tokens})


def parse_memory(text: str) -> int:
    """Bytes of "24GiB", "24 GB" or "512MiB"; ConfigError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B)\s*", text, re.IGNORECASE)
    if found is None or not float(found[1]):
        raise ConfigError(f"{text!r} is no amount of memory; write it as 24GiB, or 24GB for 24 billion bytes.")
    return int(float(found[1]) * UNITS[found[2].upper()])


def gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _largest(
    directory: Path,
    sizes: Sequence[int],  # rising
    sized: Callable[[int], RunConfig],
    near: MemoryPlan,
    budget: int,
) -> MemoryPlan | None:
    """Bisection by estimates, corrected by whole plans until one fits and the next size does not."""
    estimate = functools.cache(lambda index: _estimate(directory, sized(sizes[index])))
    waste, best = near.total / _without_slack(near), None
    low, high = 0, len(sizes)  # sizes[:low] fit, sizes[high:] do not
    while low < high:
        fitting = bisect.bisect_right(range(low, high), budget / waste, key=estimate)
        guess = max(low + fitting - 1, low)
        plan = plan_memory(directory, sized(sizes[guess]))
        waste = plan.total / _without_slack(plan)
        if plan.total <= budget:
            best, low = plan, guess + 1
        else:
            high = guess
    return best


def _estimate(directory: Path, config: RunConfig) -> int:
    """What the whole model needs but for the allocator's slack, from two models of a few layers."""
    kinds = layer_kinds(directory)
    period = next(n for n in range(1, len(kinds) + 1) if kinds[n:] == kinds[:-n])  # after which the kinds repeat
    few = period * -(-2 // period)
    if few + period >= len(kinds):
        return _without_slack(plan_memory(directory, config))
    fewer, more = (_without_slack(plan_memory(directory, config, layers)) for layers in (few, few + period))
    return fewer + (more - fewer) * (len(kinds) - few) // period


def _without_slack(plan: MemoryPlan) -> int:
    return plan.total - plan.components[SLACK]


def _set(config: RunConfig, **sections: dict[str, object]) -> RunConfig:
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=fields) for name, fields in sections.items()}
    )
