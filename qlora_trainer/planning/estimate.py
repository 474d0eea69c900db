"""Estimate a whole plan from plans of a few layers, and find the largest size that fits by such estimates.

Similar layers take similar memory: live bytes are linear in their number (a test shows it), and what the allocator
wastes hardly depends on it. An 8B's rows of 2,048 to 131,072 tokens waste the same in 3 layers as in 32, to 2 MiB, or
where segments are expandable to a page of 20 MiB. So an estimate is right to about a page, for a sixth of the time.

What is found is planned whole before it is reported; that no larger size fits is an estimate.
"""

import functools
import math
from collections.abc import Callable, Sequence

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning.memory_plan import SLACK, MemoryPlan, plan_memory
from qlora_trainer.weights.model_directory import ModelDirectory


def estimate(directory: ModelDirectory, config: RunConfig) -> int:
    """Estimate the total that `plan_memory` would give, from two models of a few layers, or of as many as there are.

    Two more say what a layer adds whose activations are all kept; the first of them adds little, since as much is alive
    while a layer is recomputed.

    Args:
        directory: holds the base's config.json.
        config: of the run.

    Returns:
        Bytes.
    """
    layers, period, few = _few_layers(directory, config)
    kept = min(config.training.uncheckpointed_layers, layers)
    if few + period >= layers:
        return plan_memory(directory, config).total
    first = _keeping(config, 0)
    fewer, more = (plan_memory(directory, first, count) for count in (few, few + period))
    live = _live(fewer) + (_live(more) - _live(fewer)) * (layers - few) // period
    if kept:
        one, two = (plan_memory(directory, _keeping(config, count), few + period) for count in (period, 2 * period))
        live += _live(one) - _live(more) + (_live(two) - _live(one)) * (kept - period) // period
    return live + more.components[SLACK]


def bytes_of_a_layer(directory: ModelDirectory, config: RunConfig) -> int:
    """Compute what one more layer takes, from models of a few layers.

    Args:
        directory: holds the base's config.json.
        config: of the run.

    Returns:
        Bytes.
    """
    _, period, few = _few_layers(directory, config)
    fewer, more = (plan_memory(directory, config, count) for count in (few, few + period))
    return (_live(more) - _live(fewer)) // period


def largest_that_fits(
    directory: ModelDirectory,
    sizes: Sequence[int],  # rising
    sized: Callable[[int], RunConfig],
    budget: int,
) -> MemoryPlan | None:
    """Plan the largest size that fits; that the next size does not fit is an estimate.

    Estimates say what to plan; by how much a plan differs from its estimate corrects the estimates that follow.

    Args:
        directory: holds the base's config.json.
        sizes: to choose from.
        sized: gives the config of a size.
        budget: bytes.

    Returns:
        The plan; None where no size fits.
    """
    estimated = functools.cache(lambda index: estimate(directory, sized(sizes[index])))
    correction, best = 0, None
    low, high = 0, len(sizes)  # sizes[:low] fit, sizes[high:] do not
    while low < high:
        guess = _last_within(estimated, low, high, budget - correction)
        if guess is None and best is not None:
            return best
        guess = low if guess is None else guess
        plan = plan_memory(directory, sized(sizes[guess]))
        correction = plan.total - estimated(guess)
        if plan.total <= budget:
            best, low = plan, guess + 1
        else:
            high = guess
    return best


def _last_within(estimated: Callable[[int], int], low: int, high: int, budget: int) -> int | None:
    """Find the last index of low..high-1 whose estimate is within the budget; None: not even the first is.

    Estimates rise nearly along a line, so the next index to try is where the line between two meets the budget.
    """
    fits, fails = low, high - 1
    if estimated(fails) <= budget:
        return fails
    if estimated(fits) > budget:
        return None
    while fails - fits > 1:
        share = (budget - estimated(fits)) / (estimated(fails) - estimated(fits))
        guess = min(max(fits + int(share * (fails - fits)), fits + 1), fails - 1)
        if estimated(guess) <= budget:
            fits = guess
        else:
            fails = guess
    return fits


def _few_layers(directory: ModelDirectory, config: RunConfig) -> tuple[int, int, int]:
    """Return (layers of the model, after how many they repeat, few).

    `few` is a multiple of the period with so many layers that one more is like them: two at least, as a first layer and
    a last one may differ; with inputs made again from every n-th layer's, n more.
    """
    kinds = directory.facts.layer_kinds
    period = next(n for n in range(1, len(kinds) + 1) if kinds[n:] == kinds[:-n])
    period = math.lcm(period, config.training.offload_every_n_layers)
    return len(kinds), period, period * -(-(1 + config.training.offload_every_n_layers) // period)


def _live(plan: MemoryPlan) -> int:
    return plan.total - plan.components[SLACK]


def _keeping(config: RunConfig, layers: int) -> RunConfig:
    return config.replace({"training.uncheckpointed_layers": layers})
