"""Declare `qlora generate`: answer a prompt with a run's adapter, or chat."""

from typing import Annotated

import typer

from qlora_trainer.cli.arguments import RunDirectory
from qlora_trainer.cli.console import ProgressBars, console, write_out


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
    from qlora_trainer.data.types import Message
    from qlora_trainer.runs.trained import open_trained, trained_on_plain_text
    from qlora_trainer.training.generation import stream_answer

    with ProgressBars("Nothing was written.") as progress:
        trained = open_trained(run_dir, progress=progress)
        as_text = trained_on_plain_text(trained, progress) if raw is None else raw
    model, renderer = trained.base.model, trained.renderer
    conversation = [Message("system", system)] if system else []
    while True:
        text = prompt if prompt is not None else _read_line()
        if not text:
            return
        conversation.append(Message("user", text))
        answer = ""
        tokens = renderer.render_prompt(text if as_text else conversation)
        for piece in stream_answer(model, renderer.tokenizer, tokens, max_new_tokens=max_new_tokens):
            write_out(piece)
            answer += piece
        write_out("\n")
        if prompt is not None:
            return
        conversation.append(Message("assistant", answer))


def _read_line() -> str:
    """Read the user's next message; empty at the end of input."""
    try:
        return console.input("[bold cyan]you[/] ").strip()
    except EOFError:
        return ""
