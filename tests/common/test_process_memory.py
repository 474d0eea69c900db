"""What a process holds privately is what it uses: freed blocks go back to the system where that is asked for."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from qlora_trainer.common.process_memory import peak_resident_bytes, private_bytes

# Blocks of 4 MiB with small ones between them, which stay: the holes are where the C library keeps what was freed.
CODE = """
import sys
import torch
from qlora_trainer.common.process_memory import private_bytes, return_freed_memory
asked = sys.argv[1] == "asked" and return_freed_memory()
warm = [torch.ones(2**20) for _ in range(2)]
del warm
before = private_bytes()
small, large = [], []
for _ in range(60):
    large.append(torch.ones(2**20))
    small.append(torch.ones(2**14))
taken = private_bytes() - before
large.clear()
print(asked, taken, private_bytes() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(private_bytes() is None, reason="needs Linux's /proc")
def test_freed_blocks_go_back_to_the_system_where_that_is_asked_for() -> None:
    def run(how: str) -> tuple[str, int, int]:
        done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True)
        asked, taken, kept = done.stdout.split()
        return asked, int(taken), int(kept)

    asked, taken, kept = run("asked")
    if asked != "True":
        pytest.skip("another C library")
    assert taken > 240 * 2**20
    assert kept < 8 * 2**20  # the small ones
    assert run("not")[2] > 100 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_the_peak_is_in_bytes() -> None:
    """Near Linux's count in /proc, which `restart_peak` may have let begin anew."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = 1024 * int(status["VmHWM"].split()[0])
    assert 0.9 * peak <= peak_resident_bytes() <= psutil.virtual_memory().total


def test_the_peak_is_known_where_there_is_no_module_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows psutil knows it."""
    monkeypatch.setitem(sys.modules, "resource", None)  # makes its import an ImportError
    information = SimpleNamespace(rss=5, peak_wset=7)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda process: information)
    assert peak_resident_bytes() == 7
