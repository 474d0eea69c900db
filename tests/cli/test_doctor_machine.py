"""`qlora doctor` on machines that are not as one would wish, by stand-ins for what torch and the system answer."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cards import CUDA_13, pretend
from cgroups import write

from qlora_trainer.cli import doctor_machine
from qlora_trainer.cli.findings import Finding
from qlora_trainer.common import machine
from qlora_trainer.config.load import make_config

GIB = 2**30
PAGING_FAILS = "print('Error operation not supported at line 82', flush=True); ctypes.CDLL(None).exit(1)"


def named(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.fixture
def memory_of_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each card has 24 GiB, all free; tensors on it lie in host memory."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=0: (24 * GIB, 24 * GIB))
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device=None: ones(*shape))


@pytest.mark.usefixtures("memory_of_cards")
def test_one_good_card_is_ok_and_the_only_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, CUDA_13, (8, 9))
    (finding,) = doctor_machine.cards()
    assert (finding.name, finding.status) == ("GPU 0", "ok")
    assert "Card 0, compute capability 8.9, 24.0 GiB of 24.0 GiB free" in finding.detail


@pytest.mark.usefixtures("memory_of_cards")
def test_of_several_cards_the_one_used_is_named_and_how_to_take_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    pretend(monkeypatch, CUDA_13, (8, 6), (6, 1), (8, 9))
    findings = named(doctor_machine.cards())
    assert list(findings) == ["GPU 0", "GPU 1", "GPU 2", "GPU used"]
    assert findings["GPU 1"].status == "note", "an old card that nobody uses"
    assert findings["GPU used"].status == "note"
    assert "a run uses one GPU, the first that torch sees: GPU 0" in findings["GPU used"].detail
    assert "CUDA_VISIBLE_DEVICES=2 " in findings["GPU used"].advice, "the next that can be used"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert "CUDA_VISIBLE_DEVICES=7 " in named(doctor_machine.cards())["GPU used"].advice


@pytest.mark.usefixtures("memory_of_cards")
def test_card_too_old_for_torch_is_a_problem_with_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, CUDA_13, (6, 1))
    (finding,) = doctor_machine.cards()
    assert finding.status == "problem"
    assert "cannot be used: torch" in finding.detail
    assert "a torch built for CUDA 12.6" in finding.advice
    assert "CUDA_VISIBLE_DEVICES= in front of the command takes the CPU" in finding.advice


@pytest.mark.usefixtures("memory_of_cards")
@pytest.mark.parametrize(("capability", "status"), [((6, 0), "note"), ((7, 5), "ok")])
def test_card_without_tensor_cores_is_a_note(
    capability: tuple[int, int], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, ["sm_60", "sm_75"], capability)
    (finding,) = doctor_machine.cards()
    assert finding.status == status
    assert ("without tensor cores" in finding.advice) == (status == "note")


def test_card_that_fails_is_a_problem_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: int) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    pretend(monkeypatch, CUDA_13, (8, 6))
    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    (finding,) = doctor_machine.cards()
    assert finding.status == "problem"
    assert finding.detail.endswith("no kernel image is available for execution on the device")


def test_card_that_another_program_holds_is_a_problem_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy() -> int:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    pretend(monkeypatch, CUDA_13, (8, 6))
    monkeypatch.setattr(torch.cuda, "current_device", busy)
    (finding,) = doctor_machine.cards()
    for found in (finding, doctor_machine.paged_optimizer()):
        assert found.status == "problem"
        assert found.detail.endswith("all CUDA-capable devices are busy or unavailable")
    assert "nvidia-smi" in finding.advice


@pytest.mark.slow
def test_card_on_which_nothing_works_ends_no_check_in_a_traceback() -> None:
    """In a process of its own: Triton and torch remember what they found."""
    code = (
        "import json, dataclasses, fake_libcuda; fake_libcuda.pretend_to_have_a_card(); "
        "from qlora_trainer.cli.doctor_checks import examine; "
        "print(json.dumps([dataclasses.asdict(f) for f in examine()]))"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    findings = {finding["name"]: finding for finding in json.loads(done.stdout.splitlines()[-1])}
    assert findings["GPU 0"]["status"] == findings["NF4 to the bit on cuda"]["status"] == "problem"
    assert findings["Kernels on cuda"]["status"] == findings["Paged optimizer"]["status"] == "note"
    assert all(finding["advice"] for finding in findings.values() if finding["status"] == "problem")


def test_card_that_refuses_to_page_is_a_note_with_the_childs_reason(
    bitsandbytes_of_the_child: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bitsandbytes_of_the_child(PAGING_FAILS)
    pretend(monkeypatch, CUDA_13, (8, 6))
    finding = doctor_machine.paged_optimizer()
    assert finding.status == "note"
    assert "stays on the card" in finding.detail
    assert "ended with exit code 1: Error operation not supported at line 82" in finding.detail
    assert_settings_are_taken(finding.advice)


def test_wsl_is_named_with_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    finding = doctor_machine.system()
    assert finding.status == "note"
    for words in ("WSL", "not paged", "expandable segments"):
        assert words in finding.detail
    assert_settings_are_taken(finding.advice)
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-41-generic")
    assert doctor_machine.system().status == "ok"


def assert_settings_are_taken(advice: str) -> None:
    assert "adapter.rank" in advice
    assert "optimizer.name=paged_adamw_8bit" in advice
    make_config({"model": {"name": "a/b"}, "data": {"train": "x.jsonl"}, "optimizer": {"name": "paged_adamw_8bit"}})


def test_limit_of_a_container_is_named_with_how_to_raise_it(groups: Path) -> None:
    """64 GiB in the machine, 16 for the container, of which 2 are used."""
    machine.CGROUP_LIST.write_text("0::/\n")
    write(groups, memory__max=16 * GIB, memory__current=2 * GIB)
    finding = doctor_machine.memory()
    assert finding.status == "note"
    assert finding.detail.startswith("14.0 GiB of 16.0 GiB available, limited by this container or job")
    assert "docker run --memory=" in finding.advice
    write(groups, memory__max=32 * GIB, memory__current=2 * GIB)  # as advised
    assert doctor_machine.memory().detail.startswith("30.0 GiB of 32.0 GiB")
    write(groups, memory__max="max", memory__current=2 * GIB)
    assert doctor_machine.memory() == Finding("Host memory", "ok", "40.0 GiB of 64.0 GiB available")


def test_folder_that_cannot_be_written_is_a_problem_with_the_callers_advice() -> None:
    """Below a file, so that it holds for root too."""
    finding = doctor_machine.disk("Disk of the cache", Path("/dev/null/.cache/qlora-trainer"), "Set XDG_CACHE_HOME.")
    assert finding.status == "problem"
    assert finding.detail == "/dev/null/.cache/qlora-trainer cannot be written: Not a directory"
    assert finding.advice == "Set XDG_CACHE_HOME."
