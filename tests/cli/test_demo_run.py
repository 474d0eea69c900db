"""Promises of `qlora demo`: it goes through every part of the job, and the small model it trains learns its task."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_trainer.cli.demo_run import packaged_model
from qlora_trainer.common.errors import FileMissingError
from qlora_trainer.runs.metrics import read_metrics

PARTS = ["Loading", "Training to step", "Resuming from the checkpoint", "Merging into fp16", "The merged model, asked"]


def exact_matches(printed: str) -> list[float]:
    """Read the scores that the table gives: before training, after it, and of the merged model."""
    rows = ("exact match before", "exact match after", "exact match, merged model")
    found = [re.search(rf"{row}\W+([\d.]+)%", printed) for row in rows]
    return [float(match[1]) for match in found if match]


def test_demo_of_two_steps_goes_through_every_part(qlora: Callable, tiny_llama: Path, tmp_path: Path) -> None:
    code, out, reported = qlora("demo", "--model", tiny_llama, "--steps", 2, "--output", tmp_path / "demo")
    assert code == 0
    printed = f"{reported} {out}"
    places = [printed.index(part) for part in PARTS]
    assert places == sorted(places)
    assert f"Ask it yourself: qlora generate {tmp_path}/demo/run" in " ".join(out.split())
    assert len(exact_matches(printed)) == 3
    assert [record["step"] for record in read_metrics(tmp_path / "demo/run/metrics.jsonl")] == [1, 2]
    assert (tmp_path / "demo/run/checkpoints/step-000001").is_dir()
    assert (tmp_path / "demo/merged/model.safetensors").is_file()
    assert (tmp_path / "demo/run/report.html").is_file()


@pytest.mark.campaign
def test_whole_demo_teaches_the_task_and_the_merged_model_keeps_it(qlora: Callable, tmp_path: Path) -> None:
    try:
        packaged_model()
    except FileMissingError as error:
        pytest.skip(str(error))
    code, printed, _ = qlora("demo", "--output", tmp_path / "demo")
    assert code == 0
    before, after, merged = exact_matches(printed)
    assert before == 0
    assert after > 80
    assert merged == after
