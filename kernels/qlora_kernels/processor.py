"""What Linux tells of the processor."""

from pathlib import Path


def processor_fact(key: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Of the first processor, such as its "model name"; None where the system does not tell."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return None
