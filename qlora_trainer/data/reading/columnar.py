"""Read rows of Parquet files, Arrow and Feather files, and Excel workbooks.

A struct of a columnar file has the keys of all rows, null where one has none; such keys are left out. Rows are read in
batches. Left out: what columns mean.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qlora_trainer.common.errors import DataError, NotInstalledError, first_line
from qlora_trainer.config.override import override
from qlora_trainer.data.reading.data_file import DataFile
from qlora_trainer.data.reading.json_layouts import Placed
from qlora_trainer.data.reading.tables import FieldRow, rows_by_name
from qlora_trainer.data.reading.unpacking import check_is_fetched
from qlora_trainer.data.reading.values import listed, without_nulls

if TYPE_CHECKING:
    import pyarrow

_BATCH_ROWS = 256


def read_parquet(file: DataFile) -> Iterator[Placed]:
    """Read the rows of a Parquet file, with their nested columns as lists and objects.

    Args:
        file: the file.

    Yields:
        Each row with its place.

    Raises:
        DataError: the file cannot be read, or has two columns of one name.
    """
    import pyarrow.parquet as parquet

    with _reading(file, "Parquet") as place, parquet.ParquetFile(file.path) as opened:
        _check_names(file, opened.schema_arrow.names)
        for batch in opened.iter_batches(batch_size=_BATCH_ROWS):
            yield from _rows(batch, place)


def read_arrow(file: DataFile) -> Iterator[Placed]:
    """Read the rows of an Arrow file, in the file format (also called Feather) or the stream format.

    Args:
        file: the file.

    Yields:
        Each row with its place.

    Raises:
        DataError: the file cannot be read, or has two columns of one name.
    """
    import pyarrow as arrow

    with _reading(file, "Arrow") as place, arrow.memory_map(str(file.path)) as opened:
        is_file = opened.read(6) == b"ARROW1"
        opened.seek(0)
        reader = (arrow.ipc.open_file if is_file else arrow.ipc.open_stream)(opened)
        _check_names(file, reader.schema.names)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            for begin in range(0, len(batch), _BATCH_ROWS):
                yield from _rows(batch.slice(begin, _BATCH_ROWS), place)


class _Places:
    """Count the rows of a file."""

    def __init__(self) -> None:
        self.done = 0

    def next(self) -> str:
        """Count a row.

        Returns:
            Its place.
        """
        self.done += 1
        return f"row {self.done}"


@contextlib.contextmanager
def _reading(file: DataFile, kind: str) -> Iterator[_Places]:
    """Turn what pyarrow raises while a file is read into our error, with the rows that were read before."""
    import pyarrow as arrow

    check_is_fetched(file)
    places = _Places()
    try:
        yield places
    except DataError:
        raise
    except (arrow.ArrowException, OSError, ValueError, OverflowError) as error:  # such as of a date beyond year 9999
        raise DataError(
            f"{file}, after row {places.done}: cannot be read as {kind}: {str(error).rstrip('. ')}. Fetch it "
            "again, or write it anew."
        ) from error


def _check_names(file: DataFile, names: list[str]) -> None:
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{file} has more than one column of the name {', '.join(repeated)}. Rename them.")


def _rows(batch: "pyarrow.RecordBatch", places: _Places) -> Iterator[Placed]:
    rows: list[dict[str, Any]] = batch.to_pylist()
    for record in rows:
        yield places.next(), {name: without_nulls(value) for name, value in record.items()}


def read_excel(file: DataFile) -> Iterator[Placed]:
    """Read the rows of a workbook's one sheet, or of the sheet that is named; the first row names the columns.

    A number stays a number; an empty cell is null. Rows without any value are passed over.

    Args:
        file: the workbook.

    Yields:
        Each row with its place; the error of a formula whose result the workbook does not hold.

    Raises:
        DataError: it cannot be read, has no rows, has several sheets of which none is named, or the names of its
            columns are wrong.
        NotInstalledError: openpyxl is missing.
    """
    try:
        import openpyxl
    except ImportError as error:
        raise NotInstalledError(
            f"{file}: to read Excel workbooks: pip install 'qlora-trainer[excel]' (or save the sheet as CSV)"
        ) from error
    check_is_fetched(file)
    with contextlib.ExitStack() as stack:
        try:
            # Results and formulas are two readings of one workbook.
            results, formulas = (
                openpyxl.load_workbook(file.path, read_only=True, data_only=data_only) for data_only in (True, False)
            )
            for book in (results, formulas):
                stack.callback(book.close)
            name = _sheet(file, results)
            for book in (results, formulas):
                book[name].reset_dimensions()  # which some programs write wrongly
            pairs = zip(results[name].iter_rows(), formulas[name].iter_rows(), strict=True)
            yield from rows_by_name(file, _sheet_rows(file, pairs), "A column with values needs a name.")
        except DataError:
            raise
        except Exception as error:  # whatever openpyxl, zipfile or an XML parser raise for a broken workbook
            raise DataError(
                f"{file} cannot be read as an Excel workbook: {first_line(error)}. Save it as .xlsx again, or as CSV."
            ) from error


def _sheet(file: DataFile, book: Any) -> str:
    names = [sheet.title for sheet in book.worksheets if any(any(row) for row in sheet.iter_rows(values_only=True))]
    if file.sheet:
        if file.sheet not in names:
            raise DataError(f"{file} has no sheet {file.sheet} with values; it has {listed(names)}.")
        return file.sheet
    if len(names) > 1:
        setting = override("data.train", [{"path": str(file), "subset": names[0]}])
        raise DataError(f"{file} has the sheets {listed(names)}. Name one, as its subset: {setting}")
    if not names:
        raise DataError(f"{file} holds no rows.")
    return names[0]


def _sheet_rows(file: DataFile, pairs: Iterator[tuple[Any, Any]]) -> Iterator[FieldRow]:
    """Read the values of each row that has any, to its last one, or to the last column that is named."""
    width = len(file.header)
    for number, (results, formulas) in enumerate(pairs, start=1):
        values, place = [cell.value for cell in results], f"row {number}"
        uncomputed = [
            formula.coordinate
            for formula, value in zip(formulas, values, strict=True)
            if value is None and isinstance(formula.value, str) and formula.value.startswith("=")
        ]
        while values and values[-1] is None:
            values.pop()
        if uncomputed:
            yield place, [], _no_result(file, place, uncomputed[0])
        elif values:
            width = width or len(values)
            yield place, [*values, *[None] * (width - len(values))], None


def _no_result(file: DataFile, place: str, cell: str) -> DataError:
    return DataError(
        f"{file.title}, {place}: the workbook holds no result of the formula in {cell}. Open it in a spreadsheet "
        "program and save it."
    )
