"""Read a data file as text: unpacked, decoded, and in lines, with the byte where that fails.

Text is UTF-8, with or without a byte-order mark, unless another encoding is named; nothing is guessed, as a wrong guess
would train on wrong characters. Lines end at a newline character and nowhere else, so U+2028 inside a string stays.
Left out: compression (unpacking.py), what is wrong with an encoding (encodings.py), and what the text means
(json_rows.py, tables.py).
"""

import codecs
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora_trainer.common.errors import DataError
from qlora_trainer.common.units import gibibytes
from qlora_trainer.data.reading.data_file import DataFile
from qlora_trainer.data.reading.encodings import EncodingCheck, is_wide, not_text, survey
from qlora_trainer.data.reading.unpacking import READ_BYTES, open_unpacked

if TYPE_CHECKING:
    import io

MAX_LINE_BYTES = 64 * 1024 * 1024
MAX_WHOLE_FILE_BYTES = 4 * 1024 * 1024 * 1024  # a plain text is one document and is read whole
_UNDECODED = re.compile("[\udc80-\udcff]")  # bytes of a block that are no text
_UTF8_MARK = b"\xef\xbb\xbf"
_OTHER_KINDS = {
    rb"PK(\x03\x04|\x05\x06)": "is a zip archive or an Excel workbook; give it the ending .zip or .xlsx",
    rb"PAR1": "is a Parquet file; give it the ending .parquet",
    rb"ARROW1": "is an Arrow file; give it the ending .arrow",
    rb"SQLite format 3\x00": "is a SQLite database; export a table of it as CSV",
    rb"%PDF-": "is a PDF document; take the text out of it",
    rb"(\xff\xfe\x00\x00|\x00\x00\xfe\xff)": "is UTF-32 text; name that: data.encoding=utf-32",
    rb"(\xff\xfe|\xfe\xff)": "is UTF-16 text; name that: data.encoding=utf-16",
    rb"[^\x00]\x00[^\x00]\x00": "is UTF-16 text, by its zero bytes; name that: data.encoding=utf-16-le",
    rb"\x00[^\x00]\x00[^\x00]": "is UTF-16 text, by its zero bytes; name that: data.encoding=utf-16-be",
}
_MARKUP = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|\?xml|!--|error)\b", re.IGNORECASE)


class Line(NamedTuple):
    """Hold one line without its newline. With `error`, `text` has replacement characters where bytes are no text."""

    number: int  # from 1
    start: int | None  # bytes before it in the unpacked file; None where the encoding hides that
    text: str
    error: DataError | None = None


def open_text(file: DataFile) -> "io.BufferedReader[Any]":
    """Open a text file as bytes, unpacked.

    Args:
        file: the file.

    Returns:
        The unpacked bytes.

    Raises:
        DataError: `open_unpacked` fails; another kind of file, a web page, or another encoding than the one named.
    """
    stream = open_unpacked(file)
    try:
        _check_is_text(file, stream.peek(512)[:512])
    except DataError:
        stream.close()
        raise
    return stream


def _check_is_text(file: DataFile, head: bytes) -> None:
    for pattern, meaning in _OTHER_KINDS.items():
        is_expected = "data.encoding" in meaning and is_wide(file.encoding)
        if re.match(pattern, head, re.DOTALL) and not is_expected:
            raise DataError(f"{file} {meaning}.")
    if _MARKUP.match(head) and not file.is_document:
        as_text = " To train on it as plain text: data.format=text" if file.suffix == ".txt" else ""
        raise DataError(
            f"{file} is a web page or XML, not rows: it begins {head[:40].decode('utf-8', 'replace')!r}. A download "
            f"may have given the page about a file, or an error, in place of the file. Fetch the file itself.{as_text}"
        )


def lines(file: DataFile) -> Iterator[Line]:
    """Read a file's lines; a carriage return at the end of one is white space to all readers.

    Of an encoding in which a newline is more than one byte, the file ends where a line is not of the encoding.

    Args:
        file: the file.

    Yields:
        Each line; one that is not of the encoding with an error.

    Raises:
        DataError: `open_text` or `blocks` fails, or a line is longer than 64 MiB.
    """
    encoding = file.encoding
    if is_wide(encoding):
        yield from _lines_of_blocks(file)
        return
    start = 0
    check = EncodingCheck(file) if encoding else None
    with open_text(file) as stream:
        for number in range(1, 1 << 62):
            raw = stream.readline(MAX_LINE_BYTES + 1)
            if not raw:
                break
            if len(raw) > MAX_LINE_BYTES:
                raise DataError(_too_long(file, number))
            if check:
                check.look(raw)
            body = raw.removesuffix(b"\n")
            try:
                text = body.decode(encoding or "utf-8")
                without_mark = text.removeprefix("\ufeff") if number == 1 else text
                mark = len(_UTF8_MARK) if without_mark != text else 0
                yield Line(number, start + mark, without_mark)
            except UnicodeDecodeError as error:
                byte = body[error.start]
                wrong = not_text(file, f"line {number}", start + error.start, byte, survey(file))
                yield Line(number, start, body.decode("ascii", "replace"), DataError(wrong))
            start += len(raw)
    if check:
        check.finish()


def _lines_of_blocks(file: DataFile) -> Iterator[Line]:
    number, rest = 0, ""
    for block in blocks(file):
        *ready, rest = (rest + block).split("\n")
        for line in ready:
            number += 1
            yield Line(number, None, line)
        if len(rest) > MAX_LINE_BYTES:
            raise DataError(_too_long(file, number + 1))
    if rest:
        yield Line(number + 1, None, rest)


def blocks(file: DataFile, keep_undecoded: bool = False) -> Iterator[str]:
    """Read a file's text in blocks of about a MiB, without a byte-order mark.

    Args:
        file: the file.
        keep_undecoded: whether bytes that are not of the encoding come as lone surrogates, for
            `undecoded_error`, where a newline is one byte; else they are an error.

    Yields:
        Text that is not empty.

    Raises:
        DataError: `open_text` fails, or bytes are not of the encoding, with line and byte.
    """
    encoding = file.encoding or "utf-8"
    decoder = codecs.getincrementaldecoder(encoding)(
        "surrogateescape" if keep_undecoded and not is_wide(encoding) else "strict"
    )
    check = EncodingCheck(file) if file.encoding and not is_wide(encoding) else None
    first, line, done = True, 1, 0
    with open_text(file) as stream:
        while True:
            raw = stream.read(READ_BYTES)
            begin = done - len(decoder.getstate()[0])  # the last block may have ended within a character
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].decode(encoding, "replace").count("\n")
                at, byte = begin + error.start, error.object[error.start]
                found = None if is_wide(encoding) else survey(file)
                raise DataError(not_text(file, f"line {line}", at, byte, found)) from error
            except UnicodeError as error:  # utf-16 and utf-32 alone: nothing says which byte of a character is first
                name = codecs.lookup(encoding).name
                raise DataError(
                    f"{file} has no byte-order mark, which {name} text begins with. Name {name}-le or {name}-be; "
                    "or, if it is UTF-8, leave data.encoding out."
                ) from error
            done += len(raw)
            line += text.count("\n")
            if check:
                check.look(raw)
            if first:
                text = text.removeprefix("\ufeff")
            if text:
                first = False
                yield text
            if not raw:
                break
    if check:
        check.finish()


def is_whole_text(text: str) -> bool:
    """Return True if a text holds no lone surrogate, quickly.

    Args:
        text: from `blocks`.

    Returns:
        True if it is.
    """
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def undecoded_error(file: DataFile, place: str, text: str) -> DataError | None:
    """Make the error of a row that holds bytes which are no text.

    Args:
        file: the file.
        place: in it, such as "row 3".
        text: of the row, from `blocks` with `keep_undecoded`.

    Returns:
        The error; None where there are no such bytes.
    """
    wrong = _UNDECODED.search(text)
    return wrong and DataError(not_text(file, place, None, ord(wrong.group()) - 0xDC00, survey(file)))


def whole(file: DataFile) -> str:
    """Read a file's text at once.

    Args:
        file: the file.

    Returns:
        All of it.

    Raises:
        DataError: it is longer than 4 GiB of text, or `blocks` fails.
    """
    parts, size = [], 0
    for block in blocks(file):
        parts.append(block)
        size += len(block)
        if size > MAX_WHOLE_FILE_BYTES:
            raise DataError(
                f"{file} has more than {gibibytes(MAX_WHOLE_FILE_BYTES)} of text, and a {file.suffix} file is "
                'read whole, as one document. Make it JSONL with one document a line: {"text": ...}.'
            )
    return "".join(parts)


def _too_long(file: DataFile, number: int) -> str:
    return (
        f"{file.title}, line {number}: longer than {MAX_LINE_BYTES // 2**20} MiB. One row is one line in this kind of "
        f"file. If it is a JSON array or object: {file.renamed('.json')}"
    )
