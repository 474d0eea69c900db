"""Hash a file; tell without reading it whether it is the one that was seen before; remember what was found in it.

A file of many gigabytes is then hashed once, and not at every start. What is remembered is believed again only where
each file's path, size, inode and times are those it had, and only if the file was still then for longer than a file
system's clock may stop: a file that changes twice within one tick keeps its time. Records are small files, written
whole, so processes side by side harm nothing.

Left out: a file that changes behind its times, as where a disk fails. Who doubts it reads the file again.
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

    Args:
        path: the file.
        each_block: called with each piece of the content, in order, such as to count lines or report progress.

    Returns:
        The sha256 in hexadecimal.

    Raises:
        OSError: it cannot be read.
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
    """What says that a file is the same, and was not touched."""

    path: str  # absolute
    size: int  # bytes
    mtime_ns: int
    ctime_ns: int  # moves even where a tool puts the time of modification back
    inode: int
    device: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Look at a file as it is now.

        Args:
            path: the file; through a link, what it leads to is looked at.

        Returns:
            Its identity.

        Raises:
            OSError: it is not there.
        """
        path = path.absolute()
        found = path.stat()
        return cls(str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)

    def is_current(self) -> bool:
        """Return whether the file is still this one."""
        try:
            return FileIdentity.of(Path(self.path)) == self
        except OSError:
            return False

    def is_still(self, at_ns: int) -> bool:
        """Return whether the file had not been touched for longer than a clock's tick at a time, in nanoseconds."""
        return max(self.mtime_ns, self.ctime_ns) < at_ns - CLOCK_TICK_NS


class FileRecords:
    """Records in a directory, each on what was found in some files."""

    def __init__(self, directory: Path) -> None:
        """Keep the records in `directory`, which is made at need."""
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
        """Remove what was kept of a subject."""
        with contextlib.suppress(OSError):
            self._path(subject).unlink()

    def _path(self, subject: str) -> Path:
        return self.directory / f"{hashlib.sha256(subject.encode(errors='surrogatepass')).hexdigest()[:32]}.json"
