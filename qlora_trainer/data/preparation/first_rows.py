"""Read the first rows of a config's files before the model is looked for, so that a fault there is reported at once.

No tokenizer is needed to see most faults: what is no JSON, has columns that no format has, or a turn of nobody. Left
out: faults that only a tokenizer or its template shows, later rows, and data sets of the hub, which the preparation
finds (prepare.py).
"""

from qlora_trainer.common.errors import DataError
from qlora_trainer.config.data_schema import DataConfig
from qlora_trainer.data.formats.parse import LeftOutError
from qlora_trainer.data.preparation.record_groups import in_chunks
from qlora_trainer.data.preparation.row_reading import SourceReader, bad_row_error, first_format
from qlora_trainer.data.preparation.source_keys import check_files, open_sources
from qlora_trainer.data.reading.files import Content

FIRST_ROWS = 4096  # of each source: some tenths of a second


def check_first_rows(config: DataConfig) -> None:
    """Look for each local file, and read its first rows as the preparation reads them.

    FileMissingError, DataError or ConfigError says what cannot be used, in the preparation's words.

    Args:
        config: of the rows.

    Raises:
        DataError: a row cannot be used, and bad rows are not skipped.
    """
    if not check_files(config):
        return
    has_rows = False
    for file, source in open_sources(config, lambda _: Content("")):  # hashed when they are prepared
        count, format = 0, file.format
        for records in in_chunks(source.records()):
            if format == "auto":
                format = first_format(file, records)
            reader = SourceReader(file, format, None)
            rows = [reader.read(where, record) for where, record in records]
            bad = [
                (where, row)
                for (where, _), row in zip(records, rows, strict=True)
                if isinstance(row, DataError) and not isinstance(row, LeftOutError)
            ]
            if bad and config.on_bad_row != "skip":
                (_, error), *others = bad
                raise bad_row_error(error, [place for place, _ in others], len(rows), config.max_skipped, has_rows)
            has_rows |= any(isinstance(row, tuple) for row in rows)
            count += len(records)
            if count >= FIRST_ROWS:
                break
