"""`qlora doctor RUN` reads the base of a run, and says whether it is what the run trains on."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_model_directory

from qlora_trainer.cli import doctor_checks
from qlora_trainer.cli.findings import Finding
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.runs.start import start_run

Qlora = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def nothing_else_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "examine", lambda *cache: [Finding("Python", "ok", "3.11")])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_model_directory(tmp_path / "base")


@pytest.fixture
def run(base: Path, tiny_config: Callable[..., RunConfig]) -> Path:
    return start_run(tiny_config(model={"name": str(base)})).directory


def change(base: Path, tensor: str, value: float) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors[tensor].view(-1)[7] = value
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def base_finding(qlora: Qlora, run: Path) -> tuple[int, str, str]:
    code, out, _ = qlora("doctor", run, "--json")
    (finding,) = [finding for finding in json.loads(out) if finding["name"] == "Base of the run"]
    return code, finding["status"], finding["detail"]


def test_a_base_that_is_what_it_was_is_ok(qlora: Qlora, run: Path, base: Path) -> None:
    assert base_finding(qlora, run) == (0, "ok", f"{base} was read: it is the base that this run trains on")
    code, out, reported = qlora("doctor", run)
    assert code == 0, reported
    assert "ok Base of the run" in out
    assert "Base of the run" not in qlora("doctor")[1]


@pytest.mark.parametrize("tensor", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_another_value_is_a_problem(qlora: Qlora, run: Path, base: Path, tensor: str) -> None:
    change(base, tensor, 3.0)
    code, status, detail = base_finding(qlora, run)
    assert (code, status) == (1, "problem")
    assert f"{base} is not the base that this run trains on: 1 of " in detail


def test_a_byte_that_no_quantized_weight_shows_is_a_problem(qlora: Qlora, run: Path, base: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    value = load_file(base / "model.safetensors")[name].view(-1)[7]
    bits = value.view(torch.int16) ^ 1  # the last of bfloat16
    change(base, name, float(bits.view(torch.bfloat16)))
    code, status, detail = base_finding(qlora, run)
    assert (code, status) == (1, "problem")
    assert detail == f"{base} has other bytes than when the run started in 1 tensor, such as {name}"


def test_a_base_that_cannot_be_read_is_a_problem(qlora: Qlora, run: Path, base: Path) -> None:
    os.truncate(base / "model.safetensors", 1000)
    code, status, detail = base_finding(qlora, run)
    assert (code, status) == (1, "problem")
    assert "damaged or cut short" in detail


def test_what_is_no_run_directory_is_an_error(qlora: Qlora, tmp_path: Path) -> None:
    code, out, reported = qlora("doctor", tmp_path, "--json")
    assert (code, out) == (2, "")
    assert "is not a run directory" in reported
