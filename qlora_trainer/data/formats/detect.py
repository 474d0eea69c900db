"""Recognize which format a row has, by its columns or as the config names it, and say what is wrong where none fits.

A source has one format. Whoever reads it asks for the first row's and holds the others to it, so that a file in which
formats are mixed is an error at the first row that differs. Left out: reading the row (parse.py).
"""

import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import PurePath
from typing import Any

from qlora_trainer.common.errors import ConfigError, DataError
from qlora_trainer.config.data_schema import DataFormat
from qlora_trainer.config.override import override
from qlora_trainer.data.formats.advice import near_miss, preferred_line, settings_line, slots_of, text_path
from qlora_trainer.data.formats.meanings import has_meaning, is_empty
from qlora_trainer.data.reading.data_file import HEADER_KINDS, kind_of
from qlora_trainer.data.reading.json_layouts import check_paths, rows_inside
from qlora_trainer.data.reading.values import listed, shortened

_NUMBER = re.compile(r"-?[0-9]+(_[0-9]+)?")  # and what a repeated one is called
_TOOLS = ("tools", "functions")
_MOST_NAMED = 20

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
# The better answer's column, and the worse one's.
_PREFERENCES = (
    ("chosen", "rejected"),
    ("response_j", "response_k"),
    ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("answer_chosen", "answer_rejected"),
    ("preferred", "dispreferred"),
    ("preferred_output", "non_preferred_output"),
)


class UnknownFormatError(DataError):
    """Report a row whose columns are of no known format, so that it may be the settings that are wrong, not the row."""


KNOWN = (
    "Known formats: "
    + "; ".join(
        f"{name} ({', '.join(required + tuple(f'{column}?' for column in optional if column not in _TOOLS))})"
        for name, (required, optional) in COLUMNS.items()
    )
    + ". data.columns renames columns, such as 'data.columns={prompt: query}', and data.template writes text "
    "around them."
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
    made = _made(tuple(columns), tuple(template or ()))
    check_paths(record, columns.values(), where)
    if format in ("chat", "sharegpt"):
        # Two names of one thing: turns are read in either naming, under either column.
        return detect_format({*record, *made} & {"messages", "conversations"}) or format
    if format != "auto":
        return format
    found = [name for name, value in record.items() if value is not None]
    detected = detect_format(made) or detect_format({*found, *made})
    if not made:
        _refuse_preferences(record, detected, where)
    if detected is None:
        hint = _hint(record, made, where) or f" {KNOWN}"
        raise UnknownFormatError(f"{where}: the columns {shortened(record, _MOST_NAMED)} are of no known format.{hint}")
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
    nulls = [column for column in missing if column in record]
    absent = [column for column in missing if column not in record]
    problems = [f"{listed(nulls)} is null"] * bool(nulls) + [f"{listed(absent)} is missing"] * bool(absent)
    hint = f"{format} rows need {listed(required)}; the row has {listed(record)}." if absent else ""
    if other and other != format:
        hint = (
            f"By its columns it is of the format {other}, but all rows of one source have the format of the first one, "
            "or the one that is named. Put each format into a file of its own, and list them in data.train."
        )
    return DataError(f"{where}: {' and '.join(problems)}. {hint}".rstrip())


@lru_cache(maxsize=64)
def _made(columns: tuple[str, ...], template: tuple[str, ...]) -> frozenset[str]:
    """Check the columns that the config makes, and return them."""
    known = {column for required, optional in COLUMNS.values() for column in required + optional}
    for key, names in (("data.columns", columns), ("data.template", template)):
        if unknown := [name for name in names if name not in known]:
            raise ConfigError(f"{key} makes {listed(unknown)}, which no format has; known are {listed(sorted(known))}.")
    if both := [name for name in template if name in columns]:
        raise ConfigError(f"data.columns and data.template both make {listed(both)}. Keep one of them.")
    return frozenset(columns) | set(template)


def _refuse_preferences(record: Mapping[str, Any], detected: DataFormat | None, where: str) -> None:
    """Refuse a row with a better and a worse answer, or with a better one alone, unless a format reads another."""
    present = {name for name, value in record.items() if not is_empty(value)}
    pairs = [(chosen, rejected) for chosen, rejected in _PREFERENCES if {chosen, rejected} <= present]
    alone = [(chosen, "") for chosen, _ in _PREFERENCES if chosen in present and detected is None]
    for chosen, rejected in [*pairs, *alone]:
        leftover = [name for name in record if name != chosen and name in present and has_meaning(name)]
        both = f"columns {chosen} and {rejected} hold" if rejected else f"the column {chosen} holds one side of"
        raise ConfigError(
            f"{where}: {both} preferences, a better and a worse answer, and what is trained on here is one answer. To "
            f"train on the {chosen} ones: {preferred_line(record, chosen, leftover)}."
        )


def _hint(record: Mapping[str, Any], made: Collection[str], where: str) -> str:
    """Say what a row of no known format most likely is, and the way out."""
    if inside := rows_inside(record):
        turns = slots_of(record).get("turns")
        return f"{inside}. If {turns} is one conversation: {settings_line({'messages': turns})}" if turns else inside
    turns = record.get("turns")
    if isinstance(turns, list) and turns and all(isinstance(item, str) for item in turns):
        return (
            " turns holds what one side says, and without answers there is nothing to train on. Give each row a column "
            "messages, with the turns of both sides."
        )
    is_table = kind_of(PurePath(where.rpartition(", ")[0])) in HEADER_KINDS
    if is_table and any(len(name) > 40 or _NUMBER.fullmatch(name.strip()) for name in record):
        names = override("data.header", [f"column{number + 1}" for number in range(len(record))])
        return f" Is the first line of the file a row, not the columns' names? Then name the columns, such as: {names}."
    lines = "" if made else near_miss(record, [name for name in record if has_meaning(name)])
    return lines or _incomplete(record)


def _incomplete(record: Mapping[str, Any]) -> str:
    """Say which column of a format is there, which is not, and where text is that it could be made from."""
    for required, _ in COLUMNS.values():
        there = [column for column in required if record.get(column) is not None]
        lacking = [column for column in required if column not in there]
        if not there or not lacking:
            continue
        if nulls := [column for column in lacking if column in record]:
            return f" {listed(there)} is there, but {listed(nulls)} is null."
        others = {name: text_path(name, value) for name, value in record.items() if name not in there}
        ways = [override("data.columns", {lacking[0]: path}) for path in others.values() if path]
        found = (
            f"If it is in another column, such as: {'; or '.join(ways[:3])}." if ways else "No other column has text."
        )
        return f" {listed(there)} is there, but nothing called {listed(lacking)}. {found}"
    return ""
