"""Declare the arguments that several commands take, each with one help text, and read a config from them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

if TYPE_CHECKING:
    from qlora_trainer.config.schema import RunConfig

RunDirectory = Annotated[Path, typer.Argument(help="A run directory, as `qlora train` made it.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Config fields to set: section.key=value …")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON; docs/reference/json.md lists its keys.")
]
ConfigFile = Annotated[
    Path | None, typer.Argument(help="A YAML config, as `qlora init` writes one; options can take its place.")
]
ModelName = Annotated[
    str | None, typer.Option("--model", help="Hub name, directory of safetensors, or .gguf file (model.name).")
]
RowFiles = Annotated[
    list[str] | None,
    typer.Option("--data", help="File, folder or pattern of rows, or a hub data set (data.train); give it for each."),
]
Rank = Annotated[
    int | None,
    typer.Option(
        "--rank", help="Rank of the adapters (adapter.rank); sets adapter.alpha to twice it, unless that is set too."
    ),
]
MaxLength = Annotated[int | None, typer.Option("--max-length", help="Longest row, in tokens (data.max_length).")]


class OnceCommand(TyperCommand):
    """Read a command line as Typer does, but refuse an option given twice, of which Typer takes the last."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words, and end with a usage error where an option that takes one value occurs twice.

        Args:
            ctx: of the command.
            args: its words.

        Returns:
            The words that are left over.
        """
        if not ctx.resilient_parsing:  # which completion is
            _, _, given = self.make_parser(ctx).parse_args(args=list(args))
            for option in given:
                if isinstance(option, TyperOption) and not option.multiple and given.count(option) > 1:
                    ctx.fail(f"{option.opts[0]} is given twice, and takes one value. Keep one of them.")
        return super().parse_args(ctx, args)


_EXAMPLES = {"model.name": ("--model", "Qwen/Qwen3-8B"), "data.train": ("--data", "rows.jsonl")}


def read_settings(
    command: str, config: Path | None, overrides: Sequence[str], options: Mapping[str, Any]
) -> "RunConfig":
    """Read the config that a command line names, in a file, in options, or in both.

    What cannot be read raises FileMissingError or ConfigError.

    Args:
        command: that asks, such as "train".
        config: of the command line's first word; without a file it may be the first of the overrides.
        overrides: `section.key=value`, which count before all else.
        options: values by key, such as {"model.name": "owner/model"}; None where an option was not given. With
            adapter.rank goes an adapter.alpha of twice the rank, unless an override has either.

    Returns:
        The config.

    Raises:
        ConfigError: there is no file, and one of "model.name" and "data.train" that is in `options` is not named; rows
            are in the config's place; or a rank is given for a kind of adapter that has none.
        FileMissingError: there is no such config.
    """
    from qlora_trainer.common.command_line import command_line
    from qlora_trainer.common.errors import ConfigError, FileMissingError
    from qlora_trainer.config.adapter_schema import settings_of_others
    from qlora_trainer.config.load import load_config

    refuse_rows(command, [*([str(config)] if config else []), *overrides], options)
    if config is not None and "=" in str(config) and not config.exists():
        config, overrides = None, [str(config), *overrides]
    given = {key: value for key, value in options.items() if value is not None}
    if isinstance(files := given.get("data.train"), list):
        given["data.train"] = files[0] if len(files) == 1 else files
    set_by_key = {override.partition("=")[0] for override in overrides}
    missing = [key for key in _EXAMPLES if key in options and key not in {*given, *set_by_key}]
    if config is None and missing:
        needed = " and ".join(" ".join(_EXAMPLES[key]) for key in missing)
        other_way = "" if command == "init" else f" Name a config, which `{command_line('init')}` writes, or type"
        raise ConfigError(
            f"{needed} {'is' if len(missing) == 1 else 'are'} missing{'.' * bool(other_way)}{other_way}: "
            f"{_line_to_type(command, overrides, options)}"
        )
    try:
        settings = load_config(config, overrides, given)
    except FileMissingError as error:
        line = _line_to_type(command, overrides, options)
        raise FileMissingError(f"{error} Without a config, type: {line}") from error
    rank = given.get("adapter.rank")
    if rank and "rank" in settings_of_others(settings.adapter.kind):
        raise ConfigError(f"--rank has no effect with adapter.kind={settings.adapter.kind}; leave it out.")
    if rank and not set_by_key & {"adapter.rank", "adapter.alpha"}:
        settings = settings.replace({"adapter.alpha": 2.0 * rank})
    return settings


def _line_to_type(command: str, overrides: Sequence[str], options: Mapping[str, Any]) -> str:
    """Write the command with the options that it needs: as they were given, and with examples of the others."""
    from qlora_trainer.common.command_line import command_line

    needed = [key for key in _EXAMPLES if key in options]
    typed = [override for override in overrides if override.partition("=")[0] in needed]
    set_by_key = [override.partition("=")[0] for override in typed]
    words: list[str] = []
    for key in needed:
        if key not in set_by_key:
            option, example = _EXAMPLES[key]
            values = options[key] or example
            words += [word for each in ([values] if isinstance(values, str) else values) for word in (option, each)]
    return command_line(command, *words, *typed)


def refuse_rows(command: str, words: Sequence[str], options: Mapping[str, Any]) -> None:
    """Refuse rows that are typed where a config is meant, with the line to type in its place.

    A DataError says what is wrong with the files themselves.

    Args:
        command: that asks, such as "train".
        words: of the command line, without its options.
        options: as `read_settings` takes them.

    Raises:
        ConfigError: a word means rows.
    """
    from qlora_trainer.cli.rows_as_config import is_rows
    from qlora_trainer.common.errors import ConfigError
    from qlora_trainer.data.reading.files import check_path
    from qlora_trainer.data.reading.values import listed

    rows = [word for word in words if is_rows(word)]
    if not rows:
        return
    for word in rows:
        check_path(word)
    others = [word for word in words if word not in rows and word.partition("=")[0] != "data.train"]
    found = f"{listed(rows)} {'is' if len(rows) == 1 else 'are'} rows, not a YAML config"
    if "data.train" not in options:
        raise ConfigError(f"{found}, and {command} needs none: {_line_to_type(command, others, options)}")
    options = {**options, "data.train": [*rows, *(options["data.train"] or [])]}
    raise ConfigError(f"{found}. Rows go with --data: {_line_to_type(command, others, options)}")


def check_inputs(config: "RunConfig") -> None:
    """Read the first rows of a config's files and look for its model on the disk, without importing torch.

    Torch takes longer to import than most of their faults take to find. FileMissingError, DataError, ConfigError or
    ModelError says what cannot be used.

    Args:
        config: of the rows and the model.
    """
    from qlora_trainer.data.preparation.first_rows import check_first_rows

    check_first_rows(config.data)
    check_model(config)


def check_model(config: "RunConfig") -> None:
    """Look for a config's model on the disk, without importing torch.

    FileMissingError or ModelError says what cannot be used.

    Args:
        config: of the model.
    """
    from qlora_trainer.common.errors import missing_files_name
    from qlora_trainer.weights.place import local_model

    with missing_files_name("model.name"):
        local_model(config.model.name)
