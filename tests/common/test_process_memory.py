"""What a process holds privately is what it uses: freed blocks go back to the system where that is asked for."""

import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from qlora_trainer.common.process_memory import (
    peak_resident_bytes,
    private_bytes,
    return_freed_memory,
    trim_freed_memory,
    use_one_arena,
)

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


# Two threads, of which the second begins to allocate when the first has freed all but the last of its blocks; these are
# smaller than what glibc maps by itself.
IN_TURN = """
import sys
import threading
from qlora_trainer.common.process_memory import private_bytes, use_one_arena
asked = sys.argv[1] == "asked" and use_one_arena()
turns, end = [threading.Event() for _ in range(3)], threading.Event()
kept = []
def work(number):
    turns[number].wait()
    blocks = [bytearray(b"x") * 2**16 for _ in range(1600)]
    kept.append(blocks.pop())
    del blocks
    turns[number + 1].set()
    end.wait()
threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
for thread in threads:
    thread.start()
before = private_bytes()
turns[0].set()
turns[2].wait()
print(asked, private_bytes() - before)
end.set()
"""


@pytest.mark.skipif(private_bytes() is None, reason="needs Linux's /proc")
def test_what_one_thread_frees_another_gets_where_one_arena_is_asked_for() -> None:
    def run(how: str) -> tuple[str, int]:
        done = subprocess.run([sys.executable, "-c", IN_TURN, how], capture_output=True, text=True, check=True)
        asked, kept = done.stdout.split()
        return asked, int(kept)

    asked, kept = run("asked")
    if asked != "True":
        pytest.skip("another C library")
    one = 1600 * 2**16
    assert one < kept < 1.25 * one
    assert run("not")[1] > 1.75 * one


# Small blocks with one after them that stays, so that glibc does not give them back by itself.
FREED = """
from qlora_trainer.common.process_memory import private_bytes, trim_freed_memory
before = private_bytes()
blocks = [bytearray(b"x") * 2**16 for _ in range(1600)]
last = blocks.pop()
del blocks
kept = private_bytes() - before
trim_freed_memory()
print(kept, private_bytes() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_what_is_freed_goes_back_to_the_system_when_it_is_trimmed() -> None:
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert kept > 1600 * 2**16
    assert left < 8 * 2**20


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())  # it has no such function
    assert not use_one_arena()
    assert not return_freed_memory()
    trim_freed_memory()


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
