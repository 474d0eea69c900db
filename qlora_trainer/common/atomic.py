"""Write output that is either complete or absent: new directories and small files, renamed when whole.

A run that is killed, or a disk that fills up, must never leave a directory that looks finished. So work goes into a
temporary sibling, is flushed to the disk, and gets its name last. A kill leaves a hidden `.name.partial-…` directory,
which nothing reads; the next start of work on the same name removes it. The directory of a process that still runs is
kept: the process holds a lock on it, which ends with the process, however it ends. A directory that is replaced is
kept as `.name.replaced` until the new one has its name, and gets its name back if the process is killed just then.

Where a file system or operating system has no such locks, what was left is kept, and may be deleted by hand.
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

from qlora_trainer.common.command_line import command_line
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
    """Write in a temporary sibling of `path`, which becomes `path` when the block ends well, and is removed otherwise.

    A `path` that is a file, or a directory that is not empty and not to be replaced, raises OutputExistsError; a disk
    that is full or cannot be written raises DiskError.

    Args:
        path: of the directory; its parents are made at need.
        replaces: a directory that exists is deleted once the new one has its name.

    Yields:
        The temporary directory, empty.
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
    """Give a directory its name, and delete the one that it replaces."""
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
    """Return the name of a directory while another replaces it; after a kill at that moment it has no other.

    Args:
        path: of the directory.

    Returns:
        The path of a sibling.
    """
    return path.with_name(f".{path.name}.replaced")


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes have left of their work on `path`; the directory of one that still runs is kept.

    A directory that was being replaced gets its name back where the new one has not got it.

    Args:
        path: as `new_directory` takes it.
    """
    path = real_path(path)
    _remove_leftovers(path.parent, glob.escape(path.name))


def remove_leftovers_in(folder: Path) -> None:
    """Remove what killed processes have left of their work on any directory of a folder, as `remove_leftovers` does.

    Args:
        folder: that the directories are in.
    """
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
    """Make a new sibling of `path` to work in, and return it with the descriptor that locks it, None without locks."""
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
    """Open a descriptor that locks the directory until it is closed; return None where there are no locks.

    Raises:
        BlockingIOError: a process that still runs holds the lock.
        FileNotFoundError: the directory is gone.
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
    """Return the path that `path` leads to, from the user's home or through links; it need not exist.

    Args:
        path: may begin with "~".

    Returns:
        The absolute path, without links.
    """
    return path.expanduser().resolve()


def refuse_existing(path: Path) -> None:
    """Refuse a path for output unless nothing is there, or an empty directory.

    Args:
        path: of the output.

    Raises:
        OutputExistsError: it is a file, or a directory that is not empty.
    """
    path = real_path(path)
    if path.is_dir():
        if any(path.iterdir()):
            message = (
                f"{path} exists and is not empty. Name another directory: --output, or training.output_dir of a run."
            )
            if (path / "checkpoints").is_dir():
                message += f" To continue the run in it: {command_line('resume', path)}"
            raise OutputExistsError(message)
    elif path.exists():
        raise OutputExistsError(f"{path} is a file. Name another directory.")


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, flush it to the disk, and rename it; DiskError where that fails.

    Args:
        path: of the file, which is replaced.
        text: its content, written as UTF-8. Half a surrogate pair, such as in a column's name, is written as an escape.
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
    """Turn the system's errors of writing in the block into a DiskError; an error of ours passes as it is.

    Args:
        directory: that is written in, for the message.
        failures: those to turn; others pass as they are.

    Raises:
        DiskError: writing failed.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, QLoRATrainerError) or (failures is not None and error.errno not in failures):
            raise
        advice = _ADVICE.get(error.errno or 0, "Check the path and its permissions")
        raise DiskError(f"Writing in {directory} failed: {error}. {advice}; nothing half-made is left.") from error


def nearest_existing(path: Path) -> Path:
    """Return `path`, or the closest folder above it that exists; a file in the place of a folder counts as one.

    Args:
        path: may be relative.

    Returns:
        The absolute path of what exists.
    """
    path = path.absolute()
    return next((parent for parent in (path, *path.parents) if parent.exists()), Path(path.anchor))


def unwritable(directory: Path) -> str:
    """Return why a folder, which may not exist yet, cannot be written.

    A temporary folder is made to find out: permissions do not show a read-only disk, and do not hold for root.

    Args:
        directory: the folder.

    Returns:
        The reason; "" where it can be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=nearest_existing(directory)):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def refuse_unwritable(directory: Path, variable: str) -> None:
    """Refuse a cache directory that cannot be written.

    Args:
        directory: of the cache.
        variable: of the environment that moves it, named in the message.

    Raises:
        DiskError: it cannot be written.
    """
    if reason := unwritable(directory):
        raise DiskError(f"{directory} cannot be written: {reason}. Set {variable} to a writable folder.")


def sync_tree(directory: Path) -> None:
    """Flush all files below a directory: after a power cut a file could otherwise have its length and not its content.

    Args:
        directory: with all below it.
    """
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
