"""The digest of a file's content, remembered, so that a file of many gigabytes is hashed once and not at every start.

A digest is believed again only where the file's path, size, inode and times are those it was taken at, and only if the
file was still then for longer than a file system's clock may stop: a file that changes twice within one tick
keeps its time. What is remembered lies as one small file a path in the cache, so processes side by side harm nothing.
Leaves out: a file changed on purpose behind its times, as by writing to the disk itself.
"""

import contextlib
import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from qlora_trainer.common.atomic import write_text

CLOCK_TICK_NS = 2_000_000_000  # FAT's, the coarsest in use
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Content:
    """What was found in a file: its sha256 in hexadecimal, and how many newline characters it has."""

    sha256: str
    lines: int


class FileDigests:
    """Digests of the files of one preparation, through a memory in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._taken: dict[Path, tuple[dict[str, int], Content]] = {}

    def content(self, path: Path) -> Content:
        """The digest of a file, from memory where the file is known to be the same."""
        path = path.expanduser().absolute()
        entry = self.directory / f"{hashlib.sha256(str(path).encode(errors='surrogatepass')).hexdigest()[:32]}.json"
        before = _state(path)
        state, content = self._taken.get(path, (None, None))
        if state == before and content:
            return content
        content = _remembered(entry, path, before)
        if content is None:
            began = time.time_ns()
            content = _read(path)
            if _state(path) == before and _is_still(before, began):
                with contextlib.suppress(OSError):  # not remembering costs time, nothing else
                    self.directory.mkdir(parents=True, exist_ok=True)
                    write_text(entry, json.dumps({"path": str(path), "state": before, "content": asdict(content)}))
        self._taken[path] = before, content
        return content

    def changed(self) -> list[Path]:
        """The files that are no longer what they were when `content` was asked for them."""
        return [path for path, (before, content) in self._taken.items() if not _is_same(path, before, content)]


def _is_same(path: Path, before: dict[str, int], content: Content) -> bool:
    now = time.time_ns()
    try:
        state = _state(path)
        return state == before and (_is_still(state, now) or _read(path) == content)
    except OSError:
        return False


def _state(path: Path) -> dict[str, int]:
    """What tells that a file was touched. ctime_ns moves even where a tool puts the time of modification back."""
    stat = path.stat()
    return {
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
        "inode": stat.st_ino,
        "device": stat.st_dev,
    }


def _is_still(state: dict[str, int], at: int) -> bool:
    return max(state["mtime_ns"], state["ctime_ns"]) < at - CLOCK_TICK_NS


def _remembered(entry: Path, path: Path, state: dict[str, int]) -> Content | None:
    try:
        known = json.loads(entry.read_text(encoding="utf-8"))
        if known["path"] == str(path) and known["state"] == state:
            return Content(str(known["content"]["sha256"]), int(known["content"]["lines"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never taken, or damaged: taken again
    return None


def _read(path: Path) -> Content:
    digest, lines = hashlib.sha256(), 0
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            lines += block.count(b"\n")
    return Content(digest.hexdigest(), lines)
