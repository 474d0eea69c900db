"""Declare `qlora inspect`: prepare the data and show it as the model will see it; show_rows.py prints it."""

import json
from typing import Annotated

import typer

from qlora_trainer.cli.arguments import (
    AsJson,
    ConfigFile,
    MaxLength,
    ModelName,
    Overrides,
    RowFiles,
    check_inputs,
    read_settings,
)
from qlora_trainer.cli.console import ProgressBars, answers, write_out


def inspect(
    config: ConfigFile = None,
    overrides: Overrides = None,
    model: ModelName = None,
    data: RowFiles = None,
    max_length: MaxLength = None,
    row: Annotated[int | None, typer.Option(help="Show only this row, counted from 0.")] = None,
    rows: Annotated[int, typer.Option(min=0, help="How many rows to show.")] = 3,
    eval_set: Annotated[bool, typer.Option("--eval", help="Show eval rows instead of training rows.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the data as the model will see it, what became of every row, and the size of an epoch.

    Without a config: qlora inspect --model Qwen/Qwen3-8B --data rows.jsonl. Of the model only config and tokenizer are
    needed.

    Trained tokens are in color, or in brackets if the terminal has no colors. Text that spells a control token, such as
    <|im_end|> in a question, is marked differently from the token.
    """
    options = {"model.name": model, "data.train": data, "data.max_length": max_length}
    settings = read_settings("inspect", config, overrides or [], options)
    check_inputs(settings)

    from qlora_trainer.adapters.tokens.new_tokens import run_tokenizer
    from qlora_trainer.cli.show_rows import describe_row, legend, show_report, show_row
    from qlora_trainer.common.cache import user_cache
    from qlora_trainer.common.errors import missing_files_name
    from qlora_trainer.data.batching.loader import StepLoader, micro_batch_tokens
    from qlora_trainer.data.preparation.overview import make_overview
    from qlora_trainer.model.source import TOKENIZER_FILES, resolve_model
    from qlora_trainer.planning.attention_trial import known_to_keep_apart
    from qlora_trainer.runs.directory import prepare_data

    with ProgressBars("Nothing was changed.") as progress:
        with missing_files_name("model.name"):
            directory = resolve_model(
                settings.model.name, settings.model.revision, user_cache(), progress, files=TOKENIZER_FILES
            )
        tokenizer = run_tokenizer(directory, settings.adapter)
        prepared = prepare_data(settings, tokenizer, directory, progress)
    loader = StepLoader(
        prepared.train,
        settings.training.global_batch_size,
        micro_batch_tokens(settings),
        settings.data.packing,
        settings.training.seed,
        prepared.mixture,
    )
    can_pack = known_to_keep_apart(directory, user_cache())
    overview = make_overview(loader, prepared.train.lengths, prepared.eval.lengths, can_pack)
    name, examples = ("eval", prepared.eval) if eval_set else ("training", prepared.train)
    if as_json:
        answer = {**prepared.report.to_json(), **overview.to_json()}
        if row is not None:
            answer["row"] = describe_row(tokenizer, examples, row, name)
        write_out(json.dumps(answer) + "\n")
        return
    if row is None:
        show_report(prepared.report, overview)
    indices = range(min(rows, len(examples))) if row is None else [row]
    if indices:
        answers.print(legend())
    for index in indices:
        show_row(tokenizer, examples, index, name)
