"""Promises of commands in messages: each begins as the program was called, and is quoted for a shell."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from qlora_trainer.cli.app import app
from qlora_trainer.cli.stopping import Training
from qlora_trainer.common.atomic import refuse_existing
from qlora_trainer.common.command_line import command_line
from qlora_trainer.common.errors import FileMissingError, OutputExistsError
from qlora_trainer.config.load import load_config

PACKAGE = Path(__file__).parents[2] / "qlora_trainer"
MODULE = "/site-packages/qlora_trainer/__main__.py"


@pytest.mark.parametrize(
    ("called", "typed", "program"),
    [
        (".venv/bin/qlora", "python .venv/bin/qlora", ".venv/bin/qlora"),
        ("my env/bin/qlora", "python my env/bin/qlora", "'my env/bin/qlora'"),
        ("{folder}/qlora", "python {folder}/qlora", "qlora"),
        (MODULE, "python3.12 -m qlora_trainer", "python3.12 -m qlora_trainer"),
        (MODULE, ".venv/bin/python -X dev -m qlora_trainer", ".venv/bin/python -X dev -m qlora_trainer"),
        (MODULE, f"python {MODULE}", "qlora"),
        ("train.py", "python train.py", "qlora"),
    ],
)
def test_a_command_to_paste_begins_as_the_program_was_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, called: str, typed: str, program: str
) -> None:
    """A program that the shell finds in its path is there under its full name."""
    (tmp_path / "qlora").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", [called.format(folder=tmp_path), "demo"])
    monkeypatch.setattr("sys.orig_argv", [*typed.format(folder=tmp_path).split(" "), "demo"])
    assert command_line("demo") == f"{program} demo"


def test_words_are_quoted_and_a_path_is_not_read_as_an_option() -> None:
    words = ["merge", Path("-run [1]"), "--output", "it's"]
    assert shlex.split(command_line(*words))[1:] == ["merge", "./-run [1]", "--output", "it's"]


@pytest.mark.parametrize("program", ["qlora", "env/bin/qlora"])
def test_messages_have_the_program_as_it_was_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr("sys.argv", [program, "train"])
    assert Training(tmp_path, 3, 10, 0).second_signal().endswith(f": {program} resume {tmp_path}")
    with pytest.raises(OutputExistsError, match=f"To continue the run in it: {program} resume {tmp_path}$"):
        refuse_existing(tmp_path)
    with pytest.raises(FileMissingError, match=f"`{program} init` writes one"):
        load_config(tmp_path / "none.yaml")


def test_no_message_names_a_command_in_another_way() -> None:
    """Help texts and docs speak of `qlora` by its name; a message is pasted."""
    names = "|".join(command.name or "" for command in app.registered_commands)
    found = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        read_as_help = {
            id(constant)
            for node in ast.walk(tree)
            for constant in ast.walk(node)
            if (isinstance(node, ast.keyword) and node.arg == "help")
            or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        }
        found += [
            f"{path.relative_to(PACKAGE)}: {node.value}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in read_as_help
            if re.search(rf"\bqlora ({names})\b", node.value)
        ]
    assert [text for text in found if "Written by `qlora init`" not in text] == []
