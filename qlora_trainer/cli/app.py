"""Register the commands, set up the libraries, and turn errors into messages and exit codes.

Exit code 0 when done; 2 for an error that the user can fix, with one message and no traceback; 1 for a bug of ours; 130
or 143 after Ctrl-C or SIGTERM, but 0 if training was stopped by it and saved.
Each command is in the file of its name. Nothing here imports torch, so that `qlora --help` prints at once.
"""

import os
import sys
from typing import Annotated

import typer

from qlora_trainer.cli.arguments import OnceCommand
from qlora_trainer.cli.combine import combine
from qlora_trainer.cli.console import open_closed_streams, print_error, say, write_out
from qlora_trainer.cli.demo import demo
from qlora_trainer.cli.doctor import doctor
from qlora_trainer.cli.evaluate import evaluate
from qlora_trainer.cli.generate import generate
from qlora_trainer.cli.init import init
from qlora_trainer.cli.inspect import inspect
from qlora_trainer.cli.merge import merge_command
from qlora_trainer.cli.plan import plan
from qlora_trainer.cli.quantize import quantize
from qlora_trainer.cli.stopping import answered_signals
from qlora_trainer.cli.train import resume, train_command
from qlora_trainer.common.command_line import command_line
from qlora_trainer.common.errors import QLoRATrainerError, first_line, is_cuda_not_starting, is_out_of_memory
from qlora_trainer.common.machine import is_wsl
from qlora_trainer.planning.allocator import ALLOCATOR_VARIABLES


def paragraphs(docstring: str | None) -> str:
    """Join the lines of each paragraph, which the terminal's width breaks anew.

    Args:
        docstring: of a command.

    Returns:
        Its help text.
    """
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (docstring or "").split("\n\n"))


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune a language model on one consumer GPU: 4-bit NF4 base, LoRA adapters, exact resume, verified merge.",
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        write_out(f"qlora-trainer {version('qlora-trainer')}\n")
        raise typer.Exit


@app.callback()
def before_every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Declare the options that come before a command.

    Args:
        version: asks for the version, which is printed as soon as the option is read.
    """


for command in (  # in the order of --help; `_command` is added where the library exports the same name
    init,
    train_command,
    resume,
    evaluate,
    generate,
    merge_command,
    combine,
    inspect,
    plan,
    quantize,
    doctor,
    demo,
):
    app.command(command.__name__.removesuffix("_command"), cls=OnceCommand, help=paragraphs(command.__doc__))(command)


def main() -> None:
    """Run the command line; an error that the user can fix becomes one message and exit code 2.

    Raises:
        RuntimeError: a fault of the program, and not of CUDA or of memory.
    """
    open_closed_streams()
    _set_up_libraries()
    try:
        with answered_signals(say):
            app()
    except QLoRATrainerError as error:
        print_error(str(error))
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if is_cuda_not_starting(error):
            print_error(
                f"CUDA could not start: {first_line(error)} Saved work is intact. Run nvidia-smi to see if another "
                "program holds the GPU; stop it, or restart the driver. "
                f"`{command_line('doctor')}` shows what torch sees. To run on the CPU, which is slow, keep "
                "model.device=auto and put CUDA_VISIBLE_DEVICES= in front of the command."
            )
            sys.exit(2)
        if not is_out_of_memory(error):
            raise
        print_error(
            f"Memory ran out: {first_line(error)} Saved work is intact. Lower data.max_length or "
            "training.micro_batch_tokens, set training.activation_checkpointing=full, or choose a smaller base. "
            "A run that has started goes on from its last checkpoint: "
            f"{command_line('resume', 'RUN')}, with its directory in place of RUN."
        )
        sys.exit(2)


def _set_up_libraries() -> None:
    """Set environment variables before torch and transformers are imported; what the user has set stays."""
    # Threads that wait for each other sleep instead of spinning: next to any other busy process, spinning makes a step
    # on a CPU several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    prefer_expandable_segments()
    # Libraries log at import for their developers; whatever matters to a run, the commands print.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def prefer_expandable_segments() -> None:
    """Ask torch for expandable segments, unless the user has set its allocator; call before torch is imported.

    Nothing is set under WSL, where some cards and drivers then refuse the first allocation (pytorch#192330).
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES) and not is_wsl():
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
