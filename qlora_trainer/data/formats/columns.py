"""Make our columns of others: data.columns takes values from paths into a row, data.template writes text around them.

A path is a column's name, or names and list positions with dots between them, such as instances.0.input. Every path
must be there in every row, unless it ends in a question mark, as in context?: a typing error would otherwise train on
rows that lack half of their text. Before that, data.keep and data.ignore say which rows and columns are read. Left out:
which columns of ours there are, and what they mean (detect.py).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from qlora_trainer.common.errors import DataError
from qlora_trainer.config.data_schema import Scalar
from qlora_trainer.config.row_template import parts
from qlora_trainer.data.reading.json_layouts import WholeFile
from qlora_trainer.data.reading.values import json_text, kind, listed

_Record = Mapping[str, Any]


def mapped(record: _Record, columns: Mapping[str, str], template: Mapping[str, str], where: str) -> dict[str, Any]:
    """Put our columns in place of those they are made from.

    A DataError says that a path is not in the row, or a field of a template is null there.

    Args:
        record: a row's columns.
        columns: {our column: path}.
        template: {our column: text with {path} fields}; {{ and }} are braces.
        where: file and line, for errors.

    Returns:
        The record, changed.
    """
    if not columns and not template:
        return dict(record)
    made = {ours: look_up(record, path, f"data.columns {ours}", where) for ours, path in columns.items()}
    made |= {ours: _filled(record, text, f"data.template {ours}", where) for ours, text in template.items()}
    used = source_columns(record, paths_of(columns, template))
    return {name: value for name, value in record.items() if name not in used} | made


def is_kept(record: _Record, keep: Mapping[str, Scalar | list[Scalar]], where: str) -> bool:
    """Return True if every column has one of the values wanted; a DataError says that a path is not in the row.

    Args:
        record: a row's columns.
        keep: {path: value or values}.
        where: file and line, for errors.

    Returns:
        True if the row is to be read.
    """
    return all(
        any(
            _equals(look_up(record, path, f"data.keep {path}", where), one)
            for one in (wanted if isinstance(wanted, list) else [wanted])
        )
        for path, wanted in keep.items()
    )


def _equals(value: Any, wanted: Scalar) -> bool:
    """Compare a value with one of the config; a table's text with how that is written: True, 1."""
    if isinstance(value, str):
        return value.strip().casefold() == str(wanted).strip().casefold()
    return bool(value == wanted and isinstance(value, bool) == isinstance(wanted, bool))


def without_ignored(record: _Record, ignored: Collection[str], paths: Iterable[str]) -> _Record:
    """Leave out the columns to ignore, unless ours are made from them; a file's only row stays one.

    Args:
        record: a row's columns.
        ignored: names of columns.
        paths: of `paths_of`.

    Returns:
        The other columns.
    """
    sources = source_columns(record, paths)
    kept = {name: value for name, value in record.items() if name in sources or name not in ignored}
    return WholeFile(kept) if isinstance(record, WholeFile) else kept


def paths_of(columns: Mapping[str, str], template: Mapping[str, str]) -> list[str]:
    """List the paths that our columns are made from.

    Args:
        columns: {our column: path}.
        template: {our column: text with {path} fields}.

    Returns:
        The paths, those that may be missing with their question mark.

    Raises:
        ConfigError: a text of the template cannot be cut.
    """
    return [*columns.values(), *(path for text in template.values() for _, path in parts(text) if path)]


def source_columns(record: _Record, paths: Iterable[str]) -> set[str]:
    """Find the columns of a record that paths begin in.

    Args:
        record: a row's columns.
        paths: of `paths_of`, say.

    Returns:
        Names of columns.
    """
    return {_names(record, path)[0] for path in paths}


def lists_cut(record: _Record, paths: Iterable[str]) -> list[str]:
    """Find the lists of objects of which items are taken, and others are not.

    Args:
        record: a row's columns.
        paths: of `paths_of`.

    Returns:
        Their paths.
    """
    taken: dict[str, tuple[int, set[int]]] = {}  # by the path of a list: its length, and the items
    for path in paths:
        place, *names = _names(record, path)
        value = record.get(place)
        for name in names:
            there, item = _step(value, name)
            if there and isinstance(value, list) and isinstance(item, Mapping):
                taken.setdefault(place, (len(value), set()))[1].add(int(name) % len(value))
            place, value = f"{place}.{name}", item
    return [place for place, (length, items) in taken.items() if len(items) < length]


def look_up(record: _Record, path: str, what: str, where: str) -> Any:
    """Take the value at a path.

    Args:
        record: a row's columns.
        path: names and list positions with dots between them; may end in a question mark.
        what: who wants the value, for errors.
        where: file and line, for errors.

    Returns:
        The value; None where something on the way is null, or the path ends in ? and is not there.

    Raises:
        DataError: the path is not there; the message says how far it leads and what is there.
    """
    names = _names(record, path)
    value: Any = record
    for depth, name in enumerate(names):
        there, value = _step(value, name)
        if not there:
            if path.endswith("?"):
                return None
            raise DataError(_message(record, names, depth, what, where))
        if value is None:
            return None
    return value


def _names(record: _Record, path: str) -> list[str]:
    """Cut a path into a column's name and what follows it; a column's own name may hold dots, or end in ?."""
    required = path.removesuffix("?")
    return next(([whole] for whole in (path, required) if whole in record), required.split("."))


def _step(value: Any, name: str) -> tuple[bool, Any]:
    if isinstance(value, Mapping):
        return name in value, value.get(name)
    if isinstance(value, Sequence) and not isinstance(value, str) and name.removeprefix("-").isdecimal():
        index = int(name)
        return (True, value[index]) if -len(value) <= index < len(value) else (False, None)
    return False, None


def _message(record: _Record, names: Sequence[str], depth: int, what: str, where: str) -> str:
    value: Any = record
    for name in names[:depth]:
        _, value = _step(value, name)
    if isinstance(value, Mapping):
        there = listed(value)
    else:
        there = f"a list of {len(value)}" if isinstance(value, list) else kind(value)
    place = ".".join(names[:depth]) or "the row"
    path = ".".join(names)
    return f"{where}: {what} takes {path}, but {place} has {there}. If some rows have none, write {path}? instead."


def _filled(record: _Record, template: str, what: str, where: str) -> str:
    written = []
    for text, path in parts(template):
        written.append(text)
        if path is None:
            continue
        value = look_up(record, path, what, where)
        if value is None and not path.endswith("?"):
            raise DataError(f"{where}: {what} takes {path}, which is null. If it may be empty, write {path}? instead.")
        written.append(_written(value, f"{what}: {path}", where))
    return "".join(written)


def _written(value: Any, what: str, where: str) -> str:
    """Write text as it is; numbers, lists and objects as JSON; dates and decimals of a table as they print."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bytes):
        raise DataError(f"{where}: {what} holds bytes, not text.")
    return json_text(value, what, where) if isinstance(value, int | float | list | dict) else str(value)
