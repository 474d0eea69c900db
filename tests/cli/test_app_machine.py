"""The command line on a machine that lacks something: the next best way and a warning, or one message and exit 2."""

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cards import CUDA_13, a_card_is_here, pretend
from marks import slow_but


@pytest.mark.parametrize(
    "home", slow_but(["/dev/null", "/proc/1/no-such"], "/dev/null")
)  # which root cannot write either
def test_home_that_cannot_be_written_is_named_and_training_says_what_to_set(
    home: str, qlora: Callable, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two kinds of failure: a file in the place of a folder, and a folder in which nothing can be made."""
    monkeypatch.setenv("HOME", home)
    monkeypatch.delenv("XDG_CACHE_HOME")
    code, out, _ = qlora("doctor", "--json")
    assert code == 1
    findings = {finding["name"]: finding for finding in json.loads(out)}
    assert findings["Disk of the cache"]["status"] == "problem"
    assert "XDG_CACHE_HOME" in findings["Disk of the cache"]["advice"]
    code, _, reported = qlora("train", config_file)
    assert code == 2
    assert f"{home}/.cache/qlora-trainer" in reported
    assert "set XDG_CACHE_HOME to another folder" in reported
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert qlora("train", config_file, "training.max_steps=1")[0] == 0, "the advice works"


def test_compiled_kernels_that_cannot_be_kept_are_a_warning(
    qlora: Callable, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_kernels import compiled
    from qlora_kernels.registry import other_versions

    compiled.load_library.cache_clear()
    monkeypatch.delenv("QLORA_KERNELS", raising=False)
    extensions = tmp_path / "cache" / "torch_extensions"
    extensions.parent.mkdir(exist_ok=True)
    extensions.write_text("no folder")
    with other_versions("cpu", {"dequantize_nf4": None, "quantize_nf4": None}):
        code, _, reported = qlora("train", config_file, "training.max_steps=1")
    assert code == 0
    assert "Plain torch takes the place of faster kernels for dequantize_nf4, quantize_nf4" in reported
    assert "set XDG_CACHE_HOME to a writable folder" in reported


def test_unknown_choice_of_kernels_ends_a_run_before_it_begins(
    qlora: Callable, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_KERNELS", "triton")
    code, _, reported = qlora("train", config_file)
    assert code == 2
    assert "QLORA_KERNELS is 'triton'" in reported


def test_doctor_prints_each_finding_with_its_advice_below(qlora: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_trainer.cli import doctor_checks
    from qlora_trainer.cli.findings import Finding

    found = [Finding("Disk", "problem", "[bold]/x[/] is full", "Empty it."), Finding("Python", "ok", "3.11")]
    monkeypatch.setattr(doctor_checks, "examine", lambda cache: found)
    code, out, reported = qlora("doctor")
    assert (code, reported) == (1, "")
    assert " ".join(out.split()) == "problem Disk [bold]/x[/] is full → Empty it. ok Python 3.11"


def test_card_that_another_program_holds_ends_a_run_with_the_way_out(
    qlora: Callable, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first thing that needs the card itself fails, as where a card is in exclusive mode; nothing is left."""

    def held(device: object = None) -> None:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCompile with TORCH_USE_CUDA")

    importlib.import_module("qlora_trainer.runs.start")  # libraries look for a card while they are imported
    with monkeypatch.context() as card:
        a_card_is_here(card, (8, 6))
        card.setattr(torch.cuda, "get_arch_list", lambda: ["sm_86"])
        card.setattr(torch.cuda, "mem_get_info", held)
        code, _, reported = qlora("train", config_file, "optimizer.name=adamw")
        hide_cards_by_the_environment(card)
        assert qlora("train", config_file, "training.max_steps=1")[0] == 0, "the advice works"
    assert "CUDA_VISIBLE_DEVICES= in front of the command" in reported
    assert code == 2
    assert "CUDA-capable device(s) is/are busy or unavailable" in reported
    assert "Traceback" not in reported
    assert "TORCH_USE_CUDA" not in reported


@pytest.mark.parametrize("command", ["evaluate", "generate", "merge"])
def test_card_that_cannot_be_used_has_a_way_out_for_commands_without_settings(
    command: str, qlora: Callable, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert qlora("train", config_file, "training.max_steps=1", "model.device=auto")[0] == 0
    options = {"generate": ["--prompt", "a"], "merge": ["--output", str(tmp_path / "merged")]}.get(command, [])
    pretend(monkeypatch, CUDA_13, (6, 1))
    code, _, reported = qlora(command, tmp_path / "run", *options)
    assert code == 2
    assert "GPU 0 (Card 0, compute capability 6.1) cannot be used" in reported
    assert "CUDA_VISIBLE_DEVICES= in front of the command takes the CPU" in reported
    hide_cards_by_the_environment(monkeypatch)
    assert qlora(command, tmp_path / "run", *options)[0] == 0, "the advice works"


def hide_cards_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set CUDA_VISIBLE_DEVICES to nothing; torch, which may have no CUDA here, answers as one that has."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: os.environ["CUDA_VISIBLE_DEVICES"] != "")
