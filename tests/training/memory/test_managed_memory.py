"""Whether state can be paged is tried in a process of its own, which may end as it likes."""

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from marks import needs_compiler

from qlora_trainer.training.memory import managed_memory
from qlora_trainer.training.memory.managed_memory import paging_refusal, paging_refusal_here

pytestmark = pytest.mark.usefixtures("nothing_tried")
CARD = torch.device("cuda", 1)


def test_managed_memory_that_works_is_not_refused_and_tried_once(
    bitsandbytes_of_the_child: Callable[..., Path],
) -> None:
    asked = bitsandbytes_of_the_child("return torch.empty(shape, dtype=dtype)", real_torch=True)
    assert paging_refusal(CARD) == ""
    assert paging_refusal(CARD) == ""
    assert asked.read_text() == "cuda:1\n"


@pytest.mark.parametrize(
    ("get_paged", "reason"),
    [
        (
            # As bitsandbytes: a line, and exit() of the C library. Nobody learns of it in Python.
            "sys.stderr.write('Error out of memory at line 538 in file csrc/ops.cu\\n'); sys.stderr.flush(); "
            "ctypes.CDLL(None).exit(1)",
            "ended with exit code 1: Error out of memory at line 538",
        ),
        ("ctypes.CDLL(None).exit(0)", "ended with exit code 0"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was ended by signal 11"),
        ("raise RuntimeError('Method cget_managed_ptr not available')", "Method cget_managed_ptr not available"),
    ],
    ids=["exits", "exits with 0", "dies", "raises"],
)
def test_a_child_that_ends_is_a_refusal_that_says_how(
    bitsandbytes_of_the_child: Callable[..., Path], get_paged: str, reason: str
) -> None:
    bitsandbytes_of_the_child(get_paged)
    refusal = paging_refusal(CARD)
    assert "a process that tried managed memory on cuda:1" in refusal
    assert reason in refusal


def test_memory_that_reads_otherwise_than_it_was_filled_is_refused(
    bitsandbytes_of_the_child: Callable[..., Path],
) -> None:
    bitsandbytes_of_the_child("return torch.zeros(shape, dtype=dtype)", fill="buffer[:-1] = value")
    assert "reads differently on the host" in paging_refusal(CARD)


def test_a_child_without_an_answer_is_ended(
    bitsandbytes_of_the_child: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bitsandbytes_of_the_child("time.sleep(600)")
    monkeypatch.setattr(managed_memory, "TRIAL_SECONDS", 0.5)
    assert "no answer after 0.5 seconds" in paging_refusal(CARD)


def test_a_child_that_cannot_be_started_is_a_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert "could not be started" in paging_refusal(CARD)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")
def test_bitsandbytes_itself_is_refused_where_there_is_no_card() -> None:
    assert "ended with exit code 1" in paging_refusal(CARD)
    assert paging_refusal_here() == "", "nothing would page"


@pytest.mark.parametrize(
    ("system", "release", "name"),
    [("Linux", "5.15.153.1-microsoft-standard-WSL2", "WSL"), ("Windows", "11", "Windows")],
)
def test_nothing_is_paged_where_host_and_card_may_not_share_it(
    monkeypatch: pytest.MonkeyPatch, system: str, release: str, name: str
) -> None:
    """No child is needed for that, and none is started."""
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "release", lambda: release)
    monkeypatch.setattr(sys, "executable", "/no such program")
    assert f"{name} does not let host and card use managed memory at the same time" in paging_refusal(CARD)


DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 40 + ordinal; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 89 && device == 41 ? ACCESS : 7;
    return 0;
}
"""


@needs_compiler("cc")
@pytest.mark.skipif(sys.platform != "linux", reason="another system's driver")
@pytest.mark.parametrize("access", [0, 1])
def test_a_card_without_concurrent_access_pages_nothing(
    bitsandbytes_of_the_child: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, access: int
) -> None:
    """A driver library that answers for the card; bitsandbytes would work."""
    (tmp_path / "driver.c").write_text(DRIVER.replace("ACCESS", str(access)))
    library = str(tmp_path / "libcuda.so.1")
    subprocess.run(["cc", "-shared", "-fPIC", str(tmp_path / "driver.c"), "-o", library], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    asked = bitsandbytes_of_the_child("return torch.empty(shape, dtype=dtype)")
    refusal = paging_refusal(CARD)
    assert ("concurrentManagedAccess is 0" in refusal) == (access == 0)
    assert asked.exists() == (access == 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_card_that_pages_is_not_refused() -> None:
    assert paging_refusal_here() == ""
