"""Read facts about the machine that torch and psutil do not report: WSL, and a container's limit on host memory."""

import dataclasses
import platform
from collections.abc import Iterator
from pathlib import Path

CGROUP_LIST = Path("/proc/self/cgroup")  # the control groups of this process, "number:controllers:path" a line
CGROUP_ROOT = Path("/sys/fs/cgroup")


@dataclasses.dataclass(frozen=True)
class HostMemory:
    """Hold the host memory that this process may use, in bytes."""

    total: int
    available: int  # without swapping out other programs, and within the control groups' limits
    is_limited: bool = False  # by a control group, below what the machine has


def is_wsl() -> bool:
    """Return True in the Windows Subsystem for Linux, version 1 or 2.

    Returns:
        True if the kernel's release names Microsoft.
    """
    return "microsoft" in platform.release().lower()


def host_memory() -> HostMemory:
    """Measure the machine's memory, or what a container (Docker, Kubernetes, systemd, Slurm) may use if that is less.

    Available under a limit is the limit less what its control group uses. Inactive file pages do not count as used: the
    kernel drops them first.

    Returns:
        Total and available bytes.
    """
    import psutil  # here, as the command line asks at its start for `is_wsl` only

    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    is_limited = False
    for limit, used in _limits():
        if limit < total:
            total, is_limited = limit, True
        available = min(available, max(limit - used, 0))
    return HostMemory(total, available, is_limited)


def _limits() -> Iterator[tuple[int, int]]:
    """Yield (limit, bytes in use) of each control group that this process is in and that limits memory."""
    for line in _lines(CGROUP_LIST):
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            root, names, inactive = CGROUP_ROOT, ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            root, inactive = CGROUP_ROOT / "memory", "total_inactive_file"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        own = root / path.lstrip("/")
        # A container may see its group at the root while the list has the path outside it: missing files are skipped.
        for group in (own, *own.parents):
            if not group.is_relative_to(root):
                break
            limit, used = (_number(group / name) for name in names)
            if limit is not None and used is not None:
                stat = dict(line.split(" ", 1) for line in _lines(group / "memory.stat"))
                yield limit, used - int(stat.get(inactive, 0))


def _number(path: Path) -> int | None:
    """Read a file that holds a number; None if there is no such file, or it holds a word such as `max`."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    """Read the lines of a file; none if it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
