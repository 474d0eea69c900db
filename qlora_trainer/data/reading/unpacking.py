"""Open a data file as bytes, unpacked: gzip, bzip2, xz and zstandard are known by their first bytes, whatever the name.

Broken or cut compressed data is an error that says how far it went. Left out: archives of several files (archives.py),
and what the bytes mean (streams.py).
"""

import bz2
import contextlib
import gzip
import io
import lzma
import re
import zlib
from typing import Any, BinaryIO

from qlora_trainer.common.errors import LFS_HEADER, DataError
from qlora_trainer.common.units import counted
from qlora_trainer.data.reading.data_file import PACKED_SUFFIXES, DataFile

READ_BYTES = 1 << 20
_PACKED = {
    rb"\x1f\x8b": "gzip",
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": "bzip2",
    rb"\xfd7zXZ\x00": "xz",
    rb"\x28\xb5\x2f\xfd": "zstandard",
}


def open_unpacked(file: DataFile) -> "io.BufferedReader[Any]":
    """Open a file as bytes, unpacked where it is compressed.

    While they are read, a DataError says that compressed data is broken or cut off.

    Args:
        file: the file.

    Returns:
        The unpacked bytes.

    Raises:
        DataError: a git-lfs pointer, data compressed twice, or other data than the name says.
    """
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(file.path.open("rb"))
        head = raw.peek(len(LFS_HEADER))
        _check_is_no_pointer(file, head)
        packing = _packing(head)
        suffix = "." + str(file).lower().rpartition(".")[2]
        named = PACKED_SUFFIXES.get(suffix)
        if named and named != packing:
            raise DataError(
                f"{file} is called {suffix}, but holds {packing or 'no ' + named} data: it begins {head[:8]!r}. "
                "Was it unpacked already, or the download broken off? Rename it, or fetch it again."
            )
        stream: io.BufferedReader[Any] = raw
        if packing:
            stream = io.BufferedReader(_Unpacking(file, raw, packing), READ_BYTES)
            if _packing(stream.peek(16)):
                raise DataError(f"{file} is compressed twice; unpack it once.")
        stack.pop_all()
    return stream


def check_is_fetched(file: DataFile) -> None:
    """Refuse a git-lfs pointer, for readers of other than text; it is a DataError.

    Args:
        file: the file.
    """
    with file.path.open("rb") as opened:
        _check_is_no_pointer(file, opened.peek(len(LFS_HEADER)))


def _packing(head: bytes) -> str | None:
    return next((name for mark, name in _PACKED.items() if re.match(mark, head)), None)


def _check_is_no_pointer(file: DataFile, head: bytes) -> None:
    if head.startswith(LFS_HEADER):
        raise DataError(f"{file} is a git-lfs pointer, not the data itself. Fetch it: git lfs pull")


class _Unpacking(io.RawIOBase):
    """Read what comes out of a compressed file; the error where that fails says how far it went.

    Args:
        file: for errors.
        raw: the compressed bytes.
        packing: a value of PACKED_SUFFIXES.
    """

    def __init__(self, file: DataFile, raw: BinaryIO, packing: str) -> None:
        self._file, self._raw, self._packing = file, raw, packing
        self._done = 0
        self._stream: Any
        if packing == "gzip":
            self._stream = gzip.GzipFile(fileobj=raw)
        elif packing == "zstandard":
            import pyarrow

            self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        else:
            self._stream = _Joined(raw, packing)

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
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(
                f"{self._file}: the {self._packing} data is broken or cut off near byte {self._raw.tell()} of the "
                f"file, after {counted(self._done, 'unpacked byte')} ({error}). Fetch or pack it again."
            ) from error
        buffer[: len(data)] = data
        self._done += len(data)
        return len(data)

    def close(self) -> None:
        """Close the file too."""
        self._raw.close()
        super().close()


class _Joined:
    """Read bzip2 or xz data, one stream after another.

    Bytes after the last stream that begin no other are an error: BZ2File and LZMAFile would end there without a word.

    Args:
        raw: the compressed bytes.
        packing: bzip2 or xz.
    """

    def __init__(self, raw: BinaryIO, packing: str) -> None:
        self._raw, self._is_xz = raw, packing == "xz"
        self._decompressor = self._new()

    def _new(self) -> "bz2.BZ2Decompressor | lzma.LZMADecompressor":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ) if self._is_xz else bz2.BZ2Decompressor()

    def read(self, size: int) -> bytes:
        """Read unpacked bytes.

        Args:
            size: how many at most.

        Returns:
            Some; none at the end.

        Raises:
            EOFError: the file ends within a stream.
        """
        while True:
            data = b""
            if self._decompressor.eof:
                data = self._next_stream()
                if not data:
                    return b""
                self._decompressor = self._new()
            elif self._decompressor.needs_input:
                data = self._raw.read(READ_BYTES)
                if not data:
                    raise EOFError("the file ends too early")
            if unpacked := self._decompressor.decompress(data, size):
                return unpacked

    def _next_stream(self) -> bytes:
        data = self._decompressor.unused_data or self._raw.read(READ_BYTES)
        if self._is_xz:  # zero bytes may follow a stream
            while data and not data.strip(b"\0"):
                data = self._raw.read(READ_BYTES)
            data = data.lstrip(b"\0")
        return data
