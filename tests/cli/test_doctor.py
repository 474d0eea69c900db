"""`qlora doctor` reports what works and what does not, and survives broken packages."""

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch
from cards import a_card_is_here

from qlora_kernels import registry
from qlora_trainer.cli import doctor_machine, doctor_packages
from qlora_trainer.cli.doctor_checks import examine
from qlora_trainer.cli.findings import Finding


def named(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_every_problem_comes_with_advice(tmp_path: Path) -> None:
    findings = examine(tmp_path)
    assert len(named(findings)) == len(findings)
    for finding in findings:
        assert finding.detail
        assert finding.advice or finding.status != "problem", finding
        assert not (finding.advice and finding.status == "ok"), finding


def test_quantization_is_checked_to_the_bit() -> None:
    assert named(examine())["NF4 to the bit on cpu"].status in ("ok", "note")


def test_wrong_values_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bitsandbytes gives them on some processors, and as compiled code of ours might."""
    from qlora_kernels import nf4

    right = nf4._dequantize_into

    def wrong(out: torch.Tensor, weight: nf4.NF4Weight, first_row: int) -> None:
        right(out, weight, first_row)
        if out.dtype == torch.bfloat16 and weight.shape[1] % 64:
            out[-1, -1] += 1

    monkeypatch.setattr(nf4, "_dequantize_into", wrong)
    finding = doctor_packages.nf4("cpu")
    assert finding.status == "problem"
    assert "QLORA_KERNELS=reference" in finding.detail


def test_every_operation_is_reported_with_its_version_and_why() -> None:
    finding = doctor_packages.kernels("cpu")
    for name in registry.implementations("cpu"):
        assert name in finding.detail
    assert "plain torch, which is the only version: " in finding.detail


@pytest.mark.parametrize(
    ("capability", "status", "words"),
    [((8, 6), "ok", "flash attention over packed documents"), ((7, 5), "note", "or higher, and this one has 7.5")],
)
def test_which_attention_a_card_takes_is_reported_and_why_no_better_one(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], status: str, words: str
) -> None:
    monkeypatch.delenv("QLORA_KERNELS", raising=False)
    a_card_is_here(monkeypatch, capability)
    finding = doctor_packages.attention("cuda")
    assert finding.status == status
    assert words in finding.detail
    assert doctor_packages.attention("cpu").status == "ok"


@pytest.mark.usefixtures("without_compiler")
def test_a_missing_compiler_is_a_note_that_says_what_to_install() -> None:
    finding = doctor_packages.kernels("cpu")
    assert finding.status == "note"
    assert "plain torch instead of a faster version: dequantize_nf4, quantize_nf4" in finding.detail
    assert finding.advice.startswith("there is no")
    assert "install g++" in finding.advice


def test_kernels_asked_for_by_an_unknown_word_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_KERNELS", "triton")
    finding = doctor_packages.kernels("cpu")
    assert (finding.status, finding.advice) == ("problem", "unset QLORA_KERNELS")


def test_wrong_codes_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_trainer.weights import nf4 as quantization

    right = quantization.quantize_weight
    monkeypatch.setattr(quantization, "quantize_weight", lambda weight: right(-weight))
    finding = doctor_packages.nf4("cpu")
    assert finding.status == "problem"
    assert "wrong codes" in finding.detail


def test_untested_version_is_a_note_and_a_missing_package_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(package: str) -> str:
        if package == "accelerate":
            raise importlib.metadata.PackageNotFoundError(package)
        return {"transformers": "5.99", "torch": doctor_packages.TESTED_VERSIONS["torch"] + "+cu130"}.get(
            package
        ) or real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    findings = named(doctor_packages.versions())
    assert findings["transformers"].status == "note"
    assert findings["transformers"].detail == f"5.99; tests ran with {doctor_packages.TESTED_VERSIONS['transformers']}"
    assert findings["accelerate"].status == "problem"
    assert findings["accelerate"].advice == f"pip install accelerate=={doctor_packages.TESTED_VERSIONS['accelerate']}"
    assert findings["torch"].status == "ok"


def test_version_below_what_the_project_asks_for_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    asked = ["torch>=2.11", "transformers<6,>=5.23", 'peft>=99; extra == "test"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda package: asked)
    monkeypatch.setattr(importlib.metadata, "version", lambda p: {"torch": "2.10.1+cu128"}.get(p) or real(p))
    finding = named(doctor_packages.versions())["torch"]
    assert (finding.status, finding.detail) == ("problem", "2.10.1+cu128; qlora-trainer needs torch>=2.11")
    assert finding.advice == f"pip install torch=={doctor_packages.TESTED_VERSIONS['torch']}"
    monkeypatch.setattr(importlib.metadata, "version", lambda p: {"torch": "2.11.0+cu130"}.get(p) or real(p))
    assert named(doctor_packages.versions())["torch"].status == "note"


def test_checkout_that_is_not_installed_asks_for_no_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> None:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert {finding.status for finding in doctor_packages.versions()} <= {"ok", "note"}


def test_package_that_cannot_be_imported_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("weights.nf4", "weights.bitsandbytes_internals", "model.device"):
        monkeypatch.setitem(sys.modules, f"qlora_trainer.{module}", None)
    findings = named(examine())
    for name in ("bitsandbytes' library", "NF4 to the bit on cpu", "Compute dtype"):
        assert findings[name].status == "problem"


def test_driver_without_a_cuda_build_of_torch_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor_machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    (finding,) = doctor_machine.cards()
    assert finding.status == "problem"
    assert "CUDA build of torch" in finding.advice
    monkeypatch.setattr(doctor_machine.shutil, "which", lambda name: None)
    (finding,) = doctor_machine.cards()
    assert finding.status == "note"


def test_disk_of_a_directory_that_is_yet_to_be_made_is_its_parents(tmp_path: Path) -> None:
    finding = doctor_machine.disk("Disk", tmp_path / "a" / "b", "Move it.")
    assert "GiB free for" in finding.detail
    assert not (tmp_path / "a").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_is_described_and_ready() -> None:
    findings = named(examine())
    assert findings["GPU 0"].status in ("ok", "note")
    assert torch.cuda.get_device_name(0) in findings["GPU 0"].detail
    assert findings["bitsandbytes' library"].detail == "loaded, for CUDA"
    for kind in ("cpu", "cuda"):
        assert findings[f"NF4 to the bit on {kind}"].status in ("ok", "note")
        assert findings[f"Kernels on {kind}"].status == "ok"
    assert "dequantize_nf4" in findings["Kernels on cuda"].detail.partition(";")[0]
    assert findings["Paged optimizer"].status in ("ok", "note")
