"""Read the records of one source as rows, with what the tokenizer has to say about their text.

Left out: formats (data/formats), and what a template wrote already (rendered_rows.py).
"""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_trainer.common.errors import DataError
from qlora_trainer.config.data_schema import DataFormat, SourceFile
from qlora_trainer.config.override import override
from qlora_trainer.data.formats.detect import UnknownFormatError
from qlora_trainer.data.formats.parse import LeftOutError, RecordReader, check_no_empty_turn
from qlora_trainer.data.preparation.record_groups import Records
from qlora_trainer.data.preparation.reports import places_in_words
from qlora_trainer.data.preparation.source_checks import exceeds_limit, skip_limit_setting
from qlora_trainer.data.reading.json_layouts import Record
from qlora_trainer.data.types import Conversation, Row

if TYPE_CHECKING:
    from qlora_trainer.data.preparation.rendered_rows import RenderedRows

FoundRow = tuple[str, Row] | LeftOutError | DataError


def record_reader(settings: SourceFile, format: DataFormat) -> RecordReader:
    """Make what reads the records of a source.

    Args:
        settings: of the source.
        format: how its rows are read.

    Returns:
        The reader.
    """
    return RecordReader(
        format,
        settings.columns,
        settings.template,
        ignore=settings.ignore,
        keep=settings.keep,
        roles=settings.roles,
        is_named=settings.format != "auto",
    )


class SourceReader:
    """Read the records of one source; `reader` counts what it did not use.

    Args:
        settings: of the source.
        format: how its rows are read.
        rendered: reads text that a template wrote; None where there is no tokenizer yet, and such text stays as it is.
    """

    def __init__(self, settings: SourceFile, format: DataFormat, rendered: "RenderedRows | None") -> None:
        self.settings, self.rendered = settings, rendered
        self.reader = record_reader(settings, format)

    def read(self, where: str, record: Record | DataError) -> FoundRow:
        """Read one record; a ConfigError says that the settings have to decide something.

        Args:
            where: file and line.
            record: its columns, or why there are none.

        Returns:
            The row with its place, or why there is none.
        """
        if isinstance(record, DataError):
            return record
        try:
            row = self.reader.read(record, where)
            if self.rendered is None:
                return where, row
            found = self.rendered.read(row, self.settings.rendered or "auto", self._warn, where)
            if found is not row and isinstance(found, Conversation):
                check_no_empty_turn(found.messages)
        except DataError as error:
            return error
        return where, found

    def _warn(self, text: str) -> None:
        self.reader.warnings[text] += 1


def first_format(source: SourceFile, records: Records) -> DataFormat:
    """Find how rows of a source are read: as its settings say, or as the first recognizable row shows.

    Args:
        source: complete, as `source_files` lists it.
        records: the source's first.

    Returns:
        A format; "auto" where no row can be recognized.
    """
    if source.format == "auto":
        reader = record_reader(source, "auto")
        for where, record in records:
            with contextlib.suppress(DataError):  # reported when the row is read
                if not isinstance(record, DataError):
                    return reader.recognize(record, where)[1]
    return source.format


def bad_row_error(
    error: DataError, others: Sequence[str], rows: int, max_skipped: float, has_examples: bool
) -> DataError:
    """Say what is wrong with a row, which others are bad, and how such rows are skipped.

    Args:
        error: why the row cannot be used.
        others: places of the other bad rows, of those that were read together.
        rows: how many were read together.
        max_skipped: data.max_skipped.
        has_examples: True if rows before these can be used, so that something is left where all of these are skipped.

    Returns:
        The error to raise.
    """
    if isinstance(error, UnknownFormatError):
        return error
    bad, settings = len(others) + 1, override("data.on_bad_row", "skip")
    if exceeds_limit(bad, rows, max_skipped):
        settings += f" {skip_limit_setting(bad, rows)}"
    more = f" (and {len(others)} more: {places_in_words(others)})" if others else ""
    skipping = f", or skip such rows: {settings}" if bad < rows or has_examples else ""
    apart = " " if str(error).endswith(".") else "\n"  # a command to paste is the rest of its line
    found = DataError(f"{error}{apart}Correct it{more}{skipping}.")
    found.__cause__ = error
    return found
