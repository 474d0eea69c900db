"""The commands that use what a run has trained: measure the adapter, ask it, and fold it into the base.

Each starts from the final adapter, or the newest checkpoint's where the run has not ended. Rooms that import torch are
imported inside the commands, so that `qlora --help` answers at once.
"""

import json
import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_trainer.cli.arguments import AsJson, RunDirectory
from qlora_trainer.cli.console import ProgressBars, console, gibibytes, print_notices, print_table, write_out


class MergeDtype(StrEnum):
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class MergeBaseChoice(StrEnum):
    auto = "auto"
    dequantized = "dequantized"
    original = "original"


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
    from qlora_trainer.runs.trained import evaluate_trained, open_trained

    with ProgressBars() as progress:
        trained = open_trained(run_dir, progress=progress)
        result = evaluate_trained(trained, answers, progress)
    print_notices(trained.notices)
    if as_json:
        write_out(json.dumps({key: value if math.isfinite(value) else None for key, value in result.items()}) + "\n")
    else:
        print_table(f"{run_dir}, {trained.source}", [(key, f"{value:.6g}") for key, value in result.items()])


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
    from qlora_trainer.data.rendering.renderer import Renderer
    from qlora_trainer.data.types import Message
    from qlora_trainer.runs.trained import learned_plain_text, open_trained
    from qlora_trainer.training.generation import stream_answer

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


def merge(
    run_dir: RunDirectory,
    output: Annotated[Path, typer.Option(help="A new or empty directory for the merged model.")],
    dtype: Annotated[MergeDtype, typer.Option(help="Dtype of the merged weights.")] = MergeDtype.float16,
    base: Annotated[
        MergeBaseChoice,
        typer.Option(help="Fold into the dequantised base that was trained, or the original; auto measures both."),
    ] = MergeBaseChoice.auto,
    shard_size: Annotated[
        str, typer.Option(help="Largest file of weights, such as 5GB or 2GiB; a larger tensor has a file of its own.")
    ] = "5GB",
    model: Annotated[
        str | None,
        typer.Option(
            help="Merge from this copy of the run's base, such as a prequantised one; default: the run's own."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fold the adapter into the base, verify the result, and write a plain transformers model.

    The JSON has report, choice, difference_from_trained and notices; the same is in qlora_merge.json of the output.
    """
    import torch

    from qlora_trainer.common.units import parse_bytes
    from qlora_trainer.merging.merge_run import merge_run

    max_shard_bytes = parse_bytes(shard_size)
    with ProgressBars() as progress:
        done = merge_run(
            run_dir,
            output,
            dtype=getattr(torch, dtype.value),
            base=base.value,
            model=model,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
    if as_json:
        write_out(json.dumps(done.to_json()) + "\n")
        return
    print_notices(done.notices)
    print_table(f"Merged model in {output}", merge_rows(done))


def _read_line() -> str:
    try:
        return console.input("[bold cyan]you[/] ").strip()
    except EOFError:
        return ""


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
