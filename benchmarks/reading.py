"""Compare ways to read a large file: once, hashed, and again and again with little memory for the page cache.

    python -m benchmarks.reading FILE [--hash] [--passes 3] [--limit 2GiB] [--ways direct readinto ...]

A pass reads the whole file, 4 MiB at a time, while a thread hashes or sums the piece before; the sum plays a layer
that is used once a pass. The file is dropped from the page cache before the first pass of each way. With --limit the
process runs in a memory control group of its own (version 1 or 2, as root), which bounds its memory with the page cache
that it fills. Printed are seconds and processor seconds of each pass.

- direct: O_DIRECT, past the page cache, into aligned memory that is used again;
- readinto: through the page cache, into the same memory;
- drop: the same, and the pages of each piece are dropped after it was read (as weights/file_reading.py does);
- map: mapped, with advice to read ahead;
- ahead: mapped, and the next 32 MiB are asked for beforehand.
"""

import argparse
import hashlib
import io
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.processes import forget_pages
from qlora_trainer.common.background import Background
from qlora_trainer.common.units import parse_bytes

PIECE_BYTES = 2**22
MEMORY_BYTES = 2**27  # that pieces are read into, in turn
AHEAD_BYTES = 2**25
GROUP = "qlora-reading"

Use = Callable[[memoryview], object]


def read_file(path: Path, use: Use, flags: int = 0, drop: bool = False) -> None:
    """Read a file into memory that is used again.

    Args:
        path: of the file.
        use: is called with each piece.
        flags: of open, such as os.O_DIRECT.
        drop: give the pages of each piece back.
    """
    memory = mmap.mmap(-1, MEMORY_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    window, size, done = memoryview(memory), path.stat().st_size, 0
    with (
        io.FileIO(path, opener=lambda name, mode: os.open(name, mode | flags)) as file,
        Background() as worker,
    ):
        while done < size:
            begin = done % MEMORY_BYTES
            count = file.readinto(window[begin : begin + PIECE_BYTES])
            assert count, "the file became shorter"
            if drop:
                os.posix_fadvise(file.fileno(), done, count, os.POSIX_FADV_DONTNEED)
            worker.submit(use, window[begin : begin + count])
            done += count


def map_file(path: Path, use: Use, ahead: int = 0) -> None:
    """Map a file.

    Args:
        path: of the file.
        use: is called with each piece.
        ahead: bytes to ask for before they are used.
    """
    size = path.stat().st_size
    with path.open("rb") as file, Background(most_waiting=1) as worker:
        mapped = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        mapped.madvise(mmap.MADV_SEQUENTIAL)
        window = memoryview(mapped)
        for begin in range(0, size, PIECE_BYTES):
            if ahead and begin % ahead == 0 and begin + ahead < size:
                mapped.madvise(mmap.MADV_WILLNEED, begin + ahead, min(ahead, size - begin - ahead))
            worker.submit(use, window[begin : begin + PIECE_BYTES])
        worker.finish()


WAYS: dict[str, Callable[[Path, Use], None]] = {
    "direct": lambda path, use: read_file(path, use, os.O_DIRECT),
    "readinto": read_file,
    "drop": lambda path, use: read_file(path, use, drop=True),
    "map": map_file,
    "ahead": lambda path, use: map_file(path, use, AHEAD_BYTES),
}


def total(piece: memoryview) -> object:
    """Sum a piece's bytes, eight at a time."""
    return np.frombuffer(piece[: len(piece) // 8 * 8], np.uint64).sum()


def measure(path: Path, way: str, passes: int, hashes: bool) -> list[tuple[float, float]]:
    """Take the time of each pass.

    Args:
        path: of the file.
        way: one of WAYS.
        passes: to make.
        hashes: hash each piece; else it is summed.

    Returns:
        (seconds, processor seconds) of each pass.
    """
    forget_pages([path])
    found = []
    for _ in range(passes):
        use: Use = hashlib.sha256().update if hashes else total
        wall, processor = time.perf_counter(), time.process_time()
        WAYS[way](path, use)
        found.append((time.perf_counter() - wall, time.process_time() - processor))
    return found


def enter_group(limit: int) -> None:
    """Move this process into a memory control group of `limit` bytes."""
    root = Path("/sys/fs/cgroup")
    is_unified = (root / "cgroup.controllers").is_file()
    group = (root if is_unified else root / "memory") / GROUP
    group.mkdir(exist_ok=True)
    (group / ("memory.max" if is_unified else "memory.limit_in_bytes")).write_text(str(limit))
    (group / "cgroup.procs").write_text(str(os.getpid()))


def main() -> None:
    """Measure the ways, each in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--hash", action="store_true")
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--limit", type=parse_bytes, help="bytes for the process and the page cache that it fills")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--run", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        if arguments.limit:
            enter_group(arguments.limit)
        passes = measure(arguments.file, arguments.run, arguments.passes, arguments.hash)
        cells = [f"{wall:7.2f} s ({processor:5.2f})" for wall, processor in passes]
        rate = arguments.file.stat().st_size / 1e9 / passes[-1][0]
        print(f"{arguments.run:10}{''.join(cells)}   the last at {rate:.2f} GB/s", flush=True)
        return
    for way in arguments.ways:
        subprocess.run([sys.executable, "-m", "benchmarks.reading", *sys.argv[1:], "--run", way], check=True)


if __name__ == "__main__":
    main()
