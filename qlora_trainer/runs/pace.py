"""Say what the time of a run's steps depends on: the device and the rows; and estimate how long the run takes.

The formula is in planning/speed.
"""

import numpy as np
import torch

from qlora_trainer.adapters.tokens.new_tokens import run_tokenizer
from qlora_trainer.common.errors import QLoRATrainerError, first_line
from qlora_trainer.common.progress import Progress
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.batching.loader import StepLoader, micro_batch_tokens
from qlora_trainer.data.preparation.prepare import Prepared
from qlora_trainer.data.preparation.source_keys import check_files
from qlora_trainer.model.device import current_card
from qlora_trainer.planning.empty_run import planned_card, planned_dtype
from qlora_trainer.planning.memory_plan import Budget, MemoryPlan
from qlora_trainer.planning.speed.candidates import Pace
from qlora_trainer.planning.speed.cards import CardFigures
from qlora_trainer.planning.speed.hours import Hours, run_hours
from qlora_trainer.planning.speed.rates import rates_here, rates_of_card
from qlora_trainer.planning.speed.rows import Steps, full_rows, steps_of
from qlora_trainer.planning.speed.shape import count_shape
from qlora_trainer.planning.speed.ways import NO_LIMIT, Ways
from qlora_trainer.runs.directory import prepare_data
from qlora_trainer.runs.run import Run
from qlora_trainer.training.determinism import workers_for
from qlora_trainer.training.memory.activations import Policy, choose_policy, spare_host_memory
from qlora_trainer.training.state import Smaller, total_steps
from qlora_trainer.weights.model_directory import ModelDirectory


def steps_to_take(config: RunConfig, prepared: Prepared) -> Steps:
    """Look at the steps of a run's own rows.

    Args:
        config: of the run.
        prepared: its rows; those longer than the config's data.max_length are taken as cut there.

    Returns:
        The steps, packed where the config says so; whether the model can keep packed rows apart is not known yet.
    """
    settings = config.training
    loader = StepLoader(
        prepared.train,
        settings.global_batch_size,
        micro_batch_tokens(config),
        config.data.packing,
        settings.seed,
        prepared.mixture,
    )
    train = prepared.report.train
    trained = train.trained_tokens / train.tokens if train.tokens else 1.0
    lengths, eval_lengths = (
        np.minimum(examples.lengths, config.data.max_length) for examples in (prepared.train, prepared.eval)
    )
    return steps_of(loader, lengths, total_steps(config, loader), trained, eval_lengths.tolist())


def pace_here(config: RunConfig, prepared: Prepared, device: torch.device) -> Pace:
    """Describe the device of a run and its rows.

    Args:
        config: of the run.
        prepared: its rows.
        device: that it uses.

    Returns:
        What the time of its steps depends on.
    """
    workers = workers_for(config.training, on_cpu=device.type == "cpu")
    return Pace(rates_here(device), steps_to_take(config, prepared), workers=workers)


def limit_in_force(plan: MemoryPlan | None, config: RunConfig, in_force: RunConfig | None = None) -> int:
    """Return the most tokens of a micro-batch that a run takes.

    Args:
        plan: of the run, if there is one.
        config: of the run.
        in_force: the config with what a checkpoint's run had chosen.

    Returns:
        Tokens.
    """
    if plan is not None and plan.speed is not None and config.training.micro_batch_tokens == "auto":
        return plan.speed.micro_batch_tokens
    is_lower = in_force is not None and plan is not None and _policy(in_force) not in (None, plan.policy)
    return micro_batch_tokens(config if in_force is None or is_lower else in_force)


def lowered_warning(plan: MemoryPlan | None, in_force: RunConfig) -> str | None:
    """Warn that a resumed run takes less memory than its checkpoint's, as that no longer fits.

    Args:
        plan: of the resumed run.
        in_force: the config with what the checkpoint's run had chosen.

    Returns:
        The warning; None where the run goes on as it was.
    """
    if plan is None:
        return None
    limit, policy = in_force.training.micro_batch_tokens, _policy(in_force)
    same_limit = plan.speed is None or limit in ("auto", plan.speed.micro_batch_tokens)
    if same_limit and policy in (None, plan.policy):
        return None
    was = [f"activation checkpointing {policy}"] if policy else []
    was += [f"micro-batches of up to {limit:,} tokens"] if limit != "auto" else []
    now = f", micro-batches of up to {plan.speed.micro_batch_tokens:,} tokens" if plan.speed else ""
    return (
        f"The choice in force at the checkpoint ({', '.join(was)}) no longer fits the free memory. The run goes on "
        f"with {plan.policy}{now}: it trains on the same rows, and its last bits may differ from an uninterrupted "
        "run's."
    )


def smaller_by_plan(directory: ModelDirectory, config: RunConfig, device: torch.device, pace: Pace) -> Smaller:
    """Make what a run asks where memory ran out: the fastest way that is smaller by plan.

    Args:
        directory: holds the base's config.json.
        config: of the run, with its options.
        device: that it uses.
        pace: device and rows.

    Returns:
        The function, which plans models of a few layers when it is called.
    """
    config = config.replace({"model.device": device.type})

    def smaller(policy: Policy, limit: int, row_lengths: list[int]) -> tuple[Policy, int] | None:
        budget = Budget(NO_LIMIT, spare_host_memory())
        found = Ways(directory, config, budget, pace=pace).smaller(policy, limit, row_lengths)
        return (found.policy, found.micro_batch_tokens) if found else None

    return smaller


def knows_device(config: RunConfig, card: CardFigures | None) -> bool:
    """Return True if a plan is for a device whose speed can be known.

    Args:
        config: of the run.
        card: named to plan for.

    Returns:
        True for a card by name, the CPU, or a GPU that is here.
    """
    return config.model.device == "cpu" or card is not None or torch.cuda.is_available()


def pace_to_plan(
    config: RunConfig, directory: ModelDirectory | None, card: CardFigures | None, progress: Progress
) -> Pace | None:
    """Describe what a plan is for: a card by name, or the device here; the config's rows where they can be had.

    Args:
        config: of the run.
        directory: holds the base's tokenizer; None: the config has no rows.
        card: of the table; None: the device here.
        progress: is called as rows are prepared.

    Returns:
        Device and rows; rows of full length, where others cannot be had. None where no device is known.
    """
    if not knows_device(config, card):
        return None
    device = torch.device("cpu") if config.model.device == "cpu" else None
    rates = rates_of_card(card) if card and device is None else rates_here(device or current_card())
    steps = full_rows(config.data.max_length, config.training.global_batch_size, config.data.packing)
    note = ""
    if directory is not None:
        try:
            check_files(config.data)
            tokenizer = run_tokenizer(directory, config.adapter)
            steps = steps_to_take(config, prepare_data(config, tokenizer, directory, progress))
        except QLoRATrainerError as error:
            note = f"The rows could not be had ({first_line(error)}); these are rows of full length."
    workers = workers_for(config.training, on_cpu=config.model.device == "cpu")
    return Pace(rates, steps, note, workers=workers)


def hours_to_plan(config: RunConfig, directory: ModelDirectory, pace: Pace | None, plan: MemoryPlan) -> Hours | None:
    """Estimate how long a planned run takes.

    Args:
        config: of the run.
        directory: holds the base's config.json.
        pace: device and rows.
        plan: of the run.

    Returns:
        The estimate; None where the device or the rows are not known.
    """
    if pace is None or plan.speed is None:
        return None
    shape = count_shape(directory, config, planned_dtype(config, planned_card(config)))
    return run_hours(shape, pace, plan.policy, plan.speed.micro_batch_tokens, config)


def hours_of(run: Run) -> Hours | None:
    """Estimate how long a run, or what is left of it, takes.

    Args:
        run: new or resumed.

    Returns:
        The estimate; None where nothing is left, or the device's figures are not known.
    """
    state = run.state
    if state.step == state.total_steps:
        return None
    shape = count_shape(run.base.directory, run.config, run.base.compute_dtype)
    return run_hours(shape, run.pace, state.policy, state.loader.micro_batch_tokens, run.config, state.step)


def _policy(config: RunConfig) -> Policy | None:
    """Return the policy that a config sets; None where it leaves it open."""
    if config.training.activation_checkpointing == "auto":
        return None
    return choose_policy(config.training, torch.device("cpu"))
