"""Read the records of one source as rows, with what the tokenizer has to say about their text.

Left out: formats (data/formats), and what a template wrote already (rendered_rows.py).
"""

from qlora_trainer.common.errors import DataError
from qlora_trainer.config.data_schema import DataFormat, SourceFile
from qlora_trainer.data.formats.parse import LeftOutError, RecordReader, check_no_empty_turn
from qlora_trainer.data.preparation.rendered_rows import RenderedRows
from qlora_trainer.data.reading.json_layouts import Record
from qlora_trainer.data.types import Conversation, Row

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
        rendered: reads text that a template wrote.
    """

    def __init__(self, settings: SourceFile, format: DataFormat, rendered: RenderedRows) -> None:
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
            found = self.rendered.read(row, self.settings.rendered or "auto", self._warn, where)
            if found is not row and isinstance(found, Conversation):
                check_no_empty_turn(found.messages)
        except DataError as error:
            return error
        return where, found

    def _warn(self, text: str) -> None:
        self.reader.warnings[text] += 1
