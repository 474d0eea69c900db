"""Before any work the command line says its version and helps at once, and it finds data faults first."""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HEAVY = {"torch", "transformers", "bitsandbytes", "numpy", "pyarrow", "pydantic", "yaml", "psutil"}


def run_alone(folder: Path, modules: set[str], *words: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in a process of its own; the last line that it prints is the exit code and which modules it has."""
    code = f"""import sys
from qlora_trainer.cli import app
sys.argv = ["qlora", *{words!r}]
try:
    app.main()
except SystemExit as error:
    print(error.code, *{modules!r} & sys.modules.keys())"""
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)


def test_help_needs_no_heavy_import(tmp_path: Path) -> None:
    done = run_alone(tmp_path, HEAVY, "--help")
    assert "Usage: qlora" in done.stdout
    assert done.stdout.splitlines()[-1] == "0"


def test_the_version_is_that_of_the_installed_package(qlora: Callable) -> None:
    code, out, _ = qlora("--version")
    assert (code, out) == (0, f"qlora-trainer {importlib.metadata.version('qlora-trainer')}\n")


@pytest.mark.parametrize(
    ("shell", "typed", "expected"),
    [
        ("bash", {"COMP_WORDS": "qlora pl", "COMP_CWORD": "1"}, "plan"),
        ("bash", {"COMP_WORDS": "qlora train --", "COMP_CWORD": "2"}, "--help"),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "qlora pl"}, '"plan"'),
        ("fish", {"_TYPER_COMPLETE_FISH_ACTION": "get-args", "_TYPER_COMPLETE_ARGS": "qlora pl"}, "plan"),
    ],
)
def test_a_shell_completes_commands_and_options(shell: str, typed: dict[str, str], expected: str) -> None:
    """As the script asks that `qlora --show-completion` prints."""
    code = "import sys; from qlora_trainer.cli import app; sys.argv = ['qlora']; app.main()"
    asked = {**os.environ, "_QLORA_COMPLETE": f"complete_{shell}", **typed}
    done = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True, check=False)
    assert expected in done.stdout, done.stderr
    assert "quantize" not in done.stdout


FAULTS = {
    "rows.jsonl": ('{"messages": [{"role": "nobody", "content": "x"}]}\n', "rows.jsonl, line 1"),
    "cut.jsonl": ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"', "cut.jsonl, line 2"),
    "other.csv": ("x,y\n1,2\n", "other.csv"),
    "gone.jsonl": (None, "data.train: there is no file"),
}


@pytest.mark.parametrize(
    ("command", "base", "name"),
    [
        ("train", "someone/some-model", "rows.jsonl"),
        ("train", "directory", "cut.jsonl"),
        ("train", "file.gguf", "other.csv"),
        ("train", "file.gguf", "gone.jsonl"),
        ("init", "someone/some-model", "rows.jsonl"),
        ("inspect", "file.gguf", "rows.jsonl"),
        ("inspect", "someone/some-model", "gone.jsonl"),
    ],
)
def test_a_fault_of_the_data_is_reported_before_torch_is_imported(
    tmp_path: Path, command: str, base: str, name: str
) -> None:
    """And before the base is looked for."""
    content, expected = FAULTS[name]
    if content is not None:
        (tmp_path / name).write_text(content)
    (tmp_path / "directory").mkdir()
    (tmp_path / "file.gguf").write_bytes(b"GGUF")
    (tmp_path / "config.yaml").write_text(f"model: {{name: {base}}}\ndata: {{train: {name}}}\n")
    words = ["--model", base, "--data", name] if command == "init" else ["config.yaml"]
    assert expected in refusal_before_torch(tmp_path, command, *words)


def refusal_before_torch(folder: Path, *words: str) -> str:
    """Run a command in a folder where it is refused, and return what it prints; torch must not be imported."""
    done = run_alone(folder, {"torch", "transformers", "bitsandbytes"}, *words)
    assert done.stdout == "2\n"
    return " ".join(done.stderr.split())


GOOD_ROWS = ("--data", "good.jsonl")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("train", "--model", "gone", *GOOD_ROWS), "model.name: there is no model at gone."),
        (("train", "--model", "m/m", *GOOD_ROWS, "--output", "taken"), "taken exists and is not empty"),
        (("train", "--model", "m/m", *GOOD_ROWS, "--output", "a run"), "To continue the run in it: qlora resume '/"),
        (("init", "--model", "gone", *GOOD_ROWS), "model.name: there is no model at gone."),
        (("inspect", "--model", "gone", *GOOD_ROWS), "model.name: there is no model at gone."),
        (("inspect", "--model", "gone.gguf", *GOOD_ROWS), "model.name: there is no model at gone.gguf."),
        (("plan", "--model", "gone"), "model.name: there is no model at gone."),
        (("quantize", "gone", "--output", "new"), "There is no model at gone."),
        (("quantize", "m/m", "--output", "taken"), "taken exists and is not empty"),
        (("inspect",), "or type: qlora inspect --model Qwen/Qwen3-8B --data rows.jsonl"),
        (("init", "taken/file", "--model", "m/m", *GOOD_ROWS), "taken/file exists."),
        (("init",), "are missing: qlora init"),
    ],
)
def test_a_wrong_path_is_reported_before_torch_is_imported(
    tmp_path: Path, words: tuple[str, ...], expected: str
) -> None:
    (tmp_path / "good.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "taken").mkdir()
    (tmp_path / "a run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "taken" / "file").touch()
    assert expected in refusal_before_torch(tmp_path, *words)


@pytest.mark.slow
def test_rows_are_prepared_and_shown_without_bitsandbytes_and_without_models() -> None:
    """These take longer to import than the rows of a small file to prepare."""
    code = """import sys
import qlora_trainer.cli.show_rows, qlora_trainer.model.source, qlora_trainer.model.tokenizer
import qlora_trainer.planning.attention_trial, qlora_trainer.runs.directory
print(*{"bitsandbytes", "transformers.modeling_utils", "qlora_trainer.weights.gguf.metadata"} & sys.modules.keys())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
