"""Read rows of CSV, TSV and Parquet files.

CSV follows RFC 4180: a field with the delimiter, a quote or a newline inside has quotes around it. Many TSV files have
no such rule and hold quotes as they are, so a TSV is read by it only where the whole file keeps to it and no quote
makes one row of lines that are rows themselves. A Parquet struct has the keys of all rows, null where one has none;
such keys are left out. Left out: what columns mean; in a CSV, a lone quote that another one rows later closes.
"""

import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.reading import streams
from qlora_trainer.data.reading.json_rows import Placed
from qlora_trainer.data.reading.values import without_nulls


def read_table(path: Path, delimiter: str, encoding: str | None = None, header: Sequence[str] = ()) -> Iterator[Placed]:
    """Read the rows of a CSV or TSV file, every field as text.

    Args:
        path: the file.
        delimiter: a comma, or a tab.
        encoding: as Python names it; None for UTF-8.
        header: the columns' names, where the first line does not hold them.

    Yields:
        Each row with the line where it begins, or an error: a wrong number of fields, or bytes that are no text.

    Raises:
        DataError: the line of names is wrong, quotes swallow rows, or `streams.lines` fails.
    """
    names = list(header)
    if len(set(names)) < len(names):
        raise DataError(f"data.header names a column twice: {', '.join(names)}. Give each a name of its own.")
    if delimiter == "," and not header:
        delimiter = _delimiter_of(path, encoding)
    for place, fields, error in _field_rows(path, delimiter, encoding, len(names)):
        where = f"{path.name}, {place}"
        if not names:
            names = _names(fields, error, where)
        elif error:
            yield place, error
        elif len(fields) != len(names):
            origin = "data.header" if header else "the first line"
            yield (
                place,
                DataError(
                    f"{where}: {len(fields)} fields where {origin} names {len(names)} columns "
                    f"({', '.join(names[:8])}). A field with {delimiter!r} or a newline inside needs quotes around it."
                ),
            )
        else:
            yield place, dict(zip(names, fields, strict=True))


def _delimiter_of(path: Path, encoding: str | None) -> str:
    """Find the delimiter in the line of names: spreadsheets of many countries write semicolons and call it CSV."""
    first = next((line.text for line in streams.lines(path, encoding) if line.text.strip()), "")
    return next((mark for mark in ",;\t" if mark in first), ",")


def _names(fields: list[str], error: DataError | None, where: str) -> list[str]:
    if error:
        raise error
    names = [name.strip() for name in fields]
    if len(set(names)) < len(names):
        raise DataError(
            f"{where}: a column name appears twice: {', '.join(names)}. The first line should name the columns; where "
            "the file has no such line, name them: data.header [id, text, label]."
        )
    return names


def _field_rows(
    path: Path, delimiter: str, encoding: str | None, columns: int
) -> Iterator[tuple[str, list[str], DataError | None]]:
    """Read the fields of each row with the line where it begins, and what is wrong with it; skip blank lines."""
    csv.field_size_limit(streams.MAX_LINE_BYTES)
    lines = _Lines(path, encoding, delimiter)
    has_quotes = delimiter != "\t" or _keeps_to_quotes(path, encoding, columns)
    reader = csv.reader(
        lines, delimiter=delimiter, strict=True, quoting=csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE
    )
    while True:
        place = f"line {reader.line_num + 1}"
        where = f"{path.name}, {place}"
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
        return "A carriage return alone is here; lines should end with a newline, or both."
    return "Is a quote missing? A quote inside quotes is written twice."


def _keeps_to_quotes(path: Path, encoding: str | None, columns: int) -> bool:
    lines = _Lines(path, encoding, "\t")
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
        path: the file.
        encoding: as Python names it; None for UTF-8.
        delimiter: between fields.
    """

    def __init__(self, path: Path, encoding: str | None, delimiter: str) -> None:
        self._lines, self._delimiter = streams.lines(path, encoding), delimiter
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


def read_parquet(path: Path) -> Iterator[Placed]:
    """Read the rows of a Parquet file, with their nested columns as lists and objects.

    Args:
        path: the file.

    Yields:
        Each row with its place.

    Raises:
        DataError: the file cannot be read, or has two columns of one name.
    """
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    numbers = itertools.count(1)
    streams.check_is_fetched(path)
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise DataError(f"{path} has more than one column of the name {', '.join(repeated)}. Rename them.")
            for batch in file.iter_batches(batch_size=256):
                rows: list[dict[str, Any]] = batch.to_pylist()
                for record in rows:
                    yield f"row {next(numbers)}", {name: without_nulls(value) for name, value in record.items()}
    except DataError:
        raise
    except (arrow.ArrowException, OSError, ValueError, OverflowError) as error:  # such as of a date beyond year 9999
        raise DataError(f"{path}, after row {next(numbers) - 1}: cannot be read as Parquet: {error}") from error
