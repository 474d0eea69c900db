"""Estimate a whole plan from plans of a few layers, and find the largest size that fits by such estimates.

Similar layers take similar memory: live bytes are linear in their number (a test shows it), and what the allocator
wastes hardly depends on it. An 8B's rows of 2,048 to 131,072 tokens waste the same in 3 layers as in 32, to 2 MiB, or
where segments are expandable to a page of 20 MiB. So an estimate is right to about a page, for a sixth of the time.

What is found is planned whole before it is reported; that no larger size fits is an estimate.
"""

import functools
import math
from collections.abc import Callable, Sequence

from qlora_trainer.adapters.patterns import layers_differ
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning.empty_run import longest_row
from qlora_trainer.planning.memory_plan import SLACK, MemoryPlan, plan_memory
from qlora_trainer.planning.skeleton import layers_of_a_period
from qlora_trainer.training.memory.activations import Level, Policy
from qlora_trainer.training.state import with_micro_batch, with_policy
from qlora_trainer.weights.model_directory import ModelDirectory


def estimate(directory: ModelDirectory, config: RunConfig) -> int:
    """Estimate the total that `plan_memory` would give, from two models of a few layers, or of as many as there are.

    Three more say what a layer adds whose activations are all kept. The first two of them add less, since as much is
    alive while a layer is recomputed, and the fullest moment may come with the second.

    Args:
        directory: holds the base's config.json.
        config: of the run.

    Returns:
        Bytes.
    """
    layers, period, few = _few_layers(directory, config)
    kept = min(config.training.uncheckpointed_layers, layers)
    planned = few + (2 * period if kept else period)
    if planned >= layers:
        return plan_memory(directory, config).total
    total, _ = _total_and_layer(directory, _keeping(config, 0))
    if kept:
        first = min(kept, 2 * period)
        none, some = (plan_memory(directory, _keeping(config, count), planned) for count in (0, first))
        total += _live(some) - _live(none)
        if kept > first:
            more = plan_memory(directory, _keeping(config, first + period), planned)
            total += (_live(more) - _live(some)) * (kept - first) // period
    return total


class FewLayers:
    """Estimate the totals of many policies and sizes of a micro-batch, from plans of a few layers, made when needed.

    A total is taken as linear in the tokens of a micro-batch, between the smallest and the largest, and in the number
    of layers whose activations are kept. So it is a little off, and a plan of what is chosen decides; `correct` moves
    the estimates of a level by what such a plan differs.

    Args:
        directory: holds the base's config.json.
        config: of the run, with its options.
        limits: the sizes of a micro-batch, rising.
        known: of the same directory and options, for other sizes; what it has planned is not planned again.
    """

    def __init__(
        self, directory: ModelDirectory, config: RunConfig, limits: Sequence[int], known: "FewLayers | None" = None
    ) -> None:
        self._directory = directory
        self._config = config
        self._ends = limits[0], limits[-1]
        # (level, size of a micro-batch) -> (total with no layer kept, bytes that a layer adds)
        self._planned: dict[tuple[Level, int], tuple[int, int]] = known._planned if known else {}
        self._corrections: dict[tuple[Level, bool], int] = {}  # by level, and whether some layers are kept

    def is_planned(self, policy: Policy) -> bool:
        """Return True if nothing must be planned to estimate a policy.

        Args:
            policy: its level counts.

        Returns:
            True if it was planned for before.
        """
        levels = ("none", policy.level) if policy.uncheckpointed_layers else (policy.level,)
        return all((level, limit) in self._planned for level in levels for limit in self._ends)

    def total(self, policy: Policy, limit: int, budget: int) -> int | None:
        """Estimate what a policy needs.

        Args:
            policy: what backward keeps.
            limit: most tokens of a micro-batch.
            budget: bytes that it may take.

        Returns:
            Bytes; None if that is more than the budget.
        """
        least, most = self._ends
        if self._of_uncheckpointed(policy, limit) > budget:
            return None
        at_least = self._at(policy, least)
        if at_least > budget:  # more tokens need no less: the larger one is not planned
            return None
        share = (limit - least) / (most - least) if most > least else 0.0
        found = at_least + round(share * (self._at(policy, most) - at_least)) if share else at_least
        return found if found <= budget else None

    def correct(self, policy: Policy, limit: int, planned: int) -> None:
        """Take a plan's total for the estimate of its level.

        Args:
            policy: that was planned.
            limit: most tokens of its micro-batch.
            planned: bytes.
        """
        estimated = self.total(policy, limit, 2**62)
        assert estimated is not None
        key = policy.level, policy.uncheckpointed_layers > 0
        self._corrections[key] = self._corrections.get(key, 0) + planned - estimated

    def _of_uncheckpointed(self, policy: Policy, limit: int) -> int:
        """Return what a policy needs at least for the layers that keep all, by plans that were made; else 0."""
        if not policy.uncheckpointed_layers or not self.is_planned(Policy("none")):
            return 0
        others = max(len(self._directory.facts.layer_kinds) - policy.uncheckpointed_layers, 0)
        sizes = [total - others * of_a_layer for total, of_a_layer in (self._plans("none", end) for end in self._ends)]
        least, most = self._ends
        return sizes[0] + (limit - least) * (sizes[1] - sizes[0]) // max(most - least, 1)

    def _at(self, policy: Policy, limit: int) -> int:
        total, of_a_layer = self._plans(policy.level, limit)
        if policy.uncheckpointed_layers:
            # The first adds little: as much as a kept layer takes is alive while another is recomputed.
            total += (policy.uncheckpointed_layers - 1) * (self._plans("none", limit)[1] - of_a_layer)
        return total + self._corrections.get((policy.level, policy.uncheckpointed_layers > 0), 0)

    def _plans(self, level: Level, limit: int) -> tuple[int, int]:
        """Return (the total with no layer kept, bytes that a layer adds)."""
        if (level, limit) not in self._planned:
            config = with_micro_batch(self._config, limit, longest_row(self._directory, self._config))
            self._planned[level, limit] = _total_and_layer(self._directory, with_policy(config, Policy(level)))
        return self._planned[level, limit]


def _total_and_layer(directory: ModelDirectory, config: RunConfig) -> tuple[int, int]:
    """Return the total of a plan and what one layer adds to it, from models of a few layers; no layer is kept."""
    layers, period, few = _few_layers(directory, config)
    if few + period > layers:  # a model has no more layers than its config names kinds of
        few = max(layers - period, 0)
    more = plan_memory(directory, config, few + period)
    if not few:
        return more.total, 0
    fewer = plan_memory(directory, config, few)
    added = _live(more) - _live(fewer)
    return _live(fewer) + added * (layers - few) // period + more.components[SLACK], added // period


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
    """Return (layers of the model, after how many they repeat, few); all, where they have other adapters.

    `few` is a multiple of the period with so many layers that one more is like them: two at least, as a first layer and
    a last one may differ; with inputs made again from every n-th layer's, n more.
    """
    layers, period = len(directory.facts.layer_kinds), layers_of_a_period(directory, config.adapter)
    if layers_differ(config.adapter):
        return layers, layers, layers
    period = math.lcm(period, config.training.offload_every_n_layers)
    return layers, period, period * -(-(1 + config.training.offload_every_n_layers) // period)


def _live(plan: MemoryPlan) -> int:
    return plan.total - plan.components[SLACK]


def _keeping(config: RunConfig, layers: int) -> RunConfig:
    return config.replace({"training.uncheckpointed_layers": layers})
