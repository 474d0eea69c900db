"""Read data files as records, one at a time, each with the place it came from, for errors that can be acted on.

JSONL, JSON, CSV, TSV, Parquet and plain text files, these compressed with gzip or zstandard, or a data set on the hub.
Nothing is skipped here: a row that cannot be read comes as its error, so that the caller may stop or count it, and what
is wrong with a file as a whole is raised. Left out: bytes and text (streams.py), the kinds of file (json_rows.py,
tables.py).
"""

import difflib
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.common.errors import DataError, FileMissingError, first_line
from qlora_trainer.common.file_identity import file_sha256
from qlora_trainer.data.reading import streams
from qlora_trainer.data.reading.json_rows import Placed, Record, read_json, read_jsonl
from qlora_trainer.data.reading.tables import read_parquet, read_table
from qlora_trainer.data.reading.values import without_nulls

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class RecordSource:
    """Name where records come from. `digest` names the content and how it is read.

    `records` starts from the first record each time: the place of each, such as "rows.jsonl, line 12", with the record,
    or with a DataError where that row cannot be read but the next one can. It raises DataError for faults of the file.
    """

    name: str
    digest: str
    records: Callable[[], Iterator[tuple[str, Record | DataError]]]


def open_source(
    path: str,
    split: str = "train",
    *,
    subset: str | None = None,
    encoding: str | None = None,
    header: Sequence[str] = (),
    content_digest: Callable[[Path], str] | None = None,
) -> RecordSource:
    """Open a local file, or where there is none and the name could be one, a data set on the hub.

    Args:
        path: of the file, or the data set's name.
        split: of a hub data set.
        subset: of a hub data set that has several.
        encoding: of a text file, as Python names it; None for UTF-8.
        header: names of the columns of a CSV or TSV file without a line of them.
        content_digest: gives the digest of a local file's content, maybe from memory; None: it is read.

    Returns:
        The source, nothing of it read but its digest.

    Raises:
        FileMissingError: no such file; the message has near misses.
        DataError: a directory, a file that cannot be opened, a split or subset of a file, or a hub data set that cannot
            be had.
    """
    try:
        return _open_source(path, split, subset, encoding, header, content_digest or file_sha256)
    except FileMissingError:
        raise
    except (OSError, RuntimeError) as error:  # the latter of ~nobody, which is no user here
        raise DataError(f"{path} cannot be opened: {getattr(error, 'strerror', None) or first_line(error)}.") from error


def _open_source(
    path: str,
    split: str,
    subset: str | None,
    encoding: str | None,
    header: Sequence[str],
    content_digest: Callable[[Path], str],
) -> RecordSource:
    local = Path(path).expanduser()
    if local.is_dir():
        inside = sorted(entry.name for entry in local.iterdir() if streams.content_suffix(entry) in _SUFFIXES)
        raise DataError(
            f"{path} is a directory; name a file in it: {', '.join(inside[:10]) or 'none can be read here'}."
        )
    suffix = streams.content_suffix(local)
    if local.exists() or suffix in _SUFFIXES or not _HUB_NAME.fullmatch(path):
        _check_exists(local)
        _check_is_one_piece(path, split, subset)
        digest = _digest(content_digest(local), encoding, header)
        return RecordSource(local.name, digest, lambda: _readable(path, read_records(local, encoding, header)))
    return _hub_source(path, split, subset)


def read_records(
    path: Path, encoding: str | None = None, header: Sequence[str] = ()
) -> Iterator[tuple[str, Record | DataError]]:
    """Read the records of a local file.

    A FileMissingError says that there is no such file.

    Args:
        path: the file.
        encoding: of a text file, as Python names it; None for UTF-8.
        header: names of the columns of a CSV or TSV file without a line of them.

    Yields:
        Each record with its place, such as ("rows.jsonl, line 12", {...}), or a row's error in its place.

    Raises:
        DataError: the file is empty, of an unknown kind, or broken from some place on.
    """
    _check_exists(path)
    suffix = streams.content_suffix(path)
    empty = True
    for place, record in _reader(path, suffix, encoding, header):
        empty = False
        yield f"{path.name}, {place}", record
    if empty:
        raise DataError(f"{path} holds no rows.")


def _reader(path: Path, suffix: str, encoding: str | None, header: Sequence[str]) -> Iterator[Placed]:
    match suffix:
        case ".jsonl" | ".ndjson":
            return read_jsonl(path, encoding)
        case ".json":
            return read_json(path, encoding)
        case ".csv" | ".tsv":
            return read_table(path, "," if suffix == ".csv" else "\t", encoding, header)
        case ".txt":
            return _read_text(path, encoding)
        case ".parquet" if suffix == path.suffix.lower():
            return read_parquet(path)
        case ".parquet":
            raise DataError(f"{path}: unpack it; Parquet compresses its own columns, and is read here and there.")
    known = f"{', '.join(_SUFFIXES)}, each but .parquet also with {', '.join(streams.PACKED_SUFFIXES)}"
    raise DataError(f"{path.name} is of no kind that can be read. Known endings: {known}.")


def _read_text(path: Path, encoding: str | None) -> Iterator[Placed]:
    """Read the whole file as one document; rendering cuts it into rows of full length."""
    text = streams.whole(path, encoding)
    if text.strip():
        yield "line 1", {"text": text.replace("\r\n", "\n")}


def _check_exists(path: Path) -> None:
    if path.is_file():
        return
    if path.exists():
        raise DataError(
            f"{path} is no regular file, but a pipe or a device, and data is read more than once. Write it into a file."
        )
    siblings = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file()) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.6)
    if not path.parent.is_dir():
        hint = f"There is no directory {path.parent} either."
    elif near:
        hint = f"Did you mean {' or '.join(near)}?"
    else:
        readable = [name for name in siblings if streams.content_suffix(Path(name)) in _SUFFIXES]
        hint = f"That directory has {', '.join(readable[:8]) or 'no data files'}."
    raise FileMissingError(f"There is no file {path}. {hint}")


def _check_is_one_piece(path: str, split: str, subset: str | None) -> None:
    """Refuse a part of a file: it is read whole, so an eval split of itself would be trained on and measured."""
    given = [f"split {split}"] if split != "train" else []
    given += [f"subset {subset}"] if subset else []
    if given:
        raise DataError(
            f"{path} is a file, and {' and '.join(given)} would have no effect: only hub data sets have such parts, a "
            "file is read whole. Leave that out, or put the rows that are meant into a file of their own."
        )


def _digest(content: str, encoding: str | None, header: Sequence[str]) -> str:
    reading = repr((encoding, list(header))) if encoding or header else ""
    return hashlib.sha256((content + reading).encode()).hexdigest()


def _hub_source(name: str, split: str, subset: str | None) -> RecordSource:
    import datasets

    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # whatever the hub, the network or a script of the data set raises, the user must act
        raise DataError(_hub_message(name, split, error)) from error
    if not len(rows):
        raise DataError(f"{name} ({split}) holds no rows.")

    def records() -> Iterator[tuple[str, Record | DataError]]:
        for number, record in enumerate(rows, start=1):
            yield f"{name} ({split}), row {number}", {column: without_nulls(value) for column, value in record.items()}

    return RecordSource(f"{name} ({split})", rows._fingerprint, lambda: _readable(name, records()))


def _readable(path: str, records: Iterator[tuple[str, Record | DataError]]) -> Iterator[tuple[str, Record | DataError]]:
    """Pass records on; an error of the system while they are read is one of the file, not of where they are going."""
    try:
        yield from records
    except FileMissingError:
        raise
    except OSError as error:
        raise DataError(
            f"{path} cannot be read any further: {error.strerror or first_line(error)}. Look at the disk or network "
            "that it lies on, then try again."
        ) from error


def _hub_message(name: str, split: str, error: Exception) -> str:
    """Say what went wrong in our words: the errors of datasets name the splits and subsets there are, in lists."""
    said = str(error)
    if "Unknown split" in said:
        there = ", ".join(re.findall(r"'([^']+)'", said.partition("one of")[2]))
        return (
            f"The hub data set {name} has no split {split}; it has {there or 'none'}. Name one: split, in its source."
        )
    if "Config name is missing" in said or ("BuilderConfig" in said and "not found" in said):
        there = ", ".join(re.findall(r"'([^']+)'", said.partition("vailable")[2].partition("Example")[0]))
        return f"The hub data set {name} has the subsets {there}. Name one: subset, in its source."
    return f"There is no file {name} here, and as a hub data set it cannot be had (split {split}): {first_line(error)}"
