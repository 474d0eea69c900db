"""Write a command of this program as it can be pasted into the shell that called it, for messages."""

import shlex
import shutil
import sys
from pathlib import Path


def command_line(*words: object) -> str:
    """Write a command of this program as it can be pasted into a shell.

    Args:
        *words: of the command, after the program's name; a path that begins with a dash gets ./ before it, as it would
            be read as an option.

    Returns:
        The program as it was called and the words, quoted where they need it.
    """
    typed = [f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word) for word in words]
    return shlex.join([*_program_called(), *typed])


def please_report() -> str:
    """Write what to do about a fault of the program.

    Returns:
        A sentence.
    """
    return f"Please report it with the output of `{command_line('doctor')}`."


def _program_called() -> list[str]:
    """Return the words by which the shell that called the program finds it again; ["qlora"] in another program."""
    called, typed = sys.argv[0], sys.orig_argv
    if Path(called).name == "qlora" and called != shutil.which("qlora"):
        return [called]
    if Path(called).name == "__main__.py" and Path(called).parent.name == "qlora_trainer":
        return typed[: typed.index("qlora_trainer") + 1] if "qlora_trainer" in typed else ["qlora"]
    return ["qlora"]
