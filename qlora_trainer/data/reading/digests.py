"""Find the digest of a data file's content, and remember it, so that a file of many gigabytes is hashed once.

When a remembered digest is believed again, common/file_identity.py says.
"""

import time
from dataclasses import asdict
from pathlib import Path

from qlora_trainer.common.file_identity import FileIdentity, FileRecords, file_sha256
from qlora_trainer.data.reading.files import Content


class FileDigests:
    """Digest the files of one preparation.

    Args:
        directory: remembers digests; made at need.
    """

    def __init__(self, directory: Path) -> None:
        self.records = FileRecords(directory)
        self._taken: dict[Path, tuple[FileIdentity, Content]] = {}

    def content(self, path: Path) -> Content:
        """Find what is in a file, from memory where the file is known to be the same.

        Args:
            path: the file.

        Returns:
            Its digest and lines.
        """
        path = path.expanduser().absolute()
        before = FileIdentity.of(path)
        identity, content = self._taken.get(path, (None, None))
        if identity == before and content:
            return content
        content = _remembered(self.records.find(str(path), [before]))
        if content is None:
            began = time.time_ns()
            content = _read(path)
            self.records.keep(str(path), [before], asdict(content), began)
        self._taken[path] = before, content
        return content

    def changed(self) -> list[Path]:
        """List the files that are no longer what they were when `content` was asked for them.

        Returns:
            Their absolute paths.
        """
        return [path for path, (before, content) in self._taken.items() if not _is_same(path, before, content)]


def _is_same(path: Path, before: FileIdentity, content: Content) -> bool:
    now = time.time_ns()
    try:
        return before.is_current() and (before.is_still(now) or _read(path) == content)
    except OSError:
        return False


def _remembered(content: object) -> Content | None:
    """Return a record's content; None where there is none, or it is of another form."""
    try:
        return Content(**content) if isinstance(content, dict) else None
    except TypeError:
        return None


def _read(path: Path) -> Content:
    lines = 0

    def count(block: bytes) -> None:
        nonlocal lines
        lines += block.count(b"\n")

    return Content(file_sha256(path, count), lines)
