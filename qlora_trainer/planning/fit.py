"""Find what fits on a card, or in host memory: the fastest policy, the longest rows, the largest micro-batch.

Memory-efficient options that a config leaves open (auto) are taken only where no policy fits without them (options.py).

What is found is planned whole, and fits. That the next size does not is an estimate from models of a few layers
(estimate.py), which is off by a page of 20 MiB, the memory of about one more step of 256 tokens of an 8B's row. A run
that cannot fit is refused, by whole plans.
"""

import dataclasses

import torch

from qlora_trainer.common.errors import InsufficientMemoryError
from qlora_trainer.common.machine import host_memory
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.common.units import gib
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning.allocator import PAGES
from qlora_trainer.planning.empty_run import longest_row
from qlora_trainer.planning.estimate import bytes_of_a_layer, estimate, largest_that_fits
from qlora_trainer.planning.memory_plan import CUDA_CONTEXT_BYTES, SLACK, MemoryPlan, plan_memory
from qlora_trainer.planning.options import STEPS, changed_options, option_steps, options_in_words
from qlora_trainer.planning.variants import policy_overrides, with_least_memory, with_length, with_open_policy
from qlora_trainer.training.memory.activations import MOST_BETWEEN_OFFLOADED, Level, Policy, spare_host_memory
from qlora_trainer.training.memory.managed_memory import paging_refusal_here
from qlora_trainer.training.state import with_micro_batch, with_policy
from qlora_trainer.weights.model_directory import ModelDirectory

GRAIN = 256  # tokens
OFFLOADING: tuple[Level, ...] = ("offload", "tiled")
SMALLEST_PLANNED = 64 * 2**20  # bytes of a base's tensors; to plan a smaller one on a CPU takes longer than it is worth
LONGEST_SEARCHED = 2**18  # tokens, where a model's config names no limit


@dataclasses.dataclass(frozen=True)
class Budget:
    """Hold the bytes that a run may take."""

    card: int  # or, for a run on a CPU, host memory
    host: int  # for what is offloaded to it

    def holds(self, plan: MemoryPlan) -> bool:
        """Return True if a plan fits.

        Args:
            plan: of a run.

        Returns:
            True if it does.
        """
        return plan.total <= self.card and plan.host <= self.host


def fastest_plan(
    directory: ModelDirectory, config: RunConfig, budget: Budget, progress: Progress = silent
) -> MemoryPlan | None:
    """Plan a run under the first memory-efficient options with which it fits, and under the fastest policy then.

    Where the config leaves the policy open: if all activations fit, all are kept; else all layers are recomputed but
    for as many of the last as fit; else inputs are offloaded; else MLPs are taken in tiles.

    Args:
        directory: holds the base's config.json.
        config: of the run.
        budget: that it may take.
        progress: is called for each plan.

    Returns:
        The plan; None where nothing that the config leaves open makes it fit.
    """
    progress("planning memory", 0, None)
    plain, *steps = option_steps(directory, config)
    plan = _fastest_policy(directory, plain, budget, progress)
    if plan is not None or not steps or not _may_fit(directory, steps[-1], budget):
        return plan
    for step in steps:
        changed = ", ".join(changed_options(plain, step.memory_options()).values())
        progress(f"planning memory, {changed}", 0, None)
        if step is steps[-1] or _may_fit(directory, step, budget):
            plan = _fastest_policy(directory, step, budget, progress, may_fit=True)
        if plan is not None:
            break
    return plan


def _fastest_policy(
    directory: ModelDirectory, config: RunConfig, budget: Budget, progress: Progress, *, may_fit: bool = False
) -> MemoryPlan | None:
    """Plan a run under the fastest policy that fits, or the config's; None where it does not fit.

    `may_fit` is True where `_may_fit` has said so already, so that nothing is estimated twice.
    """
    if config.training.activation_checkpointing != "auto":
        plan = plan_memory(directory, config)
        return plan if budget.holds(plan) else None
    if config.model.device == "cpu":  # where nearly all runs keep everything, and planning takes time from them
        all_kept = _plan(directory, config, Policy("none"))
        if budget.holds(all_kept):
            return all_kept
    none_kept = _plan(directory, config, Policy("full"))
    if none_kept.total <= budget.card:
        return _keep_some_layers(directory, config, none_kept, budget.card, progress)
    if not (may_fit or _may_fit(directory, config, budget)):
        return None
    for level in OFFLOADING:
        progress(f"planning memory, {level}", 0, None)
        for every in range(1, MOST_BETWEEN_OFFLOADED + 1):
            plan = _plan(directory, config, Policy(level, offload_every_n_layers=every))
            if budget.holds(plan):
                return plan
            if plan.total > budget.card:
                break
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
    limit = directory.facts.positions or LONGEST_SEARCHED
    sizes = list(range(GRAIN, limit + 1, GRAIN)) or [limit]
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
    directory: ModelDirectory, config: RunConfig, device: torch.device, progress: Progress = silent
) -> MemoryPlan | None:
    """Call `check_fits` for the card that the run will use, or for host memory.

    Args:
        directory: holds the base's config.json.
        config: of the run.
        device: of this machine, that the run will use.
        progress: is called for each plan.

    Returns:
        The plan; None for a small base on a CPU, which is not planned.
    """
    if device.type == "cpu":
        if sum(info.nbytes for info in directory.tensors.values()) < SMALLEST_PLANNED:
            return None
        config = config.replace({"model.device": "cpu"})
    plan = check_fits(directory, config, budget_here(device), progress)
    progress(
        f"the run fits: {gib(plan.total)} {_place(config)} planned, activation checkpointing {plan.policy}", 0, None
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
        return Budget(torch.cuda.mem_get_info(device)[0] + CUDA_CONTEXT_BYTES, spare_host_memory())
    return Budget(host_memory().available, 0)


def check_fits(directory: ModelDirectory, config: RunConfig, budget: Budget, progress: Progress = silent) -> MemoryPlan:
    """Plan a run that fits, as `fastest_plan` does.

    Args:
        directory: holds the base's config.json.
        config: of the run.
        budget: that it may take.
        progress: is called for each plan.

    Returns:
        A plan that fits.

    Raises:
        InsufficientMemoryError: it does not fit; the message says what would.
    """
    fitting = fastest_plan(directory, config, budget, progress)
    if fitting is not None:
        return fitting
    open_policy = config.training.activation_checkpointing == "auto"
    fastest = None if open_policy else fastest_plan(directory, with_open_policy(config), budget, progress)
    plan = plan_memory(directory, with_least_memory(directory, config))
    found = (
        f"This run needs {gib(plan.total)} {_place(config)} under training.activation_checkpointing={plan.policy.level}"
        + (f", {gib(slack)} of it for fragmentation" if (slack := plan.components[SLACK]) else "")
        + f", and {gib(budget.card)} are free."
    )
    if plan.host > budget.host:
        found += f" It would keep {gib(plan.host)} in host memory, where {gib(budget.host)} are free."
    if fastest is not None:
        raise InsufficientMemoryError(f"{found} It fits with {policy_overrides(fastest.policy, config)}.")
    shorter = longest_context(directory, with_policy(config, Policy("tiled")), budget.card, progress)
    if shorter is not None:
        raise InsufficientMemoryError(
            f"{found} It fits with data.max_length={shorter.max_length} training.micro_batch_tokens=auto "
            f"{policy_overrides(shorter.policy, config)}."
        )
    unused = {key: value for key, value in STEPS if plan.options[key] not in (value, "4bit")}
    others = f", set {options_in_words(unused)}" if unused else ""
    raise InsufficientMemoryError(f"{found} No row length fits. Choose a smaller base{others}, or lower adapter.rank.")


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


def plan_as_lowered(
    directory: ModelDirectory, config: RunConfig, device: torch.device, policy: Policy, micro_batch_tokens: int
) -> MemoryPlan:
    """Plan a run on the device here, under what an earlier part of it was lowered to.

    Args:
        directory: holds the base's config.json.
        config: of the run.
        device: that the run uses.
        policy: of the earlier part.
        micro_batch_tokens: of the earlier part.

    Returns:
        The plan.
    """
    config = config.replace({"model.device": device.type})
    lowered = with_micro_batch(config, micro_batch_tokens, longest_row(directory, config))
    return plan_memory(directory, with_policy(lowered, policy))


def _keep_some_layers(
    directory: ModelDirectory, config: RunConfig, none_kept: MemoryPlan, budget: int, progress: Progress
) -> MemoryPlan:
    """Plan to keep the activations of as many layers as fit; `none_kept`, which keeps none, fits."""
    layers = len(directory.facts.layer_kinds)
    keeping, recomputing = (
        bytes_of_a_layer(directory, with_policy(config, Policy(level))) for level in ("none", "full")
    )
    kept_bytes = keeping - recomputing
    # One more than would fit by itself: as much as a kept layer takes is alive while another is recomputed.
    kept = min((budget - none_kept.total) // kept_bytes + 1, layers)
    while kept > 0:
        progress(f"planning memory, {kept} of {layers} layers kept", 0, None)
        plan = _plan(
            directory, config, Policy("none") if kept == layers else Policy("full", uncheckpointed_layers=kept)
        )
        if plan.total <= budget:
            return plan
        kept -= -(-(plan.total - budget) // kept_bytes)
    return none_kept


def _plan(directory: ModelDirectory, config: RunConfig, policy: Policy) -> MemoryPlan:
    return plan_memory(directory, with_policy(config, policy))
