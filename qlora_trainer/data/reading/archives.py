"""Read the files of a zip or tar archive, one after another; a tar may be compressed.

Each is written to a temporary file, one at a time, and then read as any other file: so every kind can be read, and a
compressed tar needs one pass. Refused are archives whose entries lead out of them or are encrypted, links, archives
inside, and such as unpack to more than their size can mean. Left out: which entries are meant (locations.py).
"""

import contextlib
import errno
import io
import lzma
import shlex
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Generator, Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, NamedTuple, cast

from qlora_trainer.common.errors import DataError, DiskError, first_line
from qlora_trainer.common.file_identity import FileIdentity
from qlora_trainer.common.units import gibibytes
from qlora_trainer.config.override import override
from qlora_trainer.data.reading.data_file import DataFile, is_archive, kind_of
from qlora_trainer.data.reading.unpacking import check_is_fetched, open_unpacked

_LARGEST_RATIO = 200  # of unpacked to packed bytes; text is seldom beyond 20
_SMALL_BYTES = 1 << 30  # what unpacks to less is taken at any ratio
_BLOCK_BYTES = 1 << 20
_LEADS_OUT = "leads out of it"
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, UnicodeDecodeError)
_NOT_OF_THE_DISK = (None, errno.EINVAL)  # broken bzip2 data; a place before the file's beginning
_TAR_END = bytes(2 * tarfile.BLOCKSIZE)


class Member(NamedTuple):
    """Describe one file of an archive."""

    name: str
    size: int  # unpacked bytes
    fault: str  # why it may not be read; "" where it may
    open: Any  # () -> a stream of its bytes; valid until the next member


def member_names(path: Path) -> tuple[str, ...]:
    """List the files of an archive, in its order; once, as long as it does not change: a tar is read for it as a whole.

    Args:
        path: the archive.

    Returns:
        Their names.

    Raises:
        DataError: it cannot be read, or may not be, see above.
    """
    return _names(path, FileIdentity.of(path))


@lru_cache(maxsize=64)
def _names(path: Path, identity: FileIdentity) -> tuple[str, ...]:
    names: dict[str, None] = {}
    unpacked = 0
    for member in _members(path):
        unpacked += member.size
        if unpacked > max(_SMALL_BYTES, _LARGEST_RATIO * identity.size):
            raise DataError(
                f"{path} unpacks to {gibibytes(unpacked)} or more, over {_LARGEST_RATIO} times its size, as archives "
                "do that are made to fill a disk. If you trust it, unpack it and name the folder."
            )
        fault = member.fault or (f"{member.name} is in it twice" if member.name in names else "")
        if fault:
            raise DataError(f"{path} cannot be read as it is: {fault}. {_way_out(path, fault)}")
        names[member.name] = None
    return tuple(names)


def unpacked_members(path: Path, names: set[str]) -> Iterator[tuple[str, Path]]:
    """Unpack some files of an archive, one at a time.

    Args:
        path: the archive.
        names: of `member_names`.

    Yields:
        Each with the temporary file that holds it until the next one.

    Raises:
        DataError: the archive cannot be read.
        DiskError: there is no space for a file of it.
    """
    for member in _members(path):
        if member.name not in names:
            continue
        with tempfile.NamedTemporaryFile(prefix="qlora-rows-") as copy:
            if shutil.disk_usage(tempfile.gettempdir()).free < member.size:
                raise DiskError(
                    f"{path}: {member.name} needs {gibibytes(member.size)} in {tempfile.gettempdir()}, more than is "
                    "free there, while it is read. Set TMPDIR to another folder, or unpack the archive."
                )
            with _reading(path, member.name), member.open() as stream:
                shutil.copyfileobj(stream, copy, _BLOCK_BYTES)
                copy.flush()
            yield member.name, Path(copy.name)


def _way_out(path: Path, fault: str) -> str:
    if _LEADS_OUT in fault:
        return "Pack it again without such names."
    folder = path.with_suffix("").with_suffix("")
    old, new = shlex.quote(str(path)), shlex.quote(str(folder))
    unpack = f"unzip {old} -d {new}" if path.suffix.lower() == ".zip" else f"mkdir {new} && tar -xf {old} -C {new}"
    return f"Unpack it: {unpack}\nThen: {override('data.train', str(folder))}"


@contextlib.contextmanager
def _reading(path: Path, name: str = "") -> Iterator[None]:
    """Turn what the standard library raises while an archive, or a file of it, is read into our error."""
    where = f"{path}, {name}" if name else str(path)
    try:
        yield
    except NotImplementedError as error:
        fault = f"it is packed in a way that is not supported here ({first_line(error)})"
        raise DataError(f"{where}: {fault}. {_way_out(path, fault)}") from error
    except (*_BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NOT_OF_THE_DISK:
            raise
        raise DataError(
            f"{where}: the archive is broken or cut off ({first_line(error)}). Fetch or pack it again."
        ) from error


def _members(path: Path) -> Iterator[Member]:
    reader = _zip_members if path.suffix.lower() == ".zip" else _tar_members
    with contextlib.closing(reader(path)) as members, _reading(path):
        yield from members


def _zip_members(path: Path) -> Generator[Member, None, None]:
    check_is_fetched(DataFile(path))
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            is_link = stat.S_ISLNK(info.external_attr >> 16)
            fault = f"{info.filename} is encrypted" if info.flag_bits & 1 else _fault(info.filename, is_link)
            yield Member(info.filename, info.file_size, fault, lambda info=info: archive.open(info))


def _tar_members(path: Path) -> Generator[Member, None, None]:
    with open_unpacked(DataFile(path)) as stream:
        watched = _Watched(stream)
        with tarfile.open(fileobj=cast(IO[bytes], watched), mode="r|") as archive:
            for info in archive:
                if info.isdir():
                    continue
                fault = _fault(info.name, not info.isreg() or info.issparse())
                yield Member(info.name, info.size, fault, lambda info=info: archive.extractfile(info) or io.BytesIO())
        while watched.read(_BLOCK_BYTES):
            pass
        if watched.last != _TAR_END:  # tarfile takes a file that is cut between two members for a whole one
            raise EOFError("the end mark of the tar file is missing")


class _Watched:
    """Read a stream for tarfile, and keep the last bytes of it.

    Args:
        stream: a tar file.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.last = b""

    def read(self, size: int) -> bytes:
        """Read on.

        Args:
            size: how many bytes at most.

        Returns:
            Some bytes; none at the end.
        """
        data = self._stream.read(size)
        self.last = (self.last + data)[-len(_TAR_END) :]
        return data


def _fault(name: str, is_special: bool) -> str:
    """Say why a member may not be read; members that hold no rows may be anything but a way out of the archive."""
    windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        return f"the name {name!r} {_LEADS_OUT}"
    if is_archive(PurePosixPath(name)):
        return f"{name} is an archive in it"
    return f"{name} is a link or no plain file" if is_special and kind_of(PurePosixPath(name)) else ""
