"""benchmarks/gpu.py walks all of its code without a GPU: on fake tensors, and its contenders on a CPU."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import gpu
from benchmarks.contenders import ON_GPU, Result


def test_dry_run_tells_every_kernel_and_plans_whom_it_can(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", str(tiny_llama), "--dry-run"])
    assert gpu.main() == 0
    told = capsys.readouterr().out
    assert told.startswith("Dry run: nothing below was measured.")
    for name in gpu.works():
        assert name in told
    for name in ("ours", "hand-written loop"):
        assert f"\n{name} " in told.partition("planned")[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    assert "--dry-run" in capsys.readouterr().err


def test_results_are_told_with_rates_that_leave_the_first_step_out(capsys: pytest.CaptureFixture[str]) -> None:
    result = Result([2.0, 1.0, 0.5], [9.0, 1.0, 1.0], [9.0, 1.0, 1.0], [10, 30, 50], [10, 40, 60], 3 * 2**30, "so")
    gpu.print_training({"ours": result, "Unsloth": None})
    ours, settings, failed = capsys.readouterr().out.splitlines()[1:]
    assert ours.split() == ["ours", "40", "50", "3.00", "2.000", "1.000", "0.500"]
    assert settings.strip() == "so"
    assert failed.split() == ["Unsloth", "failed"]


def test_who_is_not_installed_is_left_out_with_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    names = gpu.contenders([])
    assert set(names) <= set(ON_GPU)
    assert ("Unsloth" in names) != ("Unsloth is left out" in capsys.readouterr().out)
    assert gpu.contenders(["hand-written loop", "Unsloth"]) == ["ours"]


def test_a_kernels_share_of_the_card_is_that_of_its_bound() -> None:
    roofs = gpu.Roofs("a card", bandwidth=100.0, flops=1000.0)
    assert gpu.Line("moves", seconds=2.0, bytes=100).share(roofs) == 0.5
    assert gpu.Line("multiplies", seconds=4.0, flops=1000).share(roofs) == 0.25
