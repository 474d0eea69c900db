"""Declare `qlora plan`: print the memory that a run needs, by component, and the largest run that fits."""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_trainer.cli.arguments import (
    AsJson,
    ConfigFile,
    MaxLength,
    ModelName,
    Overrides,
    Rank,
    check_model,
    read_settings,
)
from qlora_trainer.cli.console import ProgressBars, answers, print_table, write_out
from qlora_trainer.common.units import counted, gib

if TYPE_CHECKING:
    from qlora_trainer.planning.memory_plan import Budget, MemoryPlan
    from qlora_trainer.planning.speed.candidates import Pace
    from qlora_trainer.planning.speed.hours import Hours


def plan(
    config: ConfigFile = None,
    overrides: Overrides = None,
    model: ModelName = None,
    rank: Rank = None,
    max_length: MaxLength = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory of the GPU (with model.device=cpu: of the host), such as 24GiB; default: this machine's."
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="Name of the GPU, such as 'RTX 4090': its memory, and the time of a step on it."),
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Host memory for offloaded tensors, such as 32GiB; default: what is free.")
    ] = None,
    search: Annotated[
        bool,
        typer.Option(
            help="Find the longest rows and the largest micro-batch that fit. That nothing larger fits is an estimate."
        ),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Compute the memory that a run needs, by running its training step on tensors without data.

    It plans GPU memory; with model.device=cpu, host memory. Of the model only config.json is needed. Where the rows of
    the config and the tokenizer can be had too, they say how long the run will take.
    """
    options = {"model.name": model, "adapter.rank": rank, "data.max_length": max_length}
    is_file = config is not None and config.exists()
    words = [*([str(config)] if config and not is_file else []), *(overrides or [])]
    has_rows = is_file or any(word.startswith("data.train=") for word in words)
    unread = [] if has_rows else ["data.train=rows.jsonl"]  # a config needs rows, and a plan can do without
    settings = read_settings("plan", config, [*unread, *(overrides or [])], options)
    check_model(settings)

    from qlora_trainer.adapters.kinds.table import adapter_kind
    from qlora_trainer.adapters.tokens.new_tokens import check_tokens
    from qlora_trainer.common.cache import user_cache
    from qlora_trainer.common.errors import ConfigError, missing_files_name
    from qlora_trainer.common.units import parse_bytes
    from qlora_trainer.model.load_plan import RECORD_NAME
    from qlora_trainer.model.source import CONFIG_FILES, TOKENIZER_FILES, resolve_model
    from qlora_trainer.planning import fit as fitting
    from qlora_trainer.planning.memory_plan import Budget, plan_memory
    from qlora_trainer.planning.other_ways import FULL, estimate_in_words, parts_of, side_by_side
    from qlora_trainer.planning.speed.cards import card_named
    from qlora_trainer.planning.variants import with_least_memory
    from qlora_trainer.runs.base_start import check_start
    from qlora_trainer.runs.pace import hours_to_plan, knows_device, pace_to_plan
    from qlora_trainer.training.memory.activations import spare_host_memory

    on_cpu = settings.model.device == "cpu"
    if gpu and on_cpu:
        raise ConfigError("--gpu names a GPU, and model.device=cpu plans host memory: leave one of them out.")
    named = card_named(gpu) if gpu else None
    card = parse_bytes(gpu_memory) if gpu_memory else named.memory if named else fitting.memory_here(settings)
    host = parse_bytes(host_memory) if host_memory else spare_host_memory()
    budget = Budget(card, host, fitting.reserve_of(card, on_cpu=on_cpu)) if card else None
    planned = longest = largest = pace = hours = None
    with ProgressBars("Nothing was changed.") as progress:
        with missing_files_name("model.name"):
            reads_rows = has_rows and budget and knows_device(settings, named)
            reads_tokens = reads_rows or settings.adapter.trains_tokens
            files = TOKENIZER_FILES if reads_tokens else (*CONFIG_FILES, RECORD_NAME)
            directory = resolve_model(settings.model.name, settings.model.revision, user_cache(), progress, files=files)
        check_start(directory, settings.adapter)  # what a run refuses
        check_tokens(directory, settings.adapter)
        pace = pace_to_plan(settings, directory if reads_rows else None, named, progress) if budget else None
        progress("planning memory", 0, None)
        if budget:
            planned = fitting.fastest_plan(directory, settings, budget, progress, pace)
        planned = planned or plan_memory(directory, with_least_memory(directory, settings) if budget else settings)
        if budget and search:
            longest = fitting.longest_context(directory, settings, budget.card, progress)
            largest = fitting.largest_micro_batch(directory, settings, budget.card, progress)
        hours = hours_to_plan(settings, directory, pace, planned)
    if as_json:
        answer = {
            "plan": planned.to_json(),
            "hours": hours and {**dataclasses.asdict(hours), "total": hours.total},
            "gpu_memory": card,
            "fits": budget.holds(planned) if budget else None,
            "longest_context": longest and longest.to_json(),
            "largest_micro_batch": largest and largest.to_json(),
        }
        write_out(json.dumps(answer) + "\n")
        return
    rows = [("merges", adapter_kind(settings.adapter).merges_in_words)]
    rows = describe(planned, budget, longest, largest, hours, pace) + rows
    print_table(f"Memory of {settings.model.name}", rows)
    header, *parts = side_by_side({"this run": parts_of(planned.components), **planned.elsewhere})
    print_table("Next to other ways of training it", parts, header=header)
    answers.print(f"{FULL[0].upper()}{FULL[1:]}, before activations: {estimate_in_words(planned.base_parameters)}.")
    if budget and search and longest is None:
        answers.print("No row length fits in this memory.")


def describe(
    plan: "MemoryPlan",
    budget: "Budget | None",
    longest: "MemoryPlan | None" = None,
    largest: "MemoryPlan | None" = None,
    hours: "Hours | None" = None,
    pace: "Pace | None" = None,
) -> list[tuple[str, str]]:
    """Describe a plan for people.

    Args:
        plan: of the run.
        budget: in which it should fit; None if unknown.
        longest: the plan with the longest rows that fit.
        largest: the plan with the largest micro-batch that fits.
        hours: that the run takes, if its rows are known.
        pace: device and rows; None if no device is known.

    Returns:
        (name, value) pairs.
    """
    from qlora_trainer.planning.memory_plan import CONTEXT
    from qlora_trainer.planning.options import options_of
    from qlora_trainer.planning.speed.choice import speed_in_words

    on_card = plan.components[CONTEXT] > 0
    rows = [
        (
            "planned",
            f"a micro-batch of {counted(plan.micro_batch_tokens, 'token')}, rows of up to {plan.max_length:,}",
        ),
        (
            "activation checkpointing",
            f"{plan.policy}" + (f"; {gib(plan.host)} of host memory" if plan.host else ""),
        ),
        *([("memory-efficient options", options)] if (options := options_of(plan)) else []),
        *([("GPU", plan.card)] if plan.card else []),
        ("attention", plan.attention),
        *((name, gib(count)) for name, count in plan.components.items() if count),
        ("total on the GPU" if on_card else "total in host memory", gib(plan.total)),
        *([("of it reserved by torch", f"{gib(plan.reserved)}, {gib(plan.allocated)} in tensors")] if on_card else []),
        ("the most is needed in", plan.operation),
    ]
    if budget:
        margin = gib(abs(budget.card - plan.total))
        place = f"on a GPU of {gib(budget.card)}" if on_card else f"in {gib(budget.card)} of host memory"
        rows.append((place, f"fits, {margin} to spare" if plan.total <= budget.card else f"does not fit, by {margin}"))
        if plan.host > budget.host:
            rows.append((f"in {gib(budget.host)} of host memory", "the offloaded tensors do not fit"))
    if plan.speed:
        rows += speed_in_words(plan.speed)
    elif pace and not pace.rates.is_known:
        rows.append(("note", pace.rates.note))
    elif not pace and on_card and plan.micro_batch_tokens <= plan.max_length:
        rows.append(("micro-batches", "one longest row, as no GPU is known: --gpu names one, such as 'RTX 4090'"))
    if hours:
        rows.append(("duration", str(hours)))
    if longest:
        rows.append(("longest rows that fit", f"{counted(longest.max_length, 'token')} {_under(longest)}"))
    if largest:
        tokens = counted(largest.micro_batch_tokens, "token")
        rows.append(("largest micro-batch that fits", f"{tokens} {_under(largest)}"))
    return rows


def _under(plan: "MemoryPlan") -> str:
    """Write what a plan takes and under which settings, in parentheses."""
    from qlora_trainer.planning.options import options_of

    return f"({', '.join(filter(None, (f'{gib(plan.total)} in total', str(plan.policy), options_of(plan))))})"
