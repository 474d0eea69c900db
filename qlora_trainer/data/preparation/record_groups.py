"""Group records into chunks of bounded size, which are prepared one after the other."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.reading.json_layouts import Record
from qlora_trainer.data.reading.values import MOST_LEVELS

_CHUNK_ROWS = 256
_CHUNK_CHARACTERS = 1 << 20  # a chunk of long documents has fewer rows, so that memory stays bounded

Records = Sequence[tuple[str, Record | DataError]]


def in_chunks(records: Iterable[tuple[str, Record | DataError]]) -> Iterator[Records]:
    """Collect records in chunks of bounded size: a bound on rows, and one on their text.

    Args:
        records: each with its place.

    Yields:
        Some records.

    Raises:
        DataError: reading failed. What was read before comes first, so that a bad row there is reported rather than
            what follows.
    """
    chunk: list[tuple[str, Record | DataError]] = []
    characters = 0
    try:
        for where, record in records:
            if not isinstance(record, DataError):
                try:
                    characters += _characters(record)
                except RecursionError:
                    message = (
                        f"{where}: its objects and lists lie in each other more than {MOST_LEVELS} deep. Flatten it."
                    )
                    record = DataError(message)
            chunk.append((where, record))
            if len(chunk) == _CHUNK_ROWS or characters >= _CHUNK_CHARACTERS:
                yield chunk
                chunk, characters = [], 0
    except DataError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def _characters(value: Any, depth: int = 0) -> int:
    if isinstance(value, str):
        return len(value)
    if depth > MOST_LEVELS:
        raise RecursionError
    if isinstance(value, dict):
        return sum(_characters(inner, depth + 1) for inner in value.values())
    return sum(_characters(inner, depth + 1) for inner in value) if isinstance(value, list) else 0
