"""Measure each part of a benchmark in a process of its own, where nothing of another part is left in memory.

Nothing but Python's own library is imported, which then adds nothing to what a part holds.
"""

import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.2


def run_part(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run `python -m module arguments`, and return the JSON object that is the last line it prints."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_job(
    name: str,
    command: Sequence[str],
    job: Any,
    work: Path,
    environment: Mapping[str, str] | None = None,
    watch: Callable[[int], None] | None = None,
) -> dict[str, Any] | None:
    """Run a command that ends with `end_job`; where it fails, print its last lines and return None.

    Args:
        name: what is measured, for the message.
        command: to which the paths of the job and of the result are added.
        job: a dataclass.
        work: a directory for both files.
        environment: of the process; by default this one's.
        watch: called with the id of the process some times a second.

    Returns:
        The fields of the result.
    """
    described, result = work / "job.json", work / "result.json"
    described.write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
    result.unlink(missing_ok=True)
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [*command, str(described), str(result)], env=environment, stdout=said, stderr=subprocess.STDOUT
        )
        while watch is not None and process.poll() is None:
            watch(process.pid)
            time.sleep(SAMPLE_SECONDS)
        if process.wait():
            said.seek(0)
            print(f"{name} failed:\n" + "\n".join(said.read().splitlines()[-15:]), file=sys.stderr)
            return None
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def end_job(described: str, result: str, measure: Callable[[dict[str, Any]], Any]) -> None:
    """Measure what a job's file describes by its fields, and write the dataclass that comes of it."""
    measured = measure(json.loads(Path(described).read_text(encoding="utf-8")))
    Path(result).write_text(json.dumps(dataclasses.asdict(measured)), encoding="utf-8")


def cpu_seconds(of_children: bool = False) -> float:
    """Return this process's processor time so far, user and system, over all threads; and that of ended children."""
    used = [resource.getrusage(resource.RUSAGE_SELF)]
    used += [resource.getrusage(resource.RUSAGE_CHILDREN)] if of_children else []
    return sum(one.ru_utime + one.ru_stime for one in used)


def forget_pages(paths: Iterable[Path]) -> None:
    """Write files out and drop them from the page cache, as far as the system lets us; folders are left out."""
    for path in paths:
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
