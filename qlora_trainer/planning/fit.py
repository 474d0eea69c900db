"""Find what fits on a card, or in host memory: the fastest policy, the longest rows, the largest micro-batch.

Memory-efficient options that a config leaves open (auto) are taken only where no policy fits without them (options.py).

What is found is planned whole, and fits. That the next size does not is an estimate from models of a few layers
(estimate.py), which is off by a page of 20 MiB, the memory of about one more step of 256 tokens of an 8B's row. A run
that cannot fit is refused, by whole plans.
"""

import dataclasses

import torch

from qlora_trainer.adapters.kinds.table import adapter_kind
from qlora_trainer.common.errors import InsufficientMemoryError
from qlora_trainer.common.machine import host_memory
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.common.units import counted, gib
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning.allocator import PAGES
from qlora_trainer.planning.empty_run import longest_row
from qlora_trainer.planning.estimate import estimate, largest_that_fits
from qlora_trainer.planning.memory_plan import CUDA_CONTEXT_BYTES, SLACK, Budget, MemoryPlan, plan_memory
from qlora_trainer.planning.options import STEPS, changed_options, option_steps, options_in_words
from qlora_trainer.planning.speed.candidates import Pace
from qlora_trainer.planning.speed.ways import Ways
from qlora_trainer.planning.variants import policy_overrides, with_least_memory, with_length, with_open_policy
from qlora_trainer.training.memory.activations import Policy, spare_host_memory
from qlora_trainer.training.memory.managed_memory import paging_refusal_here
from qlora_trainer.training.state import with_micro_batch, with_policy
from qlora_trainer.weights.model_directory import ModelDirectory

GRAIN = 256  # tokens
RESERVE, LEAST_RESERVE = 0.03, 256 * 2**20  # of a card, left free for what a plan does not see; at least so many bytes
HOST_RESERVE = 0.15  # of a host's memory, where the run is on its CPU
SMALLEST_PLANNED = 64 * 2**20  # bytes of a base's tensors; to plan a smaller one on a CPU takes longer than it is worth
LONGEST_SEARCHED = 2**18  # tokens, where a model's config names no limit


def fastest_plan(
    directory: ModelDirectory,
    config: RunConfig,
    budget: Budget,
    progress: Progress = silent,
    pace: Pace | None = None,
) -> MemoryPlan | None:
    """Plan a run under the first memory-efficient options with which it fits, and in the fastest way then.

    Policy and size of a micro-batch are chosen together, where the config leaves them open, by the time of a step
    (speed/cost.py). The budget's reserve is left free if anything fits so.

    Args:
        directory: holds the base's config.json.
        config: of the run.
        budget: that it may take.
        progress: is called for each plan.
        pace: device and rows; None: unknown, and a micro-batch is one longest row.

    Returns:
        The plan; None where nothing that the config leaves open makes it fit.
    """
    progress("planning memory", 0, None)
    plain, *steps = option_steps(directory, config)
    plan = _fastest(directory, plain, budget, progress, pace)
    if plan is not None or not steps or not _may_fit(directory, steps[-1], budget):
        return plan
    for step in steps:
        changed = ", ".join(changed_options(plain, step.memory_options()).values())
        progress(f"planning memory, {changed}", 0, None)
        if step is steps[-1] or _may_fit(directory, step, budget):
            plan = _fastest(directory, step, budget, progress, pace)
        if plan is not None:
            break
    return plan


def _fastest(
    directory: ModelDirectory, config: RunConfig, budget: Budget, progress: Progress, pace: Pace | None
) -> MemoryPlan | None:
    """Plan a run in the fastest way that fits, or the config's; None where it does not fit."""
    ways = Ways(directory, config, budget, progress, pace)
    for card in dict.fromkeys((budget.card - budget.reserve, budget.card)):
        if (plan := ways.fastest(card)) is not None:
            return plan
    return None


def _may_fit(directory: ModelDirectory, config: RunConfig, budget: Budget) -> bool:
    """Return True unless an estimate of what the run needs at least is beyond the card by more than it is off."""
    return estimate(directory, with_least_memory(directory, config)) <= budget.card + 2 * PAGES[False]


def longest_context(
    directory: ModelDirectory, config: RunConfig, budget: int, progress: Progress = silent
) -> MemoryPlan | None:
    """Plan the longest row that fits, alone in its micro-batch.

    It is planned under the policy and options of the config, or those that need least of the card where they are left
    open. That a row longer by GRAIN does not fit is an estimate.

    Args:
        directory: holds the base's config.json.
        config: of the run.
        budget: bytes of the card.
        progress: is called once.

    Returns:
        The plan; None where not even a row of GRAIN tokens fits.
    """
    limit = config.adapter.positions_of_rows(directory.facts.positions) or LONGEST_SEARCHED
    rounded = range(GRAIN, limit + 1, GRAIN)
    sizes = [size for size in rounded if size > config.adapter.leading_tokens] or [limit]
    progress("planning other lengths", 0, None)
    least = with_least_memory(directory, config)
    return largest_that_fits(directory, sizes, lambda size: with_length(least, size), budget)


def largest_micro_batch(
    directory: ModelDirectory, config: RunConfig, budget: int, progress: Progress = silent
) -> MemoryPlan | None:
    """Plan the most rows of full length of a step that fit in one micro-batch.

    They are planned under the policy and options of the config, or those that need least of the card where they are
    left open. That one row more does not fit is an estimate.

    Args:
        directory: holds the base's config.json.
        config: of the run.
        budget: bytes of the card.
        progress: is called once.

    Returns:
        The plan; None where not one row fits.
    """
    length = longest_row(directory, config)
    sizes = [rows * length for rows in range(1, config.training.global_batch_size + 1)]
    progress("planning other micro-batches", 0, None)
    least = with_least_memory(directory, config)
    return largest_that_fits(directory, sizes, lambda size: with_micro_batch(least, size, length), budget)


def check_fits_here(
    directory: ModelDirectory,
    config: RunConfig,
    device: torch.device,
    progress: Progress = silent,
    pace: Pace | None = None,
    in_force: RunConfig | None = None,
) -> MemoryPlan | None:
    """Plan a run for the card that it will use, or for host memory, as `check_fits` does.

    Args:
        directory: holds the base's config.json.
        config: of the run.
        device: of this machine, that the run will use.
        progress: is called for each plan.
        pace: device and rows.
        in_force: the config with what a checkpoint's run had chosen, which is taken as it is where it fits.

    Returns:
        The plan; None for a small base on a CPU, which is not planned.
    """
    budget, plan = budget_here(device), None
    if device.type == "cpu":
        if sum(info.nbytes for info in directory.tensors.values()) < SMALLEST_PLANNED:
            return None
        config = config.replace({"model.device": "cpu"})
        in_force = in_force and in_force.replace({"model.device": "cpu"})
    if in_force is not None:
        as_it_is = pace and dataclasses.replace(pace, names_faster=False)
        plan = fastest_plan(directory, in_force, budget, progress, as_it_is)
    plan = plan or check_fits(directory, config, budget, progress, pace)
    progress(
        f"the run fits: {gib(plan.total)} {_place(config)} planned, activation checkpointing {plan.policy}, "
        f"micro-batches of up to {counted(plan.micro_batch_tokens, 'token')}",
        0,
        None,
    )
    return plan


def budget_here(device: torch.device) -> Budget:
    """Measure what a run may take of a device of this machine, and of host memory for what is offloaded.

    Args:
        device: that the run will use.

    Returns:
        The budget.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + CUDA_CONTEXT_BYTES
        return Budget(free, spare_host_memory(), reserve_of(free))
    available = host_memory().available
    return Budget(available, 0, reserve_of(available, on_cpu=True))


def reserve_of(memory: int, *, on_cpu: bool = False) -> int:
    """Return what a run leaves free, as long as anything fits so.

    Args:
        memory: bytes that may be taken, of a card.
        on_cpu: they are a host's.

    Returns:
        Bytes.
    """
    return int(HOST_RESERVE * memory) if on_cpu else max(int(RESERVE * memory), LEAST_RESERVE)


def check_fits(
    directory: ModelDirectory,
    config: RunConfig,
    budget: Budget,
    progress: Progress = silent,
    pace: Pace | None = None,
) -> MemoryPlan:
    """Plan a run that fits, as `fastest_plan` does.

    Args:
        directory: holds the base's config.json.
        config: of the run.
        budget: that it may take.
        progress: is called for each plan.
        pace: device and rows; None: unknown.

    Returns:
        A plan that fits.

    Raises:
        InsufficientMemoryError: it does not fit; the message says what would.
    """
    fitting = fastest_plan(directory, config, budget, progress, pace)
    if fitting is not None:
        return fitting
    plan = plan_memory(directory, with_least_memory(directory, config))
    found = (
        f"This run needs {gib(plan.total)} {_place(config)} under training.activation_checkpointing={plan.policy.level}"
        + (f", {gib(slack)} of it for fragmentation" if (slack := plan.components[SLACK]) else "")
        + f", and {gib(budget.card)} are free."
    )
    if plan.host > budget.host:
        found += f" It would keep {gib(plan.host)} in host memory, where {gib(budget.host)} are free."
    settings = _settings_to_fit(directory, config, budget, progress)
    if settings is not None:
        raise InsufficientMemoryError(f"{found} It fits with {settings}.")
    unused = {key: value for key, value in STEPS if plan.options[key] not in (value, "4bit")}
    others = f", set {options_in_words(unused)}" if unused else ""
    size = adapter_kind(config.adapter).size
    raise InsufficientMemoryError(f"{found} No row length fits. Choose a smaller base{others}, or lower {size}.")


def _settings_to_fit(directory: ModelDirectory, config: RunConfig, budget: Budget, progress: Progress) -> str | None:
    """Find settings with which a run fits that does not: another policy or size of a micro-batch, or shorter rows.

    Returns:
        What to write on the command line; None where not even a short row fits.
    """
    has_policy = config.training.activation_checkpointing != "auto"
    size = "training.micro_batch_tokens=auto"
    smaller = with_length(config, config.data.max_length)
    has_size = config.training.micro_batch_tokens != "auto"
    if has_policy and (other := fastest_plan(directory, with_open_policy(config), budget, progress)) is not None:
        return policy_overrides(other.policy, config)
    if has_size and fastest_plan(directory, smaller, budget, progress) is not None:
        return size
    if has_policy and has_size:
        other = fastest_plan(directory, with_open_policy(smaller), budget, progress)
        if other is not None:
            return f"{size} {policy_overrides(other.policy, config)}"
    for level in ("tiled", "full"):  # the second where the host has no space for what the first offloads
        shorter = longest_context(directory, with_policy(config, Policy(level)), budget.card, progress)
        if shorter is not None and budget.holds(shorter):
            policy = policy_overrides(shorter.policy, config) if has_policy else ""
            words = f"data.max_length={shorter.max_length}", size if has_size else "", policy
            return " ".join(filter(None, words))
    return None


def memory_here(config: RunConfig) -> int | None:
    """Return the bytes of the CUDA card here, or for model.device=cpu of the host memory that this process may use.

    Args:
        config: of the run.

    Returns:
        Bytes; None where there is no card.
    """
    if config.model.device == "cpu":
        return host_memory().total
    if not torch.cuda.is_available():
        return None
    if config.optimizer.name != "adamw":
        paging_refusal_here()  # first: asking for memory makes a CUDA context; a card may allow only one
    return torch.cuda.mem_get_info()[1]


def _place(config: RunConfig) -> str:
    return "of memory" if config.model.device == "cpu" else "on the card"
