"""What this process holds of host memory: its peak on every system, and what is private as Linux counts it."""

import ctypes
import sys
from pathlib import Path

import psutil

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_resident_bytes() -> int:
    """The most that was resident since the process began, what files back included."""
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def private_bytes() -> int | None:
    """Resident now, less what files back, such as libraries and weights that are mapped; None but on Linux."""
    return _resident("VmRSS")


def peak_private_bytes() -> int | None:
    """The most that was resident since the process began, or since `restart_peak`, less what files back now.

    None but on Linux.
    """
    return _resident("VmHWM")


def restart_peak() -> None:
    """Let the peak count from what is resident now."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return  # not Linux, or a container that forbids it: the peak stays that of the whole process


def _resident(name: str) -> int | None:
    try:
        status = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    except OSError:
        return None
    kibibytes = {key: int(status[key].split()[0]) for key in (name, "RssFile", "RssShmem")}
    return 1024 * (kibibytes[name] - kibibytes["RssFile"] - kibibytes["RssShmem"])


def return_freed_memory() -> bool:
    """Let blocks of a mebibyte and more go back to the system when they are freed; whether that could be asked.

    glibc keeps what is freed in blocks of up to 32 MiB for later, in pieces that often do not fit what comes: training
    0.3B parameters on a CPU held 0.4 GB of them. Fresh pages cost time instead, there a seventh, less in larger models.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another system, or another C library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 2**20)) and bool(mallopt(_TRIM_THRESHOLD, 2**20))
