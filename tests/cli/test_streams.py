"""Answers go to standard output and progress to standard error, and a stream that is closed or full ends no run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from marks import PATIENCE

from qlora_trainer.cli import console as printing

# What commands print, without the seconds that a command takes to begin.
PRINTING = """\
import sys
from qlora_trainer.cli.app import app, main
from qlora_trainer.cli.console import ProgressBars, print_table, print_warnings, write_out

@app.command()
def work(lines: int, as_json: bool = False):
    with ProgressBars() as progress:
        for line in range(lines):
            progress(f"reading {line}", 0, None)
    print_warnings(["a warning"])
    if as_json:
        write_out("{}\\\\n" * 100 * lines)
    else:
        print_table("Rows", [(f"row {line}", "x") for line in range(lines)])
    with open("ended", "w") as file:
        file.write("ended")

sys.argv[0] = "qlora"
main()
"""


def printed(tmp_path: Path, shell: str) -> "subprocess.CompletedProcess[str]":
    """Run a shell command in which `qlora work N` prints progress, a warning and N lines of an answer."""
    (tmp_path / "printing.py").write_text(PRINTING.replace("\\\\", "\\"))
    command = f'qlora() {{ "{sys.executable}" printing.py "$@"; }}; set -o pipefail; {shell}'
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, timeout=PATIENCE, check=False,
        env={**os.environ, "COLUMNS": "80"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shell", "out", "reported"),
    [
        ("qlora work 1 | cat", "row 0", "reading 0"),
        ("qlora work 1 --as-json | cat", "{}", "a warning"),
        ("qlora work 1 2>&-", "row 0", ""),
        ("qlora work 1 >&-", "", "a warning"),
        ("qlora work 1 2>/dev/full", "row 0", ""),
        ("qlora work 2000 | head -1", "Rows", "a warning"),
        ("qlora work 2000 --as-json | head -1", "{}", "a warning"),
        ("qlora work 2000 2>&1 >answer | head -1; cat ended", "reading 0", ""),
    ],
)
def test_a_stream_that_is_piped_closed_or_full_ends_no_command(
    tmp_path: Path, shell: str, out: str, reported: str
) -> None:
    done = printed(tmp_path, shell)
    assert done.returncode == 0, done.stderr
    assert out in done.stdout
    assert reported in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    if "2>&1" not in shell:
        assert "reading" not in done.stdout
        assert "row 0" not in done.stderr
    if "head" not in shell or "2>&1" in shell:
        assert (tmp_path / "ended").is_file()


@pytest.mark.parametrize("option", ["", "--as-json"])
def test_an_answer_that_cannot_be_written_is_one_error_message(tmp_path: Path, option: str) -> None:
    done = printed(tmp_path, f"qlora work 1 {option} >/dev/full")
    assert done.returncode == 2
    assert "error Standard output could not be written: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_inspect_in_a_pipe_shows_its_table(config_file: Path) -> None:
    command = f'"{sys.executable}" -m qlora_trainer inspect {config_file} | cat'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert "rows read" in done.stdout
    assert "training row 0" in done.stdout
    assert done.stderr.strip() == "… reading rows.jsonl"


@pytest.mark.slow
def test_each_command_prints_its_answer_alone_on_standard_output(
    qlora: Callable, config_file: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert qlora("train", config_file, "training.max_steps=1", "evaluation.samples=0")[0] == 0
    for command, answer in (
        (["evaluate", run], "perplexity"),
        (["generate", run, "--prompt", "the quick", "--max-new-tokens", 2], ""),
        (["plan", config_file, "--no-search", "--gpu-memory", "8GiB"], "Memory of"),
        (["quantize", tiny_llama, "--output", tmp_path / "nf4"], "4-bit model in"),
        (["merge", run, "--output", tmp_path / "merged"], "Merged model in"),
    ):
        code, out, reported = qlora(*command)
        assert code == 0, reported
        assert answer in out
        assert "…" not in out
        assert "│" not in reported
    for command in (["evaluate", run], ["plan", config_file, "--no-search"], ["inspect", config_file]):
        json.loads(qlora(*command, "--json")[1])


def test_what_is_named_to_be_copied_is_not_cut_into_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = "/a/very/long/path" * 10
    printing.print_warnings([f"{path} lists each"])
    printing.print_table(path, [("a", "b")])
    out, reported = capsys.readouterr()
    assert path in out
    assert path in reported
