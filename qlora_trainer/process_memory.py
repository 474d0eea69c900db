"""What this process holds of host memory, as Linux counts it; None on other systems."""

from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def private_bytes() -> int | None:
    """Resident now, less what files back, such as libraries and weights that are mapped."""
    return _resident("VmRSS")


def peak_private_bytes() -> int | None:
    """The most that was resident since the process began, or since `restart_peak`, less what files back now."""
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
