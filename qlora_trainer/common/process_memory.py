"""Measure the host memory of this process, and have glibc keep less of it.

The peak is known on every system, the private part as Linux counts it. What a setting of glibc does holds for the whole
process from then on; with another system or C library nothing happens.
"""

import ctypes
import sys
from pathlib import Path
from typing import Any

import psutil

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _ARENA_MAX = -3, -1, -8  # of mallopt
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_resident_bytes() -> int:
    """Measure the most memory that was resident since the process began, pages of mapped files included.

    Returns:
        Bytes.
    """
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def private_bytes() -> int | None:
    """Measure what is resident now without pages of mapped files, such as libraries and weights.

    Returns:
        Bytes; None except on Linux.
    """
    return _resident("VmRSS")


def peak_private_bytes() -> int | None:
    """Measure the peak of resident memory since the process began, or since `restart_peak`, less the file pages of now.

    Returns:
        Bytes; None except on Linux.
    """
    return _resident("VmHWM")


def restart_peak() -> None:
    """Let `peak_private_bytes` count from what is resident now, where the system allows it."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return  # not Linux, or a container that forbids it: the peak stays that of the whole process


def _resident(name: str) -> int | None:
    """Read a number of bytes from the process's status, less the pages of files and of shared memory."""
    try:
        status = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    except OSError:
        return None
    kibibytes = {key: int(status[key].split()[0]) for key in (name, "RssFile", "RssShmem")}
    return 1024 * (kibibytes[name] - kibibytes["RssFile"] - kibibytes["RssShmem"])


def return_freed_memory() -> bool:
    """Ask glibc to return blocks of 1 MiB and more to the system as soon as they are freed.

    By default glibc keeps freed blocks of up to 32 MiB for reuse, in pieces that often do not fit the next request: in
    training 0.3B parameters on a CPU they took 0.4 GB. New pages cost time instead: a seventh in that run, less in
    larger models.

    Returns:
        True if glibc accepted it; False with another system or C library.
    """
    return _set_option(_MMAP_THRESHOLD, 2**20) and _set_option(_TRIM_THRESHOLD, 2**20)


def use_one_arena() -> bool:
    """Ask glibc to serve threads that begin from now on from one arena, so that what one frees another gets.

    By default each thread allocates in an arena of its own, up to eight times as many as there are processors, and
    keeps there what it frees: the most that each thread had is resident, though they had it in turn.

    Returns:
        True if glibc accepted it; False with another system or C library.
    """
    return _set_option(_ARENA_MAX, 1)


def trim_freed_memory() -> None:
    """Give what glibc keeps of freed blocks back to the system, once."""
    trim = _function_of_c("malloc_trim")
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _set_option(option: int, value: int) -> bool:
    mallopt = _function_of_c("mallopt")
    return mallopt is not None and bool(mallopt(option, value))


def _function_of_c(name: str) -> Any:
    """Return a function of the C library; None where it has none of this name."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, TypeError, AttributeError):  # another system, or another C library
        return None
