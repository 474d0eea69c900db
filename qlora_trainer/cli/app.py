"""The command line: the list of the commands, the libraries' settings, and what an error becomes.

Exit code 0 when done; 2 for what the user can mend, with one message and no traceback; 1 for our own fault. What each
command does is in the file of its name. Nothing here imports torch, so that `qlora --help` answers at once.
"""

import os
import sys

import typer

from qlora_trainer.cli.console import print_error
from qlora_trainer.cli.demo import demo
from qlora_trainer.cli.doctor import doctor
from qlora_trainer.cli.evaluate import evaluate
from qlora_trainer.cli.generate import generate
from qlora_trainer.cli.inspect import inspect
from qlora_trainer.cli.merge import merge
from qlora_trainer.cli.plan import plan
from qlora_trainer.cli.quantize import quantize
from qlora_trainer.cli.train import resume, train
from qlora_trainer.common.errors import QLoRATrainerError, first_line, is_cuda_not_starting, is_out_of_memory
from qlora_trainer.common.machine import is_wsl
from qlora_trainer.planning.allocator import ALLOCATOR_VARIABLES

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune a language model on one consumer GPU: 4-bit NF4 base, LoRA adapters, exact resume, verified merge.",
)
for command in (
    train,
    resume,
    evaluate,
    generate,
    merge,
    inspect,
    plan,
    quantize,
    doctor,
    demo,
):  # as --help lists them
    app.command()(command)


def main() -> None:
    """The entry point: errors a user can mend become one message and exit code 2."""
    _set_up_libraries()
    try:
        app()
    except QLoRATrainerError as error:
        print_error(str(error))
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if is_cuda_not_starting(error):
            print_error(
                f"CUDA does not start here: {first_line(error)} Nothing saved was lost. See by nvidia-smi whether "
                "another program holds the card, end it or wait for it, or restart the driver; `qlora doctor` says "
                "what torch sees. To train without a card, slowly: model.device=cpu"
            )
            sys.exit(2)
        if not is_out_of_memory(error):
            raise
        print_error(
            f"Memory ran out: {first_line(error)} Nothing saved was lost. Lower data.max_length or "
            "training.micro_batch_tokens, set training.activation_checkpointing=full, or choose a smaller base. "
            "To go on with less memory: qlora resume RUN_DIR training.activation_checkpointing=full"
        )
        sys.exit(2)


def _set_up_libraries() -> None:
    """Before torch and transformers are imported; what the user has set stays."""
    # Threads that wait for each other sleep instead of spinning: next to any other busy process, spinning makes a step
    # on a CPU several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    prefer_expandable_segments()
    # What libraries log at import is for their developers; what matters to a run we say ourselves.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def prefer_expandable_segments() -> None:
    """Ask torch for expandable segments, unless the user has settings of their own. Before torch is imported.

    Not under WSL: some cards and drivers refuse the first allocation there (pytorch#192330).
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES) and not is_wsl():
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
