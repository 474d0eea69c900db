"""Data files become records, one at a time, each with the place it came from, for errors that can be acted on.

JSONL, JSON (an array, a single object, or JSONL under a .json name), CSV, TSV, Parquet and plain text files, or a
data set on the hub. Lines end at a newline character and nowhere else, so U+2028 inside a string stays. Text is UTF-8,
with or without a byte-order mark. Nothing is skipped: what cannot be read is an error that says where. Leaves out:
compressed files and other encodings, which are recognised and refused with a way out.
"""

import csv
import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_trainer.errors import DataError, FileMissingError

MAX_LINE_BYTES = 64 * 1024 * 1024
MAX_WHOLE_FILE_BYTES = 4 * 1024 * 1024 * 1024  # a JSON array or a text file is read whole

Record = dict[str, Any]

_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LFS_HEADER = b"version https://git-lfs.github.com/spec/"
_UTF8_MARK = b"\xef\xbb\xbf"
_OTHER_KINDS = {
    b"\xff\xfe": "is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8",
    b"\x1f\x8b": "is compressed with gzip; unpack it with gunzip",
    b"\x28\xb5\x2f\xfd": "is compressed with zstandard; unpack it with unzstd",
    b"PK\x03\x04": "is a zip archive; unpack it and name the file inside",
}


@dataclass(frozen=True)
class RecordSource:
    """Where records come from. `digest` names the content; `records` starts from the first record each time."""

    name: str
    digest: str
    records: Callable[[], Iterator[tuple[str, Record | DataError]]]


def file_digest(path: Path) -> str:
    """sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_source(path: str, split: str = "train", content_digest: Callable[[Path], str] = file_digest) -> RecordSource:
    """A local file, or where there is none and the name could be one, a data set on the hub.

    Args:
        content_digest: gives the digest of a local file's content, maybe from memory.

    Raises:
        FileMissingError: no such file; the message has near misses.
        DataError: a directory, an unknown kind of file, or a hub data set that cannot be had.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        inside = sorted(entry.name for entry in local.iterdir() if entry.suffix in _SUFFIXES)
        raise DataError(
            f"{path} is a directory; name a file in it: {', '.join(inside[:10]) or 'none can be read here'}."
        )
    if local.exists() or local.suffix.lower() in _SUFFIXES or not _HUB_NAME.fullmatch(path):
        _check_exists(local)
        return RecordSource(local.name, content_digest(local), lambda: read_records(local))
    return _hub_source(path, split)


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """Records of a local file with their place, such as ("rows.jsonl, line 12", {...}).

    Raises:
        FileMissingError: no such file.
        DataError: the file is empty, of an unknown kind, or broken; the message has the line or byte.
    """
    _check_exists(path)
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Record]]]] = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": lambda file: _read_table(file, ","),
        ".tsv": lambda file: _read_table(file, "\t"),
        ".parquet": _read_parquet,
        ".txt": _read_text,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path.name} is of no kind that can be read. Known endings: {', '.join(readers)}.")
    _check_kind(path)
    empty = True
    for place, record in reader(path):
        empty = False
        yield f"{path.name}, {place}", record
    if empty:
        raise DataError(f"{path} holds no rows.")


def _check_exists(path: Path) -> None:
    if path.is_file():
        return
    siblings = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file()) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.6)
    if not path.parent.is_dir():
        hint = f"There is no directory {path.parent} either."
    elif near:
        hint = f"Did you mean {' or '.join(near)}?"
    else:
        readable = [name for name in siblings if name.endswith(_SUFFIXES)]
        hint = f"That directory has {', '.join(readable[:8]) or 'no data files'}."
    raise FileMissingError(f"There is no file {path}. {hint}")


def _check_kind(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(len(_LFS_HEADER))
    if head == _LFS_HEADER:
        raise DataError(f"{path} is a git-lfs pointer, not the data itself. Fetch it: git lfs pull")
    for mark, meaning in _OTHER_KINDS.items():
        if head.startswith(mark):
            raise DataError(f"{path} {meaning}.")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, from 1, without their newline; a carriage return before it is white space to all readers."""
    start = 0
    with path.open("rb") as file:
        for number in range(1, 1 << 62):
            raw = file.readline(MAX_LINE_BYTES + 1)
            if not raw:
                return
            if len(raw) > MAX_LINE_BYTES:
                raise DataError(
                    f"{path.name}, line {number}: longer than {MAX_LINE_BYTES // 2**20} MiB. "
                    "One row is one line in this kind of file; is it a JSON array? Then call it .json."
                )
            text = _decoded(raw, path, f"line {number}", start)
            start += len(raw)
            yield number, text.removesuffix("\n")


def _decoded(raw: bytes, path: Path, place: str, start: int) -> str:
    mark = len(_UTF8_MARK) if start == 0 and raw.startswith(_UTF8_MARK) else 0
    try:
        return raw[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = start + mark + error.start
        line = raw.count(b"\n", 0, mark + error.start) + 1
        place = place or f"line {line}"
        raise DataError(
            f"{path.name}, {place}: byte {offset} (0x{raw[mark + error.start]:02x}) is not UTF-8 text. If the file has "
            "another encoding, convert it, for example: iconv -f ISO-8859-1 -t UTF-8"
        ) from error


def _whole(path: Path) -> str:
    size = path.stat().st_size
    if size > MAX_WHOLE_FILE_BYTES:
        raise DataError(
            f"{path} has {size / 2**30:.1f} GiB, and a {path.suffix} file is read whole. Make it JSONL, one row a line."
        )
    return _decoded(path.read_bytes(), path, "", 0)


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        near = text[max(0, error.pos - 20) : error.pos + 20]
        raise DataError(f"{place}: not JSON: {error.msg} at {line}column {error.colno}, near {near!r}.") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{place}: cannot be read as JSON: {error}") from error


def _object(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{place}: a row should be a JSON object with named columns, and is {type(value).__name__}.")
    return value


def _read_jsonl(path: Path) -> Iterator[tuple[str, Record]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        place = f"{path.name}, line {number}"
        if number == 1 and line.lstrip().startswith("["):
            raise DataError(f"{place}: begins a JSON array, but a .jsonl file has one object a line. Call it .json.")
        yield f"line {number}", _object(_parsed(line, place), place)


def _read_json(path: Path) -> Iterator[tuple[str, Record]]:
    text = _whole(path)
    if text.lstrip()[:1] == "{":
        try:
            yield "row 1", json.loads(text)
        except ValueError as error:
            if not str(error).startswith("Extra data"):
                _parsed(text, path.name)
            yield from _read_jsonl(path)
        return
    if not text.strip():
        return
    rows = _parsed(text, path.name)
    if not isinstance(rows, list):
        raise DataError(f"{path.name} should hold an array of objects, and holds {type(rows).__name__}.")
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", _object(row, f"{path.name}, row {number}")


def _read_table(path: Path, delimiter: str) -> Iterator[tuple[str, Record]]:
    csv.field_size_limit(MAX_LINE_BYTES)
    # A quoted field may hold newlines, so the reader gets lines with their ends and puts them together.
    reader = csv.reader((line + "\n" for _, line in _lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    begin = 1
    try:
        for fields in reader:
            place, begin = f"line {begin}", reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = fields
                if len(set(header)) < len(header):
                    raise DataError(
                        f"{path.name}, {place}: a column name appears twice: {', '.join(header)}. The first line "
                        "should name the columns."
                    )
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{path.name}, {place}: {len(fields)} fields where the first line names {len(header)} columns "
                    f"({', '.join(header[:8])}). A field with {delimiter!r} or a newline inside needs quotes around it."
                )
            yield place, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"{path.name}, line {begin}: {error}. Is a quote missing?") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Record]]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", record
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def _read_text(path: Path) -> Iterator[tuple[str, Record]]:
    """The whole file is one document; rendering cuts it into rows of full length."""
    text = _whole(path)
    if text.strip():
        yield "line 1", {"text": text.replace("\r\n", "\n")}


def _hub_source(name: str, split: str) -> RecordSource:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # whatever the hub, the network or a script of the data set raises, the user must act
        raise DataError(
            f"There is no file {name} here, and as a hub data set it cannot be had (split {split}): "
            f"{type(error).__name__}: {error}"
        ) from error

    def records() -> Iterator[tuple[str, Record | DataError]]:
        for number, record in enumerate(rows, start=1):
            yield f"{name} ({split}), row {number}", dict(record)

    return RecordSource(f"{name} ({split})", rows._fingerprint, records)
