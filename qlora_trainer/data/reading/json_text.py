"""Decode JSON values one at a time, from a line or from a window that slides over a long text.

The standard library's decoder, given such a window, is as fast here as a streaming parser (about 300 MB/s) and needs
none; the memory is that of a row. A key that is there twice in one object is an error, as one of its values would be
lost. Left out: which values are rows (json_layouts.py).
"""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from qlora_trainer.common.errors import DataError
from qlora_trainer.config.override import override
from qlora_trainer.data.reading import streams
from qlora_trainer.data.reading.data_file import DataFile
from qlora_trainer.data.reading.values import check_depth, kind, listed

EACH = "*"  # in a path: every item of a list, or every value of an object
ITEMS = ""  # in a path, where it ends: every item of a list

_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_LITERAL = 16  # characters of -Infinity and some more: an error so near the window's end may be a cut value


class RowDecoder:
    """Decode one JSON value at a time, and note a key that is there twice in one object."""

    def __init__(self) -> None:
        self.repeated: list[str] = []  # keys, in the value decoded last
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            keys = [key for key, _ in pairs]
            self.repeated.append(next(key for key in keys if keys.count(key) > 1))
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
        self.repeated.clear()
        value, end = self._decoder.raw_decode(text, begin)
        check_depth(value, text, begin, end)
        return value, end

    def check_keys(self, where: str) -> None:
        """Check the value decoded last.

        Args:
            where: file and line, for errors.

        Raises:
            DataError: an object in it has a key twice.
        """
        if self.repeated:
            raise DataError(
                f"{where}: the key {self.repeated[0]} is there twice in one object, and one value of the two would be "
                "lost. Keep one."
            )

    def only_value(self, text: str, where: str, start: int | None, file: DataFile) -> Any:
        """Decode the value that a whole line holds.

        Args:
            text: the line.
            where: file and line, for errors.
            start: the byte where the line begins; None where it is not known.
            file: that holds it, for errors.

        Returns:
            The value.

        Raises:
            DataError: it is no JSON, or has a key twice.
        """
        try:
            value, end = self.value(text, len(text) - len(text.lstrip(" \t\r")))
            if rest := text[end:].lstrip():
                raise json.JSONDecodeError("Extra data", text, len(text) - len(rest))
        except json.JSONDecodeError as error:
            byte = "" if start is None else f" (byte {start + len(text[: error.pos].encode('utf-8', 'replace'))})"
            near = text[max(0, error.pos - 20) : error.pos + 20]
            raise DataError(
                f"{where}: not JSON: {error.msg} at column {error.pos + 1}{byte}, near {near!r}.{_way_out(text, file)}"
            ) from error
        except (RecursionError, ValueError) as error:
            raise DataError(f"{where}: cannot be read as JSON: {error}") from error
        self.check_keys(where)
        return value


def _way_out(line: str, file: DataFile) -> str:
    if line.strip() in ("{", "["):
        return f" One object is one line in this kind of file; where it goes over lines: {file.renamed('.json')}"
    if line.lstrip().startswith("{'"):
        return " This is Python's way to write an object; write it with json.dumps."
    return ""


class Window:
    """Hold the part of a long text that is in memory, with its place in the whole.

    Args:
        file: the file.
        text: a part of the file; None: all of it.
    """

    def __init__(self, file: DataFile, text: str | None = None) -> None:
        self.file, self._blocks = file, streams.blocks(file, keep_undecoded=True) if text is None else iter([text])
        self._is_part = text is not None
        self._lines, self._columns = 0, 0  # line ends before the window, and characters after the last of them
        self.text, self.position = "", 0
        self.row = 0  # number of the row that is being read
        self._decoder, self._begin = RowDecoder(), 0
        self._is_damaged = False  # bytes that are no text were found

    def more(self) -> bool:
        """Drop what is behind the position and read on, as much again as is kept: a long row is tried a few times.

        Returns:
            False where the text ends: then nothing is moved.
        """
        parts, wanted = [], len(self.text) - self.position
        for block in self._blocks:
            parts.append(block)
            self._is_damaged = self._is_damaged or not streams.is_whole_text(block)
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

    def error(self, what: str, position: int | None = None) -> DataError:
        """Make an error with the place of a character in the whole text.

        Args:
            what: went wrong.
            position: of a character in the window; None for where it is.

        Returns:
            The error.
        """
        position = self.position if position is None else position
        before = self.text[:position]
        line = self._lines + before.count("\n") + 1
        column = position - before.rfind("\n") if "\n" in before else self._columns + position + 1
        near = self.text[max(0, position - 20) : position + 20]
        return DataError(f"{self._where()}: not JSON: {what} at line {line}, column {column}, near {near!r}.")

    def _where(self) -> str:
        return f"{self.file.title}, row {self.row}"

    def value(self) -> Any:
        """Decode the value at the position, and move behind it.

        Returns:
            The value.

        Raises:
            DataError: it is no JSON; then the next value cannot be found.
        """
        self.next_character()
        while True:
            try:
                value, end = self._decoder.value(self.text, self.position)
            except json.JSONDecodeError as error:
                is_open = error.msg.startswith("Unterminated string")
                is_cut = is_open or error.pos > len(self.text) - _LONGEST_LITERAL
                is_endless = len(self.text) - self.position > streams.MAX_LINE_BYTES
                if is_cut and is_endless and (key := self._key_of_many()):
                    raise DataError(
                        f"{self._where()}: the row is longer than {streams.MAX_LINE_BYTES // 2**20} MiB. If the rows "
                        f"are inside it: {override('data.rows', key)}"
                    ) from error
                if not is_cut or is_endless or not self.more():
                    is_early = is_open or error.pos >= len(self.text.rstrip())
                    what = error.msg + " (the file ends too early)" * (is_early and not is_endless)
                    raise self.error(what, error.pos) from error
                continue
            except (RecursionError, ValueError) as error:
                raise DataError(f"{self._where()}: cannot be read as JSON: {error}") from error
            if end == len(self.text) and self.more():
                continue  # a number may go on
            self._begin, self.position = self.position, end
            return value

    def _key_of_many(self) -> str | None:
        """Find the key of the list or object that makes the object at the position too long for a row."""
        if self._is_part or self.text[self.position] != "{":
            return None
        window = Window(self.file, self.text[self.position :])
        window.next_character()
        last: str | None = None
        with contextlib.suppress(DataError):
            for key in window.object_keys():
                last = key if window.next_character() in ("[", "{") else None
                window.value()
        return last

    def values_at(self, path: Sequence[str]) -> Iterator[Any]:
        """Decode the values inside the value at the position to which a path leads, one at a time.

        What is not on the path is decoded and dropped. `row` counts the values.

        Args:
            path: keys of objects, EACH for every item of a list or value of an object, ITEMS for those of a list.

        Yields:
            Each value; `fault` says what is wrong with the last one.

        Raises:
            DataError: it is no JSON, or the path does not lead there.
        """
        character = self.next_character()
        if not path:
            self.row += 1
            yield self.value()
        elif character == "[" and path[0] in (EACH, ITEMS):
            yield from self._of_list(path[1:])
        elif character == "{" and path[0] != ITEMS:
            yield from self._of_object(path)
        else:
            found = kind(self.value())
            way_out = f"data.rows leads to {found} and should lead to a list of rows"
            if path[0] != ITEMS:
                way_out = f"data.rows names {path[0]}, where there is {found}"
            raise DataError(
                f"{self.file.title}: {way_out}. {EACH} is each item of a list and each value of an object, as "
                f"in data.rows=data.{EACH}.rows"
            )

    def _of_list(self, path: Sequence[str]) -> Iterator[Any]:
        self.position += 1
        if self.next_character() != "]":
            while True:
                if path:
                    yield from self.values_at(path)
                else:
                    self.row += 1
                    yield self.value()
                if self.next_character() != ",":
                    break
                self.position += 1
        if (character := self.next_character()) != "]":
            raise self.error("Expecting ',' or ']'" if character else "the file was cut off, the array has no end,")
        self.position += 1

    def _of_object(self, path: Sequence[str]) -> Iterator[Any]:
        found: list[str] = []
        for key in self.object_keys():
            if key in found and path[0] in (EACH, key):
                raise DataError(f"{self._where()}: the key {key} is there twice in one object. Keep one.")
            found.append(key)
            if path[0] in (EACH, key):
                yield from self.values_at(path[1:])
            else:
                self.value()
        if path[0] not in (EACH, *found):
            raise DataError(f"{self.file.title}: data.rows names {path[0]}, but there is {listed(found)}.")

    def object_keys(self) -> Iterator[str]:
        """Decode the keys of the object at the position. After each, the caller reads its value.

        Yields:
            Each key.

        Raises:
            DataError: it is no JSON.
        """
        self.position += 1
        if self.next_character() != "}":
            while True:
                key = self.value()
                if not isinstance(key, str) or self.next_character() != ":":
                    raise self.error("Expecting a key and ':'")
                self.position += 1
                yield key
                if self.next_character() != ",":
                    break
                self.position += 1
        if self.next_character() != "}":
            raise self.error("Expecting ',' or '}'")
        self.position += 1

    def fault(self) -> DataError | None:
        """Say what is wrong with the value decoded last: a key that is there twice, or bytes that are no text.

        Returns:
            The error; None where nothing is.
        """
        if not self._decoder.repeated and not self._is_damaged:
            return None
        try:
            self._decoder.check_keys(self._where())
        except DataError as error:
            return error
        text = self.text[self._begin : self.position] if self._is_damaged else ""
        return streams.undecoded_error(self.file, f"row {self.row}", text)
