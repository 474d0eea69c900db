"""The command line on a machine that lacks something: the next best way and a notice, or one message and exit 2."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.parametrize("home", ["/dev/null", "/proc/1/no-such"])  # which root cannot write either
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
    code, _, told = qlora("train", config_file)
    assert code == 2
    assert f"cannot be written to {home}/.cache/qlora-trainer" in told
    assert "set XDG_CACHE_HOME to another folder" in told
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert qlora("train", config_file, "training.max_steps=1")[0] == 0, "the advice works"


def test_compiled_kernels_that_cannot_be_kept_are_a_notice(
    qlora: Callable, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_kernels import compiled, registry

    compiled.load_library.cache_clear()
    for name in ("dequantize_nf4", "quantize_nf4"):
        monkeypatch.setitem(registry._OPS[name].__dict__, "_made", {})
    monkeypatch.delenv("QLORA_KERNELS", raising=False)
    extensions = tmp_path / "cache" / "torch_extensions"
    extensions.parent.mkdir(exist_ok=True)
    extensions.write_text("no folder")
    code, _, told = qlora("train", config_file, "training.max_steps=1")
    assert code == 0
    assert "Plain torch takes the place of faster kernels for dequantize_nf4, quantize_nf4" in told
    assert "set XDG_CACHE_HOME to a folder that can be written" in told


def test_unknown_choice_of_kernels_ends_a_run_before_it_begins(
    qlora: Callable, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_KERNELS", "triton")
    code, _, told = qlora("train", config_file)
    assert code == 2
    assert "QLORA_KERNELS is 'triton'" in told


def test_doctor_prints_each_finding_with_its_advice_below(qlora: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_trainer import doctor
    from qlora_trainer.findings import Finding

    found = [Finding("Disk", "problem", "[bold]/x[/] is full", "Empty it."), Finding("Python", "ok", "3.11")]
    monkeypatch.setattr(doctor, "examine", lambda cache: found)
    assert qlora("doctor") == (1, "", "problem Disk [bold]/x[/] is full → Empty it. ok Python 3.11")
