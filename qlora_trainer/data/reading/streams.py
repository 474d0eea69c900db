"""Read a data file as bytes and as text: unpacked, decoded, and in lines, with the byte where that fails.

Text is UTF-8, with or without a byte-order mark, unless another encoding is named; nothing is guessed, as a wrong guess
would train on wrong characters. Lines end at a newline character and nowhere else, so U+2028 inside a string stays.
gzip and zstandard are known by their first bytes, whatever the name. Left out: what the text means (json_rows.py,
tables.py).
"""

import codecs
import contextlib
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from qlora_trainer.common.errors import DataError
from qlora_trainer.common.units import gibibytes

MAX_LINE_BYTES = 64 * 1024 * 1024
MAX_WHOLE_FILE_BYTES = 4 * 1024 * 1024 * 1024  # a plain text is one document and is read whole
PACKED_SUFFIXES = {".gz": "gzip", ".zst": "zstandard", ".zstd": "zstandard"}

_BLOCK_BYTES = 1 << 20
_LFS_HEADER = b"version https://git-lfs.github.com/spec/"
_UTF8_MARK = b"\xef\xbb\xbf"
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstandard"}
_OTHER_KINDS = {
    rb"PK\x03\x04": "is a zip archive or an Excel workbook; unpack it, or save the sheet as CSV",
    rb"BZh[1-9]1AY&SY": "is compressed with bzip2; unpack it with bunzip2, or pack it with gzip or zstandard",
    rb"\xfd7zXZ\x00": "is compressed with xz; unpack it with unxz, or pack it with gzip or zstandard",
    rb"PAR1": "is a Parquet file; give it the ending .parquet",
    rb"(\xff\xfe\x00\x00|\x00\x00\xfe\xff)": "is UTF-32 text; name that: data.encoding utf-32",
    rb"(\xff\xfe|\xfe\xff)": "is UTF-16 text; name that: data.encoding utf-16",
    rb"[^\x00]\x00[^\x00]\x00": "is UTF-16 text, by its zero bytes; name that: data.encoding utf-16-le",
    rb"\x00[^\x00]\x00[^\x00]": "is UTF-16 text, by its zero bytes; name that: data.encoding utf-16-be",
}


class Line(NamedTuple):
    """Hold one line without its newline. With `error`, `text` has replacement characters where bytes are no text."""

    number: int  # from 1
    start: int | None  # bytes before it in the unpacked file; None where the encoding hides that
    text: str
    error: DataError | None = None


def content_suffix(path: Path) -> str:
    """Find the ending that says what a file holds, a compression's left aside: .jsonl for rows.jsonl.gz.

    Args:
        path: the file.

    Returns:
        The ending in lower case, with its dot.
    """
    if path.suffix.lower() in PACKED_SUFFIXES:
        path = path.with_suffix("")
    return path.suffix.lower()


def open_bytes(path: Path, encoding: str | None = None) -> "io.BufferedReader[Any]":
    """Open a text file as bytes, unpacked.

    While they are read, a DataError says that compressed data is broken or cut off.

    Args:
        path: the file.
        encoding: that its text should have; None for UTF-8.

    Returns:
        The unpacked bytes.

    Raises:
        DataError: a git-lfs pointer, an archive, or another encoding than the one named.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        head = file.peek(len(_LFS_HEADER))
        _check_is_no_pointer(path, head)
        packing = next((name for mark, name in _PACKED.items() if head.startswith(mark)), None)
        named = PACKED_SUFFIXES.get(path.suffix.lower())
        if named and named != packing:
            raise DataError(
                f"{path} is called {path.suffix}, but holds {packing or 'no ' + named} data: it begins {head[:8]!r}. "
                "Was it unpacked already, or the download broken off? Rename it, or fetch it again."
            )
        stream: io.BufferedReader[Any] = file
        if packing:
            stream = io.BufferedReader(_Unpacking(path, file, packing), _BLOCK_BYTES)
            if any(stream.peek(4).startswith(mark) for mark in _PACKED):
                raise DataError(f"{path} is compressed twice; unpack it once.")
        _check_is_text(path, stream.peek(16), encoding)
        stack.pop_all()
    return stream


def check_is_fetched(path: Path) -> None:
    """Refuse a git-lfs pointer, for readers of other than text; it is a DataError.

    Args:
        path: the file.
    """
    with path.open("rb") as file:
        _check_is_no_pointer(path, file.peek(len(_LFS_HEADER)))


def _check_is_no_pointer(path: Path, head: bytes) -> None:
    if head.startswith(_LFS_HEADER):
        raise DataError(f"{path} is a git-lfs pointer, not the data itself. Fetch it: git lfs pull")


def _check_is_text(path: Path, head: bytes, encoding: str | None) -> None:
    for pattern, meaning in _OTHER_KINDS.items():
        is_expected = "data.encoding" in meaning and _is_wide(encoding)
        if re.match(pattern, head, re.DOTALL) and not is_expected:
            raise DataError(f"{path} {meaning}.")


def _is_wide(encoding: str | None) -> bool:
    """Return True if a newline is more than its one byte, as in UTF-16."""
    return "\n".encode(encoding or "utf-8") != b"\n"


class _Unpacking(io.RawIOBase):
    """Read what comes out of a compressed file; the error where that fails says how far it went.

    Args:
        path: for errors.
        file: the compressed bytes.
        packing: gzip or zstandard.
    """

    def __init__(self, path: Path, file: BinaryIO, packing: str) -> None:
        self._path, self._file, self._packing = path, file, packing
        self._done = 0
        self._stream: Any
        if packing == "gzip":
            self._stream = gzip.GzipFile(fileobj=file)
        else:
            import pyarrow

            self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")

    def readable(self) -> bool:
        """Return True: this is how io finds that it may read.

        Returns:
            True.
        """
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with unpacked bytes.

        Args:
            buffer: what to fill.

        Returns:
            How many bytes; 0 at the end.

        Raises:
            DataError: the compressed data is broken or cut off.
        """
        try:
            data = self._stream.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{self._path}: the {self._packing} data is broken or cut off near byte {self._file.tell()} of the "
                f"file, after {self._done} unpacked bytes ({error}). Fetch or pack it again."
            ) from error
        buffer[: len(data)] = data
        self._done += len(data)
        return len(data)

    def close(self) -> None:
        """Close the file too."""
        self._file.close()
        super().close()


def lines(path: Path, encoding: str | None = None) -> Iterator[Line]:
    """Read a file's lines; a carriage return at the end of one is white space to all readers.

    Of an encoding in which a newline is more than one byte, the file ends where a line is not of the encoding.

    Args:
        path: the file.
        encoding: as Python names it; None for UTF-8.

    Yields:
        Each line; one that is not of the encoding with an error.

    Raises:
        DataError: `open_bytes` or `blocks` fails, or a line is longer than 64 MiB.
    """
    if _is_wide(encoding):
        yield from _lines_of_blocks(path, encoding)
        return
    start = 0
    with open_bytes(path, encoding) as file:
        for number in range(1, 1 << 62):
            raw = file.readline(MAX_LINE_BYTES + 1)
            if not raw:
                return
            if len(raw) > MAX_LINE_BYTES:
                raise DataError(_too_long(path, number))
            body = raw.removesuffix(b"\n")
            try:
                text = body.decode(encoding or "utf-8")
                without_mark = text.removeprefix("\ufeff") if number == 1 else text
                mark = len(_UTF8_MARK) if without_mark != text else 0
                yield Line(number, start + mark, without_mark)
            except UnicodeDecodeError as error:
                wrong = _not_text(path, f"line {number}", start + error.start, body[error.start], encoding)
                yield Line(number, start, body.decode("ascii", "replace"), DataError(wrong))
            start += len(raw)


def _lines_of_blocks(path: Path, encoding: str | None) -> Iterator[Line]:
    number, rest = 0, ""
    for block in blocks(path, encoding):
        *ready, rest = (rest + block).split("\n")
        for line in ready:
            number += 1
            yield Line(number, None, line)
        if len(rest) > MAX_LINE_BYTES:
            raise DataError(_too_long(path, number + 1))
    if rest:
        yield Line(number + 1, None, rest)


def blocks(path: Path, encoding: str | None = None) -> Iterator[str]:
    """Read a file's text in blocks of about a MiB, without a byte-order mark.

    Args:
        path: the file.
        encoding: as Python names it; None for UTF-8.

    Yields:
        Text that is not empty.

    Raises:
        DataError: `open_bytes` fails, or bytes are not of the encoding, with line and byte.
    """
    decoder = codecs.getincrementaldecoder(encoding or "utf-8")()
    first, line, done = True, 1, 0
    with open_bytes(path, encoding) as file:
        while True:
            raw = file.read(_BLOCK_BYTES)
            begin = done - len(decoder.getstate()[0])  # the last block may have ended within a character
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].decode(encoding or "utf-8", "replace").count("\n")
                at, byte = begin + error.start, error.object[error.start]
                raise DataError(_not_text(path, f"line {line}", at, byte, encoding)) from error
            except UnicodeError as error:  # utf-16 and utf-32 alone: nothing says which byte of a character is first
                name = codecs.lookup(encoding or "utf-8").name
                raise DataError(
                    f"{path.name} has no byte-order mark, which {name} text begins with. Name {name}-le or {name}-be; "
                    "or, if it is UTF-8, leave data.encoding out."
                ) from error
            done += len(raw)
            line += text.count("\n")
            if first:
                text = text.removeprefix("\ufeff")
            if text:
                first = False
                yield text
            if not raw:
                return


def whole(path: Path, encoding: str | None = None) -> str:
    """Read a file's text at once.

    Args:
        path: the file.
        encoding: as Python names it; None for UTF-8.

    Returns:
        All of it.

    Raises:
        DataError: it is longer than 4 GiB of text, or `blocks` fails.
    """
    parts, size = [], 0
    for block in blocks(path, encoding):
        parts.append(block)
        size += len(block)
        if size > MAX_WHOLE_FILE_BYTES:
            raise DataError(
                f"{path} has more than {gibibytes(MAX_WHOLE_FILE_BYTES)} of text, and a {path.suffix} file is "
                'read whole, as one document. Make it JSONL with one document a line: {"text": ...}.'
            )
    return "".join(parts)


def _too_long(path: Path, number: int) -> str:
    return (
        f"{path.name}, line {number}: longer than {MAX_LINE_BYTES // 2**20} MiB. One row is one line in this kind of "
        "file; is it a JSON array? Then call it .json."
    )


def _not_text(path: Path, place: str, offset: int, byte: int, encoding: str | None) -> str:
    return (
        f"{path.name}, {place}: byte {offset} (0x{byte:02x}) is not {encoding or 'UTF-8'} text. If the file has "
        "another encoding, name it, such as data.encoding cp1252, or convert the file: iconv -f CP1252 -t UTF-8"
    )
