"""Read rows of CSV and TSV files, and name the fields of any table.

CSV follows RFC 4180: a field with the delimiter, a quote or a newline inside has quotes around it. The delimiter is the
one by which the line of names has most fields, or the one that Excel's line `sep=;` names. Many TSV files have
no such rule and hold quotes as they are, so a TSV is read by it only where the whole file keeps to it and no quote
makes one row of lines that are rows themselves. Left out: what columns mean; in a CSV, a lone quote that another one
rows later closes.
"""

import contextlib
import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from qlora_trainer.common.errors import DataError
from qlora_trainer.common.units import counted
from qlora_trainer.data.reading import streams
from qlora_trainer.data.reading.data_file import DataFile
from qlora_trainer.data.reading.json_layouts import Placed
from qlora_trainer.data.reading.values import listed

FieldRow = tuple[str, Sequence[Any], DataError | None]  # where in the file, the fields, and what is wrong with them

_DELIMITERS = ",;\t|"
_SEPARATOR_LINE = re.compile(r'"?sep=(?P<mark>.)"?\r?', re.IGNORECASE)
# A first line of such words is one of names; those of one known column would be too common as values.
_USUAL_NAME = re.compile(
    r"id|index|no|nr|number|text|label|prompt|completion|instruction|input|output|response|context|question|answer|query|"
    r"reply|source|target|title|content|messages?|conversations?|system|role|category|topic|lang|language|score|rating|"
    r"date|url|name|summary|document|sentence|(v|c|col|column|field|unnamed)[ _:]*\d+"
)


def read_table(file: DataFile, delimiter: str) -> Iterator[Placed]:
    """Read the rows of a CSV or TSV file, every field as text.

    Args:
        file: the file; its header names the columns where the first line does not.
        delimiter: a comma, or a tab.

    Yields:
        Each row with the line where it begins, or an error: a wrong number of fields, or bytes that are no text.

    Raises:
        DataError: the line of names is wrong, quotes swallow rows, or `streams.lines` fails.
    """
    skipped = 0
    if delimiter == ",":
        delimiter, skipped = _delimiter_of(file)
    rows = _field_rows(file, delimiter, len(file.header), skipped)
    yield from rows_by_name(file, rows, f"A field with {delimiter!r} or a newline inside needs quotes around it.")


def rows_by_name(file: DataFile, found: Iterable[FieldRow], advice: str) -> Iterator[Placed]:
    """Give fields the names of their columns: those of data.header, or of the first row.

    Args:
        file: that holds the rows; gets notes on its names.
        found: rows that are not empty.
        advice: for a row of another number of fields.

    Yields:
        Each row, or the error of one that has another number of fields or an error already.

    Raises:
        DataError: a name is given twice, or the row of names has an error.
    """
    if len(set(file.header)) < len(file.header):
        raise DataError(f"data.header names a column twice: {', '.join(file.header)}. Give each a name of its own.")
    names = ColumnNames(file.header) if file.header else None
    is_first = True
    for place, fields, error in found:
        if names is None:
            if error:
                raise error
            names = ColumnNames(fields)
            if names.repeated:
                file.note(f"a column name is there more than once: read as {', '.join(names.repeated)}")
            continue
        if is_first and not error and file.header and _are_names(ColumnNames(fields).given, file.header):
            file.note(
                f"data.header is set, and the first row looks like a line of names ({listed(fields)[:80]}), but is "
                "read as a row; if it names the columns, leave data.header out"
            )
        is_first = False
        if error:
            yield place, error
        elif (row := names.row(fields)) is not None:
            yield place, row
        else:
            origin = "data.header" if file.header else "the first row"
            columns = f"{counted(len(names.given), 'column')} ({listed(names.given[:8])})"
            wrong = f"{counted(len(fields), 'field')} where {origin} names {columns}. {advice}"
            yield place, DataError(f"{file.title}, {place}: {wrong}")


class ColumnNames:
    """Hold the names of a table's columns.

    An empty name is none: such a column is left out of rows where it is empty, and is column_3 elsewhere. Names that
    are there more than once are numbered, so that none is taken for the column that is meant.

    Args:
        fields: of the row of names, or those that the config gives.
    """

    def __init__(self, fields: Sequence[Any]) -> None:
        self.given = ["" if field is None else str(field).strip() for field in fields]
        counts = Counter(name for name in self.given if name)
        numbers: Counter[str] = Counter()
        self._names: list[str] = []
        self._is_named = [bool(name) for name in self.given]
        self.repeated: list[str] = []
        for position, name in enumerate(self.given, start=1):
            made = name or f"column_{position}"
            if counts[name] > 1:
                numbers[name] += 1
                made = f"{name}_{numbers[name]}"
            while made in self._names or (made != name and made in counts):
                made += "_"
            if counts[name] > 1:
                self.repeated.append(made)
            self._names.append(made)

    def row(self, fields: Sequence[Any]) -> dict[str, Any] | None:
        """Make a row of fields.

        Args:
            fields: of a line. Empty ones at its end, beyond the names, are a delimiter too many, and those that it
                lacks may only be of columns without a name.

        Returns:
            The row; None where it has another number of fields.
        """
        if any(fields[len(self._names) :]) or any(self._is_named[len(fields) :]):
            return None
        return {
            name: field
            for name, field, is_named in zip(self._names, fields, self._is_named, strict=False)
            if is_named or field
        }


def _are_names(fields: Sequence[str], header: Sequence[str]) -> bool:
    """Find whether a row looks like a line of names."""
    words = [field.lower() for field in fields if field]
    given = {name.lower() for name in header}
    return bool(words) and all(word in given or _USUAL_NAME.fullmatch(word) for word in words)


def _delimiter_of(file: DataFile) -> tuple[str, int]:
    """Find the delimiter: spreadsheets of many countries write semicolons and call it CSV.

    Returns:
        The delimiter, and how many lines come before the line of names.
    """
    found = (line for line in streams.lines(file) if line.text.strip())
    first = next(found, None)
    if first and (named := _SEPARATOR_LINE.fullmatch(first.text)):
        return named["mark"], first.number
    lines = [f"{line.text}\n" for line in itertools.chain([first] if first else [], itertools.islice(found, 20))]
    return max(_DELIMITERS, key=lambda mark: _fit(lines, mark, len(file.header))), 0


def _fit(lines: Sequence[str], mark: str, wanted: int) -> tuple[float, int]:
    """Say how well a delimiter fits: it separates fields, as many in each row as in the first one, or as wanted."""
    counts: list[int] = []
    with contextlib.suppress(csv.Error):  # the last row may be cut
        counts.extend(len(fields) for fields in csv.reader(iter(lines), delimiter=mark, strict=True))
    expected = wanted or (counts[0] if counts else 0)
    if expected < 2 or expected not in counts:
        return 0.0, 0
    return counts.count(expected) / len(counts), expected


def _field_rows(file: DataFile, delimiter: str, columns: int, skipped: int) -> Iterator[FieldRow]:
    """Read the fields of each row with the line where it begins, and what is wrong with it; skip blank lines."""
    csv.field_size_limit(streams.MAX_LINE_BYTES)
    lines = _Lines(file, delimiter, skipped)
    has_quotes = delimiter != "\t" or _keeps_to_quotes(file, columns)
    reader = csv.reader(
        lines, delimiter=delimiter, strict=True, quoting=csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE
    )
    while True:
        place = f"line {skipped + reader.line_num + 1}"
        where = f"{file.title}, {place}"
        lines.begin_row()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            message = DataError(f"{where}: {error}. {_way_out(error)}")
            if "unexpected end" in str(error):  # all lines from here on would be in one field
                raise message from error
            yield place, [], message
            continue
        if not fields:
            continue
        yield place, [field.replace("\r\n", "\n") for field in fields], lines.error


def _way_out(error: csv.Error) -> str:
    if "new-line character" in str(error):
        return "A carriage return alone is here; a line should end with a newline, or with both."
    return "Is a quote missing? A quote inside quotes is written twice."


def _keeps_to_quotes(file: DataFile, columns: int) -> bool:
    lines = _Lines(file, "\t")
    reader = csv.reader(lines, delimiter="\t", strict=True)
    try:
        for fields in reader:
            columns = columns or len(fields)
            if lines.are_rows_themselves(columns):
                return False
            lines.begin_row()
    except csv.Error:
        return False
    return True


class _Lines:
    """Yield lines with their ends, as a csv reader puts those of a quoted field together, and what the row has of them.

    Args:
        file: the file.
        delimiter: between fields.
        skipped: how many of its first lines are left out.
    """

    def __init__(self, file: DataFile, delimiter: str, skipped: int = 0) -> None:
        self._lines, self._delimiter = itertools.islice(streams.lines(file), skipped, None), delimiter
        self.begin_row()

    def begin_row(self) -> None:
        """Forget the lines of the row before."""
        self.delimiters: list[int] = []  # in each line of the row
        self.error: DataError | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.delimiters.append(line.text.count(self._delimiter))
        self.error = self.error or line.error
        return line.text + "\n"

    def are_rows_themselves(self, columns: int) -> bool:
        """Find whether a row of several lines would be as many rows, were it not for its quotes.

        Args:
            columns: of the table.

        Returns:
            True if each line has as many fields.
        """
        return len(self.delimiters) > 1 and columns > 1 and set(self.delimiters) == {columns - 1}


def table_suffix(lines: Sequence[str]) -> str | None:
    """Find whether lines are those of a table, though nothing says so.

    Args:
        lines: the first of a text, blank ones left out.

    Returns:
        .tsv or .csv; None where the lines do not all have as many fields by one delimiter, or only as prose has commas.
    """
    for mark in "\t,;|":
        if len(lines) < 2 or (mark == "," and all(re.search(r", ", line) for line in lines)):
            continue
        with contextlib.suppress(csv.Error):
            counts = {len(row) for row in csv.reader((f"{line}\n" for line in lines), delimiter=mark, strict=True)}
            if len(counts) == 1 and counts.pop() > 1:
                return ".tsv" if mark == "\t" else ".csv"
    return None
