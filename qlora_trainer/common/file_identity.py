"""Hash a file; find out without reading it if it is the one that was seen before; remember what was found in it.

A file of many gigabytes is then hashed once, and not at every start. A record is used again only where each file's
path, size, inode and times are those it had, and only if the file had been unchanged for longer than a tick of a file
system's clock when it was read: a file that changes twice within one tick keeps its time. Records are small files,
written whole, so processes that run at the same time do no harm.

Left out: a file that changes while its times do not, as where a disk fails. To find that, read the file again.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from qlora_trainer.common.atomic import write_text

CLOCK_TICK_NS = 2_000_000_000  # FAT's, the coarsest in use
_BLOCK_BYTES = 2**20


def file_sha256(path: Path, each_block: Callable[[bytes], object] | None = None) -> str:
    """Hash a file's content.

    A file that cannot be read raises OSError.

    Args:
        path: the file.
        each_block: called with each piece of the content, in order, such as to count lines or report progress.

    Returns:
        The sha256 in hexadecimal.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            if each_block is not None:
                each_block(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class FileIdentity:
    """Hold what shows that a file is the same, and was not changed."""

    path: str  # absolute
    size: int  # bytes
    mtime_ns: int
    ctime_ns: int  # moves even where a tool puts the time of modification back
    inode: int
    device: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Take the identity of a file as it is now.

        A file that does not exist raises OSError.

        Args:
            path: the file; through a link, that of the file it leads to.

        Returns:
            Its identity.
        """
        path = path.absolute()
        found = path.stat()
        return cls(str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)

    def is_current(self) -> bool:
        """Compare the file as it is now with this identity.

        Returns:
            True if it is the same and unchanged; False also where it is gone.
        """
        try:
            return FileIdentity.of(Path(self.path)) == self
        except OSError:
            return False

    def is_still(self, at_ns: int) -> bool:
        """Check that the file had been unchanged for longer than a tick of the clock.

        Args:
            at_ns: the time in question, by time.time_ns().

        Returns:
            True if it had.
        """
        return max(self.mtime_ns, self.ctime_ns) < at_ns - CLOCK_TICK_NS


class FileRecords:
    """Keep records in a directory, each on what was found in some files.

    Args:
        directory: made at need.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def find(self, subject: str, files: Sequence[FileIdentity]) -> Any:
        """Return what was kept of a subject, while its files are the same.

        Args:
            subject: what the record is on, such as a path and what was asked.
            files: as they are now.

        Returns:
            What `keep` was given; None where it was never kept, is damaged, or is of other files.
        """
        try:
            record = json.loads(self._path(subject).read_text(encoding="utf-8"))
            is_same = record["subject"] == subject and record["files"] == [asdict(file) for file in files]
            return record["content"] if is_same else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def keep(self, subject: str, files: Sequence[FileIdentity], content: Any, began_ns: int) -> None:
        """Remember what was found, if the files have not changed since and were still before; else do nothing.

        Args:
            subject: as for `find`.
            files: as they were before they were read.
            content: of JSON's types.
            began_ns: when reading began, by time.time_ns().
        """
        if not all(file.is_still(began_ns) and file.is_current() for file in files):
            return
        record = {"subject": subject, "files": [asdict(file) for file in files], "content": content}
        with contextlib.suppress(OSError):  # not remembering costs time, nothing else
            self.directory.mkdir(parents=True, exist_ok=True)
            write_text(self._path(subject), json.dumps(record))

    def forget(self, subject: str) -> None:
        """Remove what was kept of a subject.

        Args:
            subject: as for `find`.
        """
        with contextlib.suppress(OSError):
            self._path(subject).unlink()

    def _path(self, subject: str) -> Path:
        return self.directory / f"{hashlib.sha256(subject.encode(errors='surrogatepass')).hexdigest()[:32]}.json"
