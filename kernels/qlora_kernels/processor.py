"""Read what Linux says of the processor."""

from pathlib import Path


def processor_fact(key: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Read a fact about the first processor, such as its "model name".

    Args:
        key: as /proc/cpuinfo has it.
        cpuinfo: the file.

    Returns:
        The fact; None where the system does not say it.
    """
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return None
