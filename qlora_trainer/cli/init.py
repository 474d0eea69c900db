"""Declare `qlora init`: write a commented config that fits this machine, a model and rows, by plan."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_trainer.cli.arguments import ModelName, Rank, RowFiles, check_inputs, read_settings, refuse_rows
from qlora_trainer.cli.console import ProgressBars, answers, say
from qlora_trainer.common.units import counted, gib

if TYPE_CHECKING:
    from qlora_trainer.config.schema import RunConfig
    from qlora_trainer.planning.memory_plan import MemoryPlan
    from qlora_trainer.planning.speed.candidates import Pace


def init(
    config: Annotated[Path, typer.Argument(help="The YAML file to write; it must not exist.")] = Path("qlora.yaml"),
    model: ModelName = None,
    data: RowFiles = None,
    rank: Rank = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Memory of the GPU to write it for, such as 8GB; default: what is free here.")
    ] = None,
) -> None:
    """Write a config with comments for a model and rows: settings that fit this machine's GPU, by plan.

    It asks nothing, and reads the model's config and tokenizer, but no weights. Without a GPU it plans for this
    machine's memory, as a run would take the CPU.
    """
    from qlora_trainer.common.command_line import command_line
    from qlora_trainer.common.errors import OutputExistsError, missing_files_name
    from qlora_trainer.common.units import parse_bytes

    options = {"model.name": model, "data.train": data, "adapter.rank": rank}
    refuse_rows("init", [str(config)], options)
    if config.exists():
        raise OutputExistsError(f"{config} exists. Name another file: {command_line('init', 'FILE.yaml')}")
    settings = read_settings("init", None, [], options)
    card = parse_bytes(gpu_memory) if gpu_memory else None
    check_inputs(settings)

    import torch

    from qlora_trainer.common.atomic import write_text
    from qlora_trainer.common.cache import user_cache
    from qlora_trainer.config.commented import commented_yaml
    from qlora_trainer.model.device import choose_device
    from qlora_trainer.model.source import TOKENIZER_FILES, resolve_model
    from qlora_trainer.model.tokenizer import load_tokenizer
    from qlora_trainer.planning.first_config import settings_that_fit
    from qlora_trainer.planning.fit import LONGEST_SEARCHED, budget_here, reserve_of
    from qlora_trainer.planning.memory_plan import Budget
    from qlora_trainer.runs.directory import prepare_data
    from qlora_trainer.runs.pace import knows_device, pace_here
    from qlora_trainer.training.memory.activations import spare_host_memory

    with ProgressBars("No config is written.") as progress:
        with missing_files_name("model.name"):
            directory = resolve_model(settings.model.name, None, user_cache(), progress, files=TOKENIZER_FILES)
        limit = directory.facts.positions or LONGEST_SEARCHED
        uncut = settings.replace({"data.max_length": limit})
        prepared = prepare_data(uncut, load_tokenizer(directory), directory, progress)
        report = prepared.report
        device = torch.device("cuda") if card else choose_device(settings.model.device)
        budget = Budget(card, spare_host_memory(), reserve_of(card)) if card else budget_here(device)
        longest = max(report.train.longest, report.eval.longest)
        planned_for = settings.replace({"model.device": device.type})
        is_known = knows_device(planned_for, None)

        def pace_of(config: "RunConfig") -> "Pace | None":
            return pace_here(config, prepared, device) if is_known else None

        chosen, plan = settings_that_fit(directory, planned_for, longest, budget, progress, pace_of)
    chosen = chosen.replace({"model.device": settings.model.device})
    paragraphs = heading(plan, budget.card, longest, report.train.examples)
    write_text(config, commented_yaml(chosen, paragraphs))
    for paragraph in paragraphs[1:]:
        answers.print(paragraph, markup=False)
    say("Config:  ", command=config, to=answers)
    say("Next:    ", command=command_line("train", config), to=answers)


def heading(plan: "MemoryPlan", memory: int, longest: int, rows: int) -> list[str]:
    """Write what a config was made for, and what it takes.

    Args:
        plan: of the config.
        memory: bytes that it fits in.
        longest: tokens of the longest row.
        rows: for training.

    Returns:
        Paragraphs.
    """
    from qlora_trainer.planning.options import options_of

    place = "GPU memory" if plan.card else "memory"
    cut = "" if longest <= plan.max_length else f"; longer ones are cut at {plan.max_length:,}, as no more fits"
    options = options_of(plan)
    size = f"of up to {plan.speed.micro_batch_tokens:,} tokens" if plan.speed else "of one longest row"
    return [
        "Written by `qlora init`; docs/reference/config.md of the project has all keys, with those that are not here.",
        f"{counted(rows, 'training row')}, the longest of {counted(longest, 'token')}{cut}.",
        f"By plan it takes {gib(plan.total)} of {gib(memory)} of {place}"
        + (f", and {gib(plan.host)} of the host's" if plan.host else "")
        + f", under activation checkpointing {plan.policy}, in micro-batches {size}: auto chooses both at each start.",
        *([f"It fits with memory-efficient options: {options}."] if options else []),
    ]
