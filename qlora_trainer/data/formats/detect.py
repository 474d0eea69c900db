"""Recognize which format a row has, by its columns or as the config names it, and say what is wrong where none fits.

A source has one format. Whoever reads it asks for the first row's and holds the others to it, so that a file in which
formats are mixed is an error at the first row that differs. Left out: reading the row (parse.py).
"""

from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from qlora_trainer.common.errors import ConfigError, DataError
from qlora_trainer.config.data_schema import DataFormat
from qlora_trainer.data.formats.columns import parts
from qlora_trainer.data.reading.json_layouts import check_paths, rows_inside
from qlora_trainer.data.reading.values import listed

_TOOLS = ("tools", "functions")

# The columns each format must have, in the order they are tried, and those it may have.
COLUMNS: dict[DataFormat, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "chat": (("messages",), ("system", *_TOOLS)),
    "sharegpt": (("conversations",), ("system", *_TOOLS)),
    "prompt_completion": (("prompt", "completion"), ("system", *_TOOLS)),
    "alpaca": (("instruction", "output"), ("input", "system", "history", *_TOOLS)),
    "dolly": (("instruction", "response"), ("context", "system", *_TOOLS)),
    "question_answer": (("question", "answer"), ("system", *_TOOLS)),
    "text": (("text",), ()),
}
_PREFERENCES = (("chosen", "rejected"), ("response_j", "response_k"))
_PROMPTS = ("prompt", "question", "instruction", "messages", "conversations")

KNOWN = (
    "Known formats: "
    + "; ".join(
        f"{name} ({', '.join(required + tuple(f'{column}?' for column in optional if column not in _TOOLS))})"
        for name, (required, optional) in COLUMNS.items()
    )
    + ". data.columns renames columns, such as {prompt: query}, and data.template writes text around them."
)


def detect_format(columns: Collection[str]) -> DataFormat | None:
    """Find the format that rows with these columns have.

    Args:
        columns: names.

    Returns:
        The first format whose columns are all there, or None.
    """
    for name, (required, _) in COLUMNS.items():
        if all(column in columns for column in required):
            return name
    return None


def known_columns(format: DataFormat) -> frozenset[str]:
    """List the columns that rows of a format are read from; what else a row holds is not used.

    Args:
        format: not "auto".

    Returns:
        Names of columns.
    """
    required, optional = COLUMNS[format]
    return frozenset(required + optional)


def resolve_format(
    record: Mapping[str, Any],
    format: DataFormat,
    columns: Mapping[str, str],
    where: str,
    template: Mapping[str, str] | None = None,
) -> DataFormat:
    """Find the format of a record: the one named, or the one that its columns show, those made by the config first.

    A ConfigError says that the config makes columns that no format has, or one of them twice.

    Args:
        record: a row's columns.
        format: a format's name, or "auto".
        columns: {our column: path}.
        where: file and line, for errors.
        template: {our column: text with {path} fields}.

    Returns:
        A format other than "auto".

    Raises:
        DataError: no format fits, or the record is of a kind that supervised training cannot use.
    """
    made = _made(tuple(columns), tuple((template or {}).items()))
    check_paths(record, columns.values(), where)
    if format in ("chat", "sharegpt"):
        # Two names of one thing: turns are read in either naming, under either column.
        return detect_format({*record, *made} & {"messages", "conversations"}) or format
    if format != "auto":
        return format
    found = [name for name, value in record.items() if value is not None]
    if not made:
        _refuse_preferences(record, found, where)
    detected = detect_format(made) or detect_format({*found, *made})
    if detected is None:
        raise DataError(f"{where}: the columns {listed(record)} are of no known format.{_hint(record)} {KNOWN}")
    return detected


def missing_columns(record: Mapping[str, Any], format: DataFormat, where: str) -> DataError | None:
    """Make the error for a row that lacks what its format needs.

    Args:
        record: our columns.
        format: of the source.
        where: file and line.

    Returns:
        The error; None where nothing is missing.
    """
    required, _ = COLUMNS[format]
    missing = [column for column in required if record.get(column) is None]
    if not missing:
        return None
    other = detect_format([name for name, value in record.items() if value is not None])
    hint = (
        f"By its columns it is of the format {other}, but all rows of one source have the format of the first one, "
        "or the one that is named. Put each format into a file of its own, and list them in data.train."
        if other and other != format
        else KNOWN
    )
    return DataError(
        f"{where}: {listed(missing)} is missing or null, which {format} rows need; the row has {listed(record)}. {hint}"
    )


@lru_cache(maxsize=64)
def _made(columns: tuple[str, ...], template: tuple[tuple[str, str], ...]) -> frozenset[str]:
    """Check the columns that the config makes, and return them."""
    known = {column for required, optional in COLUMNS.values() for column in required + optional}
    for key, names in (("data.columns", columns), ("data.template", tuple(name for name, _ in template))):
        if unknown := [name for name in names if name not in known]:
            raise ConfigError(f"{key} makes {listed(unknown)}, which no format has; known are {listed(sorted(known))}.")
    if both := [name for name, _ in template if name in columns]:
        raise ConfigError(f"data.columns and data.template both make {listed(both)}. Keep one of them.")
    for name, text in template:
        try:
            parts(text)
        except ValueError as error:
            raise ConfigError(f"data.template {name}: {error}.") from error
    return frozenset(columns) | {name for name, _ in template}


def _refuse_preferences(record: Mapping[str, Any], found: Collection[str], where: str) -> None:
    for chosen, rejected in _PREFERENCES:
        if {chosen, rejected} <= set(found):
            prompt = next((name for name in _PROMPTS if name in found), "the prompt's column")
            answers = record[chosen]
            whole = isinstance(answers, list) and len(answers) > 1  # a conversation with its prompt
            ours = ("question", "answer") if prompt in ("question", "instruction") else ("prompt", "completion")
            pair = f"{{{ours[0]}: {prompt}, {ours[1]}: {chosen}}}"
            columns = f"{{messages: {chosen}}}" if whole else pair
            raise DataError(
                f"{where}: columns {chosen} and {rejected} hold preferences, and this trains on answers. To train on "
                f"the {chosen} ones: data.columns {columns}."
            )
    if "messages" in found and isinstance(record.get("label"), bool):
        raise DataError(
            f"{where}: messages with a label of true or false look like preferences, some rows of which are answers "
            "to avoid. Keep the good rows only; to train on every row all the same, set data.format to chat."
        )


def _hint(record: Mapping[str, Any]) -> str:
    """Say what a row of no known format most likely is, and the way out."""
    if inside := rows_inside(record):
        return inside
    for name, value in record.items():
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value) and name == "turns":
            return f" {name} holds what one side says: without answers there is nothing to train on. Add messages."
    for required, optional in COLUMNS.values():
        there = [column for column in required if record.get(column) is not None]
        if there and len(required) > 1:
            lacking = [column for column in required if column not in there]
            if nulls := [column for column in lacking if column in record]:
                return f" {listed(there)} is there, but {listed(nulls)} is null."
            nested = {column: path for column in (*lacking, *optional) if (path := _nested(record, column))}
            ways = ", ".join(f"{column}: {path}" for column, path in ({lacking[0]: "PATH"} | nested).items())
            paths = listed(path for name, value in record.items() if name not in there for path in _paths(name, value))
            return (
                f" {listed(there)} is there, but nothing called {listed(lacking)}. Where is it? "
                f"data.columns {{{ways}}}; there are {paths}."
            )
    if any(len(name) > 40 or name.strip().lstrip("-").isdecimal() for name in record):
        return " Is the first line of the file a row, not the columns' names? Then name them: data.header [id, text]."
    return ""


def _paths(name: str, value: Any) -> list[str]:
    """List where text may be in a column: the path of each field of an object, or of the first item of a list."""
    if isinstance(value, list) and value:
        return _paths(f"{name}.0", value[0])
    return [f"{name}.{key}" for key in value] if isinstance(value, Mapping) else [name]


def _nested(record: Mapping[str, Any], column: str) -> str | None:
    paths = [path for name, value in record.items() for path in _paths(name, value)]
    return next((path for path in paths if path.endswith(f".{column}")), None)
