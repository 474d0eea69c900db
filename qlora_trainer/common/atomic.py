"""Write output that is either whole or not there: new directories and small files, written aside and renamed.

A run that is killed, or a disk that fills up, must never leave a directory that looks finished. So work goes into a
temporary sibling, is flushed to the disk, and gets its name last. A kill leaves a hidden `.name.partial-…` directory,
which nothing reads; the next start of work on the same name removes it. What a living process works in is spared: it
holds a lock on its directory, which ends with it, however it ends. A directory that is replaced lies for a moment under
`.name.replaced`, from where it comes back if the process is killed just then.

Where a file system or operating system has no such locks, what was left stays, and may be deleted by hand.
"""

import contextlib
import errno
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qlora_trainer.common.errors import DiskError, OutputExistsError, QLoRATrainerError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

DISK_FAILURES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})

_ADVICE = {
    errno.ENOSPC: "Free some space or choose another disk",
    errno.EDQUOT: "Free some space or choose another disk",
    errno.EFBIG: "The disk takes no file of that size: choose smaller shards, or another disk",
}


@contextlib.contextmanager
def new_directory(path: Path, *, replaces: bool = False) -> Iterator[Path]:
    """Work in a temporary sibling of `path`, which becomes `path` when the block ends well, and vanishes otherwise.

    Args:
        path: of the directory to be.
        replaces: a directory that is there already goes when the new one is whole; else it must be empty.

    Yields:
        The directory to work in.

    Raises:
        OutputExistsError: `path` is a file, or a directory that is not empty and is not to be replaced.
        DiskError: the disk is full or cannot be written.
    """
    path = real_path(path)
    _refuse(path, replaces)
    remove_leftovers(path)
    with disk_errors(path.parent):
        work, lock = _make_locked(path)
    try:
        with disk_errors(path.parent, DISK_FAILURES):
            yield work
        with disk_errors(path.parent):
            sync_tree(work)
            _refuse(path, replaces)
            _take_place(work, path, replaces)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _refuse(path: Path, replaces: bool) -> None:
    """Raise OutputExistsError where a new directory may not take this place."""
    if not (replaces and path.is_dir()):
        refuse_existing(path)


def _take_place(work: Path, path: Path, replaces: bool) -> None:
    """Give a directory its name; what it replaces lies under `replaced_path` for a moment."""
    aside = replaced_path(path)
    if replaces and path.exists():
        path.rename(aside)
    elif path.exists():
        path.rmdir()
    work.rename(path)
    _sync_directory(path.parent)
    if replaces and aside.exists():
        shutil.rmtree(aside)


def replaced_path(path: Path) -> Path:
    """Return where a directory lies while another takes its place: after a kill at that moment it is only there."""
    return path.with_name(f".{path.name}.replaced")


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes have left of their work on `path`; what a living one works in stays.

    A directory that was to be replaced, and was not, gets its name back.

    Args:
        path: of the directory that was worked on.
    """
    path = real_path(path)
    _remove_leftovers(path.parent, glob.escape(path.name))


def remove_leftovers_in(folder: Path) -> None:
    """Remove what killed processes have left of their work on any directory of a folder, as `remove_leftovers` does."""
    _remove_leftovers(real_path(folder), "*")


def _remove_leftovers(folder: Path, pattern: str) -> None:
    for left in folder.glob(f".{pattern}.partial-*"):
        with contextlib.suppress(OSError):  # a living process works in it, another was as quick, or it is not ours
            lock = _lock(left)
            if lock is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
    for aside in folder.glob(f".{pattern}.replaced"):
        path = folder / aside.name.removeprefix(".").removesuffix(".replaced")
        with disk_errors(folder):
            if path.exists():
                shutil.rmtree(aside)
            else:
                aside.rename(path)


def _make_locked(path: Path) -> tuple[Path, int | None]:
    """A new sibling of `path` to work in, and the descriptor that locks it, None where there are no locks."""
    while True:
        work = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
        work.mkdir(parents=True)
        try:
            lock = _lock(work)
        except (BlockingIOError, FileNotFoundError):
            continue  # before it was locked, another process took it for a leftover
        except OSError:
            shutil.rmtree(work, ignore_errors=True)
            raise
        if work.exists():
            return work, lock
        if lock is not None:
            os.close(lock)


def _lock(directory: Path) -> int | None:
    """A descriptor that locks the directory until it is closed, or None where there are no locks.

    Raises:
        BlockingIOError: a living process holds the lock.
        FileNotFoundError: the directory has gone.
    """
    if fcntl is None:
        return None
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None  # such as a file system over the network
    return descriptor


def real_path(path: Path) -> Path:
    """Where `path` leads, from the user's home or through links; it need not exist."""
    return path.expanduser().resolve()


def refuse_existing(path: Path) -> None:
    """OutputExistsError if `path` is anything but missing or an empty directory."""
    path = real_path(path)
    if path.is_dir():
        if any(path.iterdir()):
            raise OutputExistsError(f"{path} exists and is not empty. Choose a new directory, or empty that one.")
    elif path.exists():
        raise OutputExistsError(f"{path} is a file. Choose a new directory.")


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, flush it to the disk, and rename it; DiskError where that fails.

    Half a surrogate pair, such as in a column's name, is written as an escape.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with disk_errors(path.parent):
        try:
            with temporary.open("x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(
    directory: Path,
    failures: frozenset[int] | None = None,  # error numbers; None for all
) -> Iterator[None]:
    """Turn the system's errors of writing into a DiskError; errors that are characters already pass."""
    try:
        yield
    except OSError as error:
        if isinstance(error, QLoRATrainerError) or (failures is not None and error.errno not in failures):
            raise
        advice = _ADVICE.get(error.errno or 0, "Check the path and its permissions")
        raise DiskError(f"Writing in {directory} failed: {error}. {advice}; nothing half-made is left.") from error


def nearest_existing(path: Path) -> Path:
    """Return `path`, or the closest folder above it that is there; a file where a folder should be is one too."""
    path = path.absolute()
    return next((parent for parent in (path, *path.parents) if parent.exists()), Path(path.anchor))


def unwritable(directory: Path) -> str:
    """Return why a folder, which may be yet to be made, cannot be written; "" where it can.

    It is tried: rights do not tell of read-only disks, nor root of anything.
    """
    try:
        with tempfile.TemporaryDirectory(dir=nearest_existing(directory)):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def refuse_unwritable(directory: Path, variable: str) -> None:
    """Raise DiskError where a cache cannot be written; `variable` is that of the environment which moves it."""
    if reason := unwritable(directory):
        raise DiskError(f"{directory} cannot be written: {reason}. Set {variable} to a folder that can be.")


def sync_tree(directory: Path) -> None:
    """Flush all below a directory: after a power cut a file could else have its length and not its content."""
    for parent, _, files in os.walk(directory):
        for name in files:
            with (Path(parent) / name).open("rb") as file:
                os.fsync(file.fileno())
        _sync_directory(Path(parent))


def _sync_directory(directory: Path) -> None:
    """Make the names in a directory durable; not every system can, and losing power then loses only the rename."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in DISK_FAILURES:
            raise
