"""A missing file is named with its key, before the model is read; configs/demo.yaml names each key to change."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_trainer.config.load import load_config
from qlora_trainer.runs import start

Qlora = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", ["train", "inspect"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["data.eval=gone/eval.jsonl"],
            "error data.eval: there is no file gone/eval.jsonl. There is no directory gone",
        ),
        (["data.train=gone.jsonl"], "error data.train: there is no file gone.jsonl."),
        (["data.train=gone*.jsonl"], "error data.train: no file matches gone*.jsonl."),
        (["data.train=[{rows}, gone.csv]"], "error data.train[1]: there is no file gone.csv."),
        (["data.eval=[{path: gone.csv}]"], "error data.eval: there is no file gone.csv."),
        (["model.name=/gone/model"], "error model.name: there is no model at /gone/model."),
    ],
)
def test_a_missing_file_is_named_with_its_key_before_the_model_is_read(
    qlora: Qlora,
    config_file: Path,
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    settings: list[str],
    message: str,
) -> None:
    def read(name: str, *_: Any, **__: Any) -> None:
        raise AssertionError("the model is read")

    if not settings[0].startswith("model."):
        monkeypatch.setattr("qlora_trainer.model.source.resolve_model", read)
        monkeypatch.setattr(start, "resolve_model", read)
    code, out, reported = qlora(command, config_file, *(each.replace("{rows}", str(rows)) for each in settings))
    assert (code, out) == (2, "")
    assert reported.startswith(message)


def test_a_missing_adapter_is_named_with_its_key(qlora: Qlora, config_file: Path, tmp_path: Path) -> None:
    code, _, reported = qlora("train", config_file, f"adapter.init_from={tmp_path}")
    assert code == 2
    assert reported.startswith(f"error adapter.init_from: {tmp_path} is not an adapter")


@pytest.mark.parametrize("command", ["resume", "evaluate"])
def test_a_file_that_is_gone_since_training_is_named_before_the_model_is_read(
    qlora: Qlora, config_file: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    assert qlora("train", config_file, "training.max_steps=1", "evaluation.samples=0")[0] == 0
    rows.unlink()
    for module in ("start", "trained"):
        monkeypatch.setattr(f"qlora_trainer.runs.{module}.resolve_model", lambda *_: pytest.fail("the model is read"))
    code, _, reported = qlora(command, tmp_path / "run")
    assert code == 2
    assert reported.startswith(f"error data.train: there is no file {rows}.")


def test_the_demos_config_names_each_key_to_change_for_a_model_and_rows_of_ones_own() -> None:
    comment = "".join(line for line in (ROOT / "configs/demo.yaml").read_text().splitlines(True) if line[0] == "#")
    settings = load_config(ROOT / "configs/demo.yaml").model_dump()
    written = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
    assert isinstance(settings["data"]["eval"], str)
    own = {f"{section}.{key}" for section, keys in written.items() for key, value in keys.items() if "/" in str(value)}
    assert own == {"model.name", "data.train", "data.eval", "training.output_dir"}
    assert [key for key in sorted(own) if key not in comment] == []
