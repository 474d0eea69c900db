"""Declare the arguments that several commands take, each with one help text."""

from pathlib import Path
from typing import Annotated

import typer

RunDirectory = Annotated[Path, typer.Argument(help="A run directory, as `qlora train` made it.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Config fields to set: section.key=value …")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON; docs/json.md lists its keys.")]
