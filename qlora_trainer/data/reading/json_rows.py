"""Read rows of JSONL and JSON files: one row a line, an array of rows, objects one after another, rows in an object.

A .json file may be any of these, and is detected by how it begins. All are read a piece at a time, so the memory is
that of a row. Left out: decoding (json_text.py), and what of a value is a row (json_layouts.py).
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Any

from qlora_trainer.common.errors import DataError
from qlora_trainer.common.units import counted
from qlora_trainer.data.reading import streams
from qlora_trainer.data.reading.data_file import DataFile
from qlora_trainer.data.reading.json_layouts import Placed, WholeFile, rows_of, table_by_columns
from qlora_trainer.data.reading.json_text import EACH, ITEMS, RowDecoder, Window
from qlora_trainer.data.turn_names import is_turn

_MOST_TURNS = 10_000  # an array of more is no conversation


def read_jsonl(file: DataFile) -> Iterator[Placed]:
    """Read one row a line; blank lines are passed over.

    Args:
        file: the file.

    Returns:
        Each row with its place, or the error of a line that cannot be read. While they are taken, a DataError says that
        the file begins a JSON array over several lines, or that `streams.lines` fails.
    """
    return _alone(_lines(file), file)


def _lines(file: DataFile) -> Iterator[Placed]:
    decoder, first = RowDecoder(), True
    title = file.title
    for line in streams.lines(file):
        place = f"line {line.number}"
        text = line.text.removeprefix("\ufeff")  # files that were joined have marks inside
        if not text.strip():
            continue
        if line.error:
            yield place, line.error
            continue
        is_first, first = first, False
        inside = None if file.rows is None else _inside_line(file, text, place)
        if isinstance(inside, list):
            yield from inside
            continue
        try:
            value = decoder.only_value(text, f"{title}, {place}", line.start, file)
        except DataError as error:
            if is_first and text.lstrip().startswith("["):
                raise DataError(
                    f"{title}, {place}: begins a JSON array that goes over lines, but this kind of file has one row a "
                    f"line: {file.renamed('.json')}"
                ) from error
            yield place, error
            continue
        if inside is not None:
            if is_first:  # of the setting
                raise inside
            yield place, inside
        elif isinstance(value, dict):
            yield place, value
        else:
            yield from rows_of(value, place, title)


def _inside_line(file: DataFile, text: str, place: str) -> list[Placed] | DataError:
    """Read the rows inside a line; the error says that data.rows leads to none there, or that the line is no JSON."""
    window = Window(dataclasses.replace(file, name=f"{file.title}, {place}"), text)
    try:
        rows = [(f"{place}, {within}", row) for within, row in _inside_value(window)]
        return window.error("Extra data") if window.next_character() else rows
    except DataError as error:
        return error


def _alone(placed: Iterator[Placed], file: DataFile) -> Iterator[Placed]:
    """Pass rows on; where an object is all that the file holds, read it as a table by columns if it is one."""
    first = next(placed, None)
    if first is None:
        return
    try:
        second = next(placed, None)
    except DataError:  # which follows the first row, bad or not
        yield first
        raise
    place, row = first
    if second is not None or isinstance(row, DataError) or file.rows is not None:
        yield first
        yield from [second] if second else ()
        yield from placed
    elif (table := table_by_columns(row)) is not None:
        file.note(f"is one object that holds a table by its columns; it is read as {counted(len(table), 'row')}")
        yield from ((f"row {number}", made) for number, made in enumerate(table, start=1))
    else:
        yield place, WholeFile(row)


def read_json(file: DataFile) -> Iterator[Placed]:
    """Read an array of rows, one object, objects one after another, or JSONL under this name.

    Args:
        file: the file.

    Yields:
        Each row with its place, or the error of a row that is none.

    Raises:
        DataError: it is not JSON (with row, line and column), holds neither objects nor an array, or `streams.blocks`
            fails.
    """
    blocks = streams.blocks(file, keep_undecoded=True)
    start = next(filter(None, (block.lstrip() for block in blocks)), "")
    if start.startswith(("{", "[")) and _is_jsonl(file):
        yield from read_jsonl(file)
    elif start.startswith(("{", "[")) and file.rows is not None:
        yield from _read_inside(Window(file))
    elif start.startswith("["):
        yield from _read_array(file)
    elif start.startswith("{"):
        yield from _read_objects(file)
    elif start:
        raise DataError(f"{file} should hold objects or an array of them, and begins {start[:20]!r}.")


def _is_jsonl(file: DataFile) -> bool:
    """Return True if a row ends with its line.

    The second line of an object that goes on begins with a key or a brace's end, so where it begins an object, the
    first line was one too, perhaps a broken one. An array on one line is a row if it holds turns.
    """
    filled = (line.text.strip() for line in streams.lines(file) if line.text.strip())
    try:
        first, second = [*itertools.islice(filled, 2), "", ""][:2]
    except DataError:  # a line that is too long, which the other readers need not be
        return False
    if second == "{" or first.endswith(("{", "[")):  # as only objects over several lines begin
        return False
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return first.startswith("{") and second.startswith("{")
    return isinstance(value, dict) or second.startswith("[") or (bool(value) and all(is_turn(item) for item in value))


def _read_objects(file: DataFile) -> Iterator[Placed]:
    """Read objects one after another, each over as many lines as it likes."""
    window = Window(file)

    def placed() -> Iterator[Placed]:
        while window.next_character():
            for value in window.values_at(()):
                yield from _rows(window, value)

    return _alone(placed(), file)


def _read_inside(window: Window) -> Iterator[Placed]:
    """Read the rows to which data.rows leads, in each value of a file."""
    while window.next_character():
        yield from _inside_value(window)


def _inside_value(window: Window) -> Iterator[Placed]:
    path = (window.file.rows or "").split(".")
    for value in window.values_at(path if path[-1] == EACH else [*path, ITEMS]):
        yield from _rows(window, value)


def _read_array(file: DataFile) -> Iterator[Placed]:
    """Read the items of an array as rows; where all are turns, the array is one row."""
    window, turns, is_conversation = Window(file), list[Any](), True
    for value in window.values_at([ITEMS]):
        if is_conversation and is_turn(value) and len(turns) < _MOST_TURNS and not window.fault():
            turns.append(value)
            continue
        if turns:
            yield from ((f"row {number}", turn) for number, turn in enumerate(turns, start=1))
            turns.clear()
        is_conversation = False
        yield from _rows(window, value)
    if turns:
        yield "row 1", {"messages": turns}
    if window.next_character():
        raise window.error("Extra data after the array")


def _rows(window: Window, value: Any) -> Iterator[Placed]:
    """Find the rows in the value that a window decoded last."""
    place = f"row {window.row}"
    if error := window.fault():
        yield place, error
    else:
        yield from rows_of(value, place, window.file.title)
