"""Choose by plan the settings that fit a run's longest row on a card: options, and the length of rows.

Left out: reading the rows, and writing the config (cli/init.py).
"""

from collections.abc import Callable

from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning.fit import GRAIN, check_fits, fastest_plan, longest_context
from qlora_trainer.planning.memory_plan import Budget, MemoryPlan
from qlora_trainer.planning.options import changed_options
from qlora_trainer.planning.speed.candidates import Pace
from qlora_trainer.planning.variants import with_length
from qlora_trainer.weights.model_directory import ModelDirectory


def _unknown(config: RunConfig) -> None:
    """Return None: neither device nor rows are known."""


def settings_that_fit(
    directory: ModelDirectory,
    config: RunConfig,
    longest: int,
    budget: Budget,
    progress: Progress = silent,
    pace_of: Callable[[RunConfig], Pace | None] = _unknown,
) -> tuple[RunConfig, MemoryPlan]:
    """Choose the length of rows that holds the longest one, or the longest that fits, and the options for it.

    InsufficientMemoryError is raised where no length fits.

    Args:
        directory: holds the base's config.json.
        config: of the run; its data.max_length is the least, if it fits.
        longest: tokens of the longest row.
        budget: that the run may take.
        progress: is called for each plan.
        pace_of: gives device and rows, as the config cuts them; None where the device is not known.

    Returns:
        (the config with that length and those options, where a plain one is left to auto; its plan).
    """
    wanted = config.data.max_length if longest <= config.data.max_length else -(-longest // GRAIN) * GRAIN
    wanted = min(wanted, directory.facts.positions or wanted)
    config = with_length(config, wanted)
    plan = fastest_plan(directory, config, budget, progress, pace_of(config))
    if plan is None and (shorter := longest_context(directory, config, budget.card, progress)):
        config = with_length(config, min(shorter.max_length, wanted))
        plan = shorter if budget.holds(shorter) else None
    plan = plan or check_fits(directory, config, budget, progress, pace_of(config))
    return config.replace(changed_options(config, plan.options)), plan
