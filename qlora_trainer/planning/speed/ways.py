"""Choose the way in which a run takes its steps, of those that its config leaves open, by time, among what fits.

`Ways` estimates candidates by plans of a few layers and plans whole what it takes. Left out: memory-efficient options
and what is said where nothing fits (planning/fit.py).
"""

import dataclasses
import functools

from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning.allocator import PAGES
from qlora_trainer.planning.empty_run import longest_row, planned_card, planned_dtype
from qlora_trainer.planning.estimate import FewLayers
from qlora_trainer.planning.memory_plan import Budget, MemoryPlan, plan_memory
from qlora_trainer.planning.speed.candidates import Candidate, Pace, candidates, choices_left, keeps_less, open_policies
from qlora_trainer.planning.speed.cards import CAUTIOUS
from qlora_trainer.planning.speed.choice import AS_FAST, Speed, in_json, next_smaller, search
from qlora_trainer.planning.speed.rates import rates_of_card
from qlora_trainer.planning.speed.rows import full_rows, ladder
from qlora_trainer.planning.speed.shape import Shape, count_shape
from qlora_trainer.planning.variants import choice_overrides
from qlora_trainer.training.memory.activations import LEVELS, Policy, bytes_of_inputs
from qlora_trainer.training.state import with_micro_batch, with_policy
from qlora_trainer.weights.model_directory import ModelDirectory

NO_LIMIT = 2**62  # bytes


class Ways:
    """Hold the ways to take a run's steps that a config leaves open, the fastest first.

    Args:
        directory: holds the base's config.json.
        config: of the run, with its options.
        budget: that it may take.
        progress: is called for each plan.
        pace: device and rows; None: unknown, and a micro-batch is one longest row.
    """

    def __init__(
        self,
        directory: ModelDirectory,
        config: RunConfig,
        budget: Budget,
        progress: Progress = silent,
        pace: Pace | None = None,
    ) -> None:
        self._directory = directory
        self._config = config
        self._budget = budget
        self._progress = progress
        self._pace = pace or _unknown_pace(config)
        self._choices = choices_left(config, self._pace, len(directory.facts.layer_kinds))
        self._whole: dict[tuple[Policy, int], MemoryPlan] = {}

    @functools.cached_property
    def shape(self) -> Shape:
        """Count the model and its adapters.

        Returns:
            The counts.
        """
        return count_shape(self._directory, self._config, planned_dtype(self._config, planned_card(self._config)))

    @functools.cached_property
    def ordered(self) -> list[Candidate]:
        """List the candidates.

        Returns:
            The fastest first.
        """
        return candidates(self.shape, self._pace, *self._choices)

    @functools.cached_property
    def _memory(self) -> FewLayers:
        return FewLayers(self._directory, self._config, self._choices[1])

    def fastest(self, card: int) -> MemoryPlan | None:
        """Plan the fastest way that fits.

        Args:
            card: bytes of the card that may be taken.

        Returns:
            The plan, with its speed where device and rows are known; None where nothing fits.
        """
        policies, limits = self._choices
        if len(policies) == len(limits) == 1:
            plan = self._plan(Candidate(policies[0], limits[0], 0.0), card)
            return plan and self._with_speed(plan, self.ordered[0], None, card)
        first = self._in_ample_memory(card)
        if first is not None:
            return first
        found = search(
            self.ordered,
            lambda one: self._estimated(self._memory, one, card),
            lambda one: self._plan(one, card),
            lambda one, chosen: self._also_fits(one, chosen, card),
        )
        return self._with_speed(found.plan, found.chosen, found.following, card) if found else None

    def _in_ample_memory(self, card: int) -> MemoryPlan | None:
        """Plan what is taken where nothing is short, without estimates: for a CPU, where nearly all runs keep all.

        It is the smallest of the micro-batches that are about as fast as the fastest, if these keep all alike.
        """
        if self._config.model.device != "cpu":
            return None
        as_fast = [one for one in self.ordered if one.seconds <= AS_FAST * self.ordered[0].seconds]
        if any(one.policy != Policy("none") for one in as_fast):
            return None
        chosen = min(as_fast, key=lambda one: one.micro_batch_tokens)
        plan = self._plan(chosen, card)
        if plan is None:
            return None
        others = (one for one in self.ordered if one is not chosen and self._also_fits(one, chosen, card))
        return self._with_speed(plan, chosen, next(others, None), card)

    def _also_fits(self, one: Candidate, chosen: Candidate, card: int) -> bool:
        """Return True if a candidate takes no more than the chosen one, or fits by an estimate that is made already."""
        keeps_no_more = one.policy == chosen.policy or keeps_less(one.policy, chosen.policy)
        if one.micro_batch_tokens <= chosen.micro_batch_tokens and keeps_no_more:
            return self.host_bytes(one) <= self._budget.host
        return self._memory.is_planned(one.policy) and self._estimated(self._memory, one, card) is not None

    def _estimated(self, memory: FewLayers, one: Candidate, card: int) -> int | None:
        if self.host_bytes(one) > self._budget.host:
            return None
        whole = self._whole.get((one.policy, one.micro_batch_tokens))
        if whole is not None:
            return whole.total if self._fits(whole, card) else None
        return memory.total(one.policy, one.micro_batch_tokens, card + _uncertainty(card))

    def host_bytes(self, one: Candidate) -> int:
        """Compute the host memory for a candidate's offloaded inputs.

        Args:
            one: the candidate.

        Returns:
            Bytes; on a CPU none, as they are in the same memory as all else.
        """
        if self._config.model.device == "cpu":
            return 0
        shape = self.shape
        tokens = min(one.micro_batch_tokens, self._config.data.max_length * self._config.training.global_batch_size)
        return bytes_of_inputs(shape.layers, shape.hidden * shape.itemsize, one.policy, tokens)

    def _plan(self, one: Candidate, card: int) -> MemoryPlan | None:
        """Plan a candidate whole; None where it does not fit."""
        key = one.policy, one.micro_batch_tokens
        if key not in self._whole:
            self._progress(f"planning memory, {one}", 0, None)
            self._whole[key] = plan_memory(self._directory, self._with(one))
            if "_memory" in self.__dict__:
                self._memory.correct(*key, self._whole[key].total)
        plan = self._whole[key]
        return plan if self._fits(plan, card) else None

    def _fits(self, plan: MemoryPlan, card: int) -> bool:
        return dataclasses.replace(self._budget, card=card).holds(plan)

    def _with(self, one: Candidate) -> RunConfig:
        config = with_policy(self._config, one.policy)
        if config.training.micro_batch_tokens == "auto" and one.micro_batch_tokens == config.data.max_length:
            return config
        return with_micro_batch(config, one.micro_batch_tokens, longest_row(self._directory, config))

    def _with_speed(self, plan: MemoryPlan, chosen: Candidate, following: Candidate | None, card: int) -> MemoryPlan:
        steps, rates = self._pace.steps, self._pace.rates
        if not rates.is_known:
            return plan
        speed = Speed(
            seconds=chosen.seconds,
            waiting=chosen.waiting,
            tokens=steps.tokens,
            micro_batch_tokens=chosen.micro_batch_tokens,
            device=rates.name,
            note=" ".join(filter(None, (rates.note, self._pace.note))),
            has_rows=steps.count is not None,
            settings=choice_overrides(chosen.policy, chosen.micro_batch_tokens),
            following=in_json(following, self._config),
            faster=in_json(self._faster(chosen, card), self._config),
        )
        return dataclasses.replace(plan, speed=speed)

    def _faster(self, chosen: Candidate, card: int) -> Candidate | None:
        """Find what would be faster than the user's own settings, and fits by estimate; None where nothing would."""
        settings = self._config.training
        is_open = settings.activation_checkpointing == settings.micro_batch_tokens == "auto"
        if is_open or not self._pace.names_faster:
            return None
        policies = open_policies(self.shape.layers)
        limits = ladder(self._config.data.max_length, self._pace.steps)
        others = candidates(self.shape, self._pace, policies, limits)
        memory = FewLayers(self._directory, self._config, limits, self._memory)
        found, fastest = None, chosen
        for level in LEVELS:  # plans of a level that would hardly be faster are not made
            faster = [one for one in others if one.policy.level == level and AS_FAST * one.seconds < fastest.seconds]
            found = next((one for one in faster if self._estimated(memory, one, card) is not None), found)
            fastest = found or chosen
        return found

    def smaller(self, policy: Policy, limit: int, row_lengths: list[int]) -> Candidate | None:
        """Find the fastest way with less memory than the one that ran out of it.

        Args:
            policy: in force.
            limit: most tokens of a micro-batch, in force.
            row_lengths: tokens of the rows that failed together.

        Returns:
            The candidate; None where there is none, or where less than a longest row is in force already.
        """
        longest = self._config.data.max_length
        limits = ladder(longest, self._pace.steps)
        if limit < longest or not self._pace.rates.is_known:
            return None
        memory = FewLayers(self._directory, self._config, [longest, max(limit, limits[-1])])
        needed = memory.total(policy, limit, NO_LIMIT)
        assert needed is not None
        tokens = sum(row_lengths)

        def lays_out_smaller(one: Candidate) -> bool:
            if len(row_lengths) > 1 and one.micro_batch_tokens < tokens:
                return True
            return keeps_less(one.policy, policy)

        return next_smaller(
            candidates(self.shape, self._pace, open_policies(self.shape.layers), limits),
            lambda one: self._estimated(memory, one, NO_LIMIT),
            needed,
            lays_out_smaller,
        )


def _uncertainty(card: int) -> int:
    """Return by how much an estimate may be too high: what is near the budget is planned whole to see."""
    return min(2 * PAGES[False], card // 50)


def _unknown_pace(config: RunConfig) -> Pace:
    """Put policies in order where neither device nor rows are known."""
    steps = full_rows(config.data.max_length, 1, config.data.packing)
    return Pace(rates_of_card(CAUTIOUS, is_known=False), steps)
