"""Find the rows in a JSON value: an object, a list of turns, a list of rows, a table by columns, rows inside an object.

What is not certain is not read: the error says how to name the rows. Left out: reading the text (json_rows.py), and
what columns mean (formats).
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from qlora_trainer.common.errors import ConfigError, DataError
from qlora_trainer.config.override import override
from qlora_trainer.data.reading.json_text import EACH
from qlora_trainer.data.reading.values import kind, listed
from qlora_trainer.data.turn_names import SPEAKER_KEYS, is_turn

Record = dict[str, Any]
Placed = tuple[str, Record | DataError]  # where in the file, such as "line 3", and the row or what is wrong with it


class WholeFile(Record):
    """Represent a row that is all that its file holds: perhaps the rows that are meant are inside it."""


def rows_of(value: Any, place: str, title: str) -> Iterator[Placed]:
    """Find the rows of a value that should be a row: itself, a conversation, or a list of rows.

    Args:
        value: of JSON.
        place: in the file.
        title: of the file, for errors.

    Yields:
        Each row with its place, or the error of one that is none.
    """
    if isinstance(value, dict):
        yield place, value
    elif _are_turns(value):
        yield place, {"messages": value}
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for number, item in enumerate(value, start=1):
            yield from rows_of(item, f"{place}, item {number}", title)
    else:
        yield (
            place,
            DataError(
                f"{title}, {place}: a row should be a JSON object with named columns, or a list of turns, and is "
                f"{kind(value)}."
            ),
        )


def table_by_columns(value: Record) -> list[Record] | None:
    """Read an object that holds a table by its columns: lists of one length, objects of one index, or split.

    These are what Dataset.to_dict(), DataFrame.to_dict("list"), DataFrame.to_json() and its orient="split" write.

    Args:
        value: all that a file holds.

    Returns:
        The rows; None where the object is no such table.
    """
    columns: Mapping[str, Sequence[Any]] | None = None
    if value.keys() == {"columns", "index", "data"} and _are_lists([*value.values(), *_list(value["data"])]):
        names, rows = value["columns"], value["data"]
        is_table = all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
        return [dict(zip(names, row, strict=True)) for row in rows] if is_table and _are_as_long(rows, names) else None
    if _are_lists(value.values()):
        # Lists of objects are rows inside the object, or a conversation.
        holds_values = any(not isinstance(item, dict) for column in value.values() for item in column[:1])
        is_table = holds_values and not any(_is_conversation(column) for column in value.values())
        columns = value if is_table else None
    elif _share_an_index(value):
        columns = {name: list(column.values()) for name, column in value.items()}
    if not columns or len({len(column) for column in columns.values()}) != 1:
        return None
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _are_lists(values: Any) -> bool:
    return all(isinstance(value, list) for value in values)


def _are_as_long(rows: Sequence[Sequence[Any]], names: Sequence[str]) -> bool:
    return all(len(row) == len(names) for row in rows)


def _is_conversation(column: Sequence[Any]) -> bool:
    return any(isinstance(item, dict) and not item.keys().isdisjoint(SPEAKER_KEYS) for item in column)


def _share_an_index(value: Record) -> bool:
    """Find whether each column has its values by the numbers of the rows, as DataFrame.to_json() writes."""
    first = next(iter(value.values()), None)
    return (
        isinstance(first, dict)
        and all(isinstance(column, dict) and column.keys() == first.keys() for column in value.values())
        and all(key.isdecimal() for key in first)
        and not all(key.isdecimal() for key in value)
    )


def rows_inside(record: Mapping[str, Any]) -> str:
    """Say how to read the rows inside a row that is all that its file holds.

    Args:
        record: a row.

    Returns:
        A sentence that begins with a blank, with the setting to type; "" for another row, or one without rows inside.
    """
    if not isinstance(record, WholeFile):
        return ""
    paths = sorted(_paths(record, ()), key=lambda found: (len(found[0]), -found[1]))
    if not paths:
        return ""
    settings = [override("data.rows", ".".join(path)) for path, _ in paths[:4]]
    others = f" (or {listed(settings[1:])})" if settings[1:] else ""
    count = paths[0][1]
    rows = f"{count:,} rows seem" if count > 1 else "a row seems"
    return f" The file is one object, and {rows} to be inside it. To read what is inside: {settings[0]}{others}"


def check_paths(record: Mapping[str, Any], paths: Iterable[str], where: str) -> None:
    """Refuse to make one row of the first of many rows that are inside the only object of a file.

    Args:
        record: a row.
        paths: from which its columns are taken.
        where: file and line, for errors.

    Raises:
        ConfigError: a path leads to one item of a list of rows.
    """
    if not isinstance(record, WholeFile):
        return
    for inside, count in _paths(record, ()):
        prefix = ".".join(inside) + "."
        item = re.compile(re.escape(prefix) + r"-?\d+(\.|\?|$)")
        if count > 1 and any(item.match(path) for path in paths):
            raise ConfigError(
                f"{where}: the file is one object with {count:,} rows inside it, and the columns are taken from one of "
                f"them. Name where the rows are, and the columns of a row: {override('data.rows', prefix[:-1])}"
            )


def _paths(value: Mapping[str, Any], before: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    """List the paths of lists of objects, and of objects whose values are objects with the same keys."""
    items = list(value.values())
    if len(items) > 1 and all(isinstance(item, dict) and item and item.keys() == items[0].keys() for item in items):
        yield (*before, EACH), len(items)
        return
    for key, item in value.items():
        if "." in key or key == EACH:
            continue
        if isinstance(item, list) and item and all(_is_row(row) for row in item) and not _are_turns(item):
            yield (*before, key), len(item)
        elif isinstance(item, dict) and len(before) < 2:
            yield from _paths(item, (*before, key))


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) or _are_turns(value)


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(is_turn(item) for item in value)
