"""Read rows of JSONL and JSON files: one object a line, an array of objects, or objects one after another.

A .json file may be any of these, and is detected by how it begins. Arrays are read a piece at a time, so the memory is
that of a row: the standard library's decoder, given a window that slides over the text, is as fast here as a streaming
parser (about 300 MB/s) and needs none. A key that is there twice in one object is an error, as one of its values would
be lost. Left out: what the columns mean (formats).
"""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.reading import streams
from qlora_trainer.data.reading.values import check_depth

Record = dict[str, Any]
Placed = tuple[str, Record | DataError]  # where in the file, such as "line 3", and the row or what is wrong with it

_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_LITERAL = 16  # characters of -Infinity and some more: an error so near the window's end may be a cut value


def read_jsonl(path: Path, encoding: str | None = None) -> Iterator[Placed]:
    """Read one object a line; blank lines are passed over.

    Args:
        path: the file.
        encoding: as Python names it; None for UTF-8.

    Yields:
        Each row with its place, or the error of a line that cannot be read.

    Raises:
        DataError: the file begins a JSON array, or `streams.lines` fails.
    """
    decoder, first = RowDecoder(), True
    for line in streams.lines(path, encoding):
        place = f"line {line.number}"
        text = line.text.removeprefix("\ufeff")  # files that were joined have marks inside
        if not text.strip():
            continue
        if first and text.lstrip().startswith("["):
            raise DataError(f"{path.name}, {place}: begins a JSON array, but this kind of file has one object a line. "
                            "Call it .json.")  # fmt: skip
        first = False
        if line.error:
            yield place, line.error
            continue
        try:
            yield place, decoder.row(text, f"{path.name}, {place}", line.start)
        except DataError as error:
            yield place, error


def read_json(path: Path, encoding: str | None = None) -> Iterator[Placed]:
    """Read an array of objects, one object, objects one after another, or JSONL under this name.

    Args:
        path: the file.
        encoding: as Python names it; None for UTF-8.

    Yields:
        Each row with its place, or the error of a row that is none.

    Raises:
        DataError: it is not JSON (with row, line and column), holds neither objects nor an array, or `streams.blocks`
            fails.
    """
    start = next(filter(None, (block.lstrip() for block in streams.blocks(path, encoding))), "")
    if start.startswith("{") and _is_jsonl(path, encoding):
        yield from read_jsonl(path, encoding)
    elif start.startswith("["):
        yield from _read_array(path, encoding)
    elif start.startswith("{"):
        yield from _read_objects(path, encoding)
    elif start:
        raise DataError(f"{path.name} should hold objects or an array of them, and begins {start[:20]!r}.")


def _is_jsonl(path: Path, encoding: str | None) -> bool:
    """Return True if a row ends with its line.

    The second line of an object that goes on begins with a key or a brace's end, so where it begins an object, the
    first line was one too, perhaps a broken one.
    """
    filled = (line.text.strip() for line in streams.lines(path, encoding) if line.text.strip())
    first, second = [*itertools.islice(filled, 2), "", ""][:2]
    if second == "{" or first.endswith(("{", "[")):  # as only objects over several lines begin
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return second.startswith("{")
    return True


class RowDecoder:
    """Decode one JSON value at a time, and note a key that is there twice in one object."""

    def __init__(self) -> None:
        self._repeated: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            keys = [key for key, _ in pairs]
            self._repeated.append(next(key for key in keys if keys.count(key) > 1))
        return made

    def value(self, text: str, begin: int) -> tuple[Any, int]:
        """Decode the value that begins at a character.

        A json.JSONDecodeError, RecursionError or ValueError says why it cannot be read.

        Args:
            text: JSON, and what comes after it.
            begin: the character.

        Returns:
            The value, and where it ends.
        """
        self._repeated.clear()
        value, end = self._decoder.raw_decode(text, begin)
        check_depth(value, text, begin, end)
        return value, end

    def checked(self, value: Any, where: str) -> Record:
        """Return the value decoded last, if it is a row.

        Args:
            value: from `value`.
            where: file and line, for errors.

        Returns:
            The same value.

        Raises:
            DataError: it is no object, or has a key twice.
        """
        if self._repeated:
            raise DataError(
                f"{where}: the key {self._repeated[0]} is there twice in one object, and one value of the two would be "
                "lost. Keep one."
            )
        if not isinstance(value, dict):
            raise DataError(
                f"{where}: a row should be a JSON object with named columns, and is {type(value).__name__}."
            )
        return value

    def row(self, text: str, where: str, start: int | None) -> Record:
        """Decode the row that a whole line holds.

        Args:
            text: the line.
            where: file and line, for errors.
            start: the byte where the line begins; None where it is not known.

        Returns:
            The row.

        Raises:
            DataError: it is no JSON, or no row.
        """
        try:
            value = self._only_value(text)
        except json.JSONDecodeError as error:
            byte = "" if start is None else f" (byte {start + len(text[: error.pos].encode('utf-8', 'replace'))})"
            near = text[max(0, error.pos - 20) : error.pos + 20]
            raise DataError(
                f"{where}: not JSON: {error.msg} at column {error.pos + 1}{byte}, near {near!r}.{_way_out(text)}"
            ) from error
        except (RecursionError, ValueError) as error:
            raise DataError(f"{where}: cannot be read as JSON: {error}") from error
        return self.checked(value, where)

    def _only_value(self, text: str) -> Any:
        value, end = self.value(text, len(text) - len(text.lstrip(" \t\r")))
        if rest := text[end:].lstrip():
            raise json.JSONDecodeError("Extra data", text, len(text) - len(rest))
        return value


def _way_out(line: str) -> str:
    if line.strip() in ("{", "["):
        return " One object is one line in this kind of file; where it goes over lines, call the file .json."
    if line.lstrip().startswith("{'"):
        return " This is Python's way to write an object; write it with json.dumps."
    return ""


class _Window:
    """Hold the part of a long text that is in memory, with its place in the whole.

    Args:
        path: the file.
        encoding: as Python names it; None for UTF-8.
    """

    def __init__(self, path: Path, encoding: str | None) -> None:
        self._name, self._blocks = path.name, streams.blocks(path, encoding)
        self._lines, self._columns = 0, 0  # line ends before the window, and characters after the last of them
        self.text, self.position = "", 0

    def more(self) -> bool:
        """Drop what is behind the position and read on, as much again as is kept: a long row is tried a few times.

        Returns:
            False where the text ends: then nothing is moved.
        """
        parts, wanted = [], len(self.text) - self.position
        for block in self._blocks:
            parts.append(block)
            wanted -= len(block)
            if wanted <= 0:
                break
        if not parts:
            return False
        gone = self.text[: self.position]
        self._lines += gone.count("\n")
        self._columns = len(gone) - gone.rfind("\n") - 1 if "\n" in gone else self._columns + len(gone)
        self.text = self.text[self.position :] + "".join(parts)
        self.position = 0
        return True

    def next_character(self) -> str:
        """Move the position to the next character that is no white space.

        Returns:
            The character; empty at the end.
        """
        while True:
            self.position = _SPACE.match(self.text, self.position).end()  # type: ignore[union-attr]
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.more():
                return ""

    def error(self, row: int, what: str, position: int) -> DataError:
        """Make an error with the place of a character in the whole text.

        Args:
            row: its number.
            what: went wrong.
            position: of a character in the window.

        Returns:
            The error.
        """
        before = self.text[:position]
        line = self._lines + before.count("\n") + 1
        column = position - before.rfind("\n") if "\n" in before else self._columns + position + 1
        near = self.text[max(0, position - 20) : position + 20]
        return DataError(f"{self._name}, row {row}: not JSON: {what} at line {line}, column {column}, near {near!r}.")


def _read_objects(path: Path, encoding: str | None) -> Iterator[Placed]:
    """Read objects one after another, each over as many lines as it likes."""
    window, decoder = _Window(path, encoding), RowDecoder()
    for number in itertools.count(1):
        if not window.next_character():
            return
        yield _placed(window, decoder, number, path)


def _read_array(path: Path, encoding: str | None) -> Iterator[Placed]:
    window, decoder = _Window(path, encoding), RowDecoder()
    window.next_character()
    window.position += 1
    number = 0
    if window.next_character() != "]":
        for number in itertools.count(1):
            yield _placed(window, decoder, number, path)
            if window.next_character() != ",":
                break
            window.position += 1
    if (character := window.next_character()) != "]":
        what = "Expecting ',' or ']'" if character else "the file was cut off, the array has no end,"
        raise window.error(number, what, window.position)
    window.position += 1
    if window.next_character():
        raise window.error(number, "Extra data after the array", window.position)


def _placed(window: _Window, decoder: RowDecoder, number: int, path: Path) -> Placed:
    where = f"{path.name}, row {number}"
    window.next_character()
    value = _value(window, decoder, number, where)
    try:
        return f"row {number}", decoder.checked(value, where)
    except DataError as error:
        return f"row {number}", error


def _value(window: _Window, decoder: RowDecoder, number: int, where: str) -> Any:
    while True:
        try:
            value, end = decoder.value(window.text, window.position)
        except json.JSONDecodeError as error:
            is_open = error.msg.startswith("Unterminated string")
            is_cut = is_open or error.pos > len(window.text) - _LONGEST_LITERAL
            is_endless = len(window.text) - window.position > streams.MAX_LINE_BYTES
            if not is_cut or is_endless or not window.more():
                is_early = is_open or error.pos >= len(window.text.rstrip())
                what = error.msg + " (the file ends too early)" * (is_early and not is_endless)
                raise window.error(number, what, error.pos) from error
            continue
        except (RecursionError, ValueError) as error:
            raise DataError(f"{where}: cannot be read as JSON: {error}") from error
        if end == len(window.text) and window.more():
            continue  # a number may go on
        window.position = end
        return value
