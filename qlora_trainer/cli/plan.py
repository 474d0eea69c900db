"""The commands that look before anything is trained: at the rows, at the memory a run needs, and at this machine.

None loads the model. Rooms that import torch are imported inside the commands, so that `qlora --help`
answers at once.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from qlora_trainer.cli.arguments import AsJson, Overrides
from qlora_trainer.cli.console import ProgressBars, console, print_findings, print_table, write_out


def inspect(
    config: Annotated[Path, typer.Argument(help="A YAML config; of the model only config and tokenizer are needed.")],
    overrides: Overrides = None,
    row: Annotated[int | None, typer.Option(help="Show only this row, counted from 0.")] = None,
    rows: Annotated[int, typer.Option(min=0, help="How many rows to show.")] = 3,
    heldout: Annotated[bool, typer.Option("--heldout", help="Show held-out rows instead of training rows.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the data as the model will see it, what became of every row, and what an epoch is.

    Learned tokens are in colour, or in brackets where there are no colours.

    The JSON has what preparation tells of the rows (sources, train, heldout, train_duplicates, heldout_duplicates,
    max_length, notices, …); lengths: {edges, train, heldout}, where bin i counts rows of edges[i] to edges[i+1]-1
    tokens; epoch: {rows, batch_size, steps, tokens_per_step, micro_batch_tokens, packing, can_pack, packed, padded,
    fill_of_whole_steps, steps_laid_out}, where packing is whether rows are packed, can_pack whether the model's
    attention keeps packed rows apart (null: not known), and packed and padded have micro_batches (a step) and fill (the
    share of computed tokens that is no padding); and with --row also row: {set, index, where, tokens, learned_tokens,
    stretches, input_ids, learned}.
    """
    from qlora_trainer.cli.inspect import legend, row_to_json, show_report, show_row
    from qlora_trainer.config.load import load_config
    from qlora_trainer.data.preparation.overview import overview_of
    from qlora_trainer.model.source import TOKENIZER_FILES, load_tokenizer, resolve_model
    from qlora_trainer.planning.memory_plan import keeps_apart
    from qlora_trainer.runs.directory import prepare_data, user_cache
    from qlora_trainer.training.loop import micro_batch_tokens

    settings = load_config(config, overrides or [])
    with ProgressBars() as progress:
        directory = resolve_model(
            settings.model.name, settings.model.revision, user_cache(), progress, files=TOKENIZER_FILES
        )
        tokenizer = load_tokenizer(directory)
        prepared = prepare_data(settings, tokenizer, directory, progress)
    overview = overview_of(
        prepared,
        batch_size=settings.training.batch_size,
        micro_batch_tokens=micro_batch_tokens(settings),
        packing=settings.data.packing,
        can_pack=keeps_apart(directory),
        seed=settings.training.seed,
    )
    name, examples = ("held-out", prepared.heldout) if heldout else ("training", prepared.train)
    if as_json:
        answer = {**prepared.report.to_json(), **overview.to_json()}
        if row is not None:
            answer["row"] = row_to_json(tokenizer, examples, row, name)
        write_out(json.dumps(answer) + "\n")
        return
    if row is None:
        show_report(prepared.report, overview)
    indices = range(min(rows, len(examples))) if row is None else [row]
    if indices:
        console.print(legend())
    for index in indices:
        show_row(tokenizer, examples, index, name)


def plan(
    config: Annotated[Path, typer.Argument(help="A YAML config; of the model only config.json is needed.")],
    overrides: Overrides = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory of the card (with model.device=cpu: of the host), such as 24GiB; what is here by default."
        ),
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Host memory for what is offloaded, such as 32GiB; what is free here by default.")
    ] = None,
    search: Annotated[
        bool,
        typer.Option(
            help="Find the longest rows and largest micro-batch that fit; that larger ones do not is an estimate."
        ),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Say what memory a run needs, before it has it: the training step itself, on tensors without memory.

    On a card, or with model.device=cpu in host memory.

    The JSON has plan, gpu_memory and fits, and longest_context and largest_micro_batch, each a plan or null. A plan has
    total, components (all in bytes, they sum to total), host, operation, allocated, reserved, max_length,
    micro_batch_tokens, policy, activations (the policy in words), base_parameters, adapter_parameters, card (which is
    planned for, and whether it was assumed), attention (how documents are attended to) and elsewhere.
    """
    from qlora_trainer.common.units import parse_bytes
    from qlora_trainer.config.load import load_config
    from qlora_trainer.model.source import CONFIG_FILES, resolve_model
    from qlora_trainer.planning import fit as fitting
    from qlora_trainer.planning.memory_plan import plan_memory
    from qlora_trainer.runs.directory import user_cache
    from qlora_trainer.training.activations import host_room

    settings = load_config(config, overrides or [])
    card = parse_bytes(gpu_memory) if gpu_memory else fitting.memory_here(settings)
    host = parse_bytes(host_memory) if host_memory else host_room()
    budget = fitting.Budget(card, host) if card else None
    planned = longest = largest = None
    with ProgressBars() as progress:
        directory = resolve_model(
            settings.model.name, settings.model.revision, user_cache(), progress, files=CONFIG_FILES
        )
        progress("planning memory", 0, None)
        if budget and settings.training.activations == "auto":
            planned = fitting.fastest_plan(directory, settings, budget, progress)
        planned = planned or plan_memory(directory, fitting.leanest(settings) if budget else settings)
        if budget and search:
            longest = fitting.longest_context(directory, settings, budget.card, progress)
            largest = fitting.largest_micro_batch(directory, settings, budget.card, progress)
    if as_json:
        answer = {
            "plan": planned.to_json(),
            "gpu_memory": card,
            "fits": budget.holds(planned) if budget else None,
            "longest_context": longest and longest.to_json(),
            "largest_micro_batch": largest and largest.to_json(),
        }
        write_out(json.dumps(answer) + "\n")
        return
    print_table(f"Memory of {settings.model.name}", fitting.describe(planned, budget, longest, largest))
    if budget and search and longest is None:
        console.print("No length of rows fits this card.")


def doctor(as_json: AsJson = False) -> None:
    """Examine this machine: versions, devices, whether 4-bit weights come out right. Exit 1 where something is wrong.

    The JSON is a list of findings: name, status (ok, note, problem), detail, advice.
    """
    from dataclasses import asdict

    from qlora_trainer.cli.doctor import examine
    from qlora_trainer.cli.findings import Finding
    from qlora_trainer.common.errors import DiskError
    from qlora_trainer.runs.directory import user_cache

    try:
        findings = examine(user_cache())
    except DiskError as error:  # a user without a home
        findings = [*examine(), Finding("Disk of the cache", "problem", str(error), "Set XDG_CACHE_HOME to a folder.")]
    if as_json:
        write_out(json.dumps([asdict(finding) for finding in findings]) + "\n")
    else:
        print_findings([(each.status, each.name, each.detail, each.advice) for each in findings])
    if any(finding.status == "problem" for finding in findings):
        raise typer.Exit(1)
