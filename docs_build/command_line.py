"""Make docs/reference/command-line.md: every command with its arguments, options and help, by typer's own writer."""

import re
from html import unescape

from typer.cli import app as typer_app
from typer.testing import CliRunner

INTRODUCTION = """\
# Command line

<!-- Made from the code by `make docs`: change the help texts in qlora_trainer/cli. -->

Exit code 0 when done; 2 for an error that you can fix, with one message; 1 for a bug of ours, and of `qlora doctor`
where it finds a problem; 130 or 143 after Ctrl-C or SIGTERM, but 0 if training was stopped by it and saved. Results go
to standard output, progress and warnings to standard error. With `--json` a command prints one JSON value:
[JSON output](json.md) lists its keys.

"""


def command_line_page() -> str:
    """Make the page.

    Returns:
        Markdown.
    """
    asked = ["qlora_trainer.cli.app", "utils", "docs", "--name", "qlora"]
    result = CliRunner().invoke(typer_app, asked, env={"COLUMNS": "120"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    first = result.stdout.index("## `qlora")
    options, _, _ = result.stdout[result.stdout.index("**Options**") : first].partition("**Commands**")
    commands = f"## qlora\n\n{options}{result.stdout[first:]}"
    commands = re.sub(r"^(#+) `(.*)`$", r"\1 \2", commands, flags=re.MULTILINE)  # anchors as GitHub and the site make
    return INTRODUCTION + unescape(commands).replace("```console\n$ ", "```text\n").rstrip() + "\n"
