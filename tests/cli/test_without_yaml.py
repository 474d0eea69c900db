"""A run needs no YAML: --model and --data are enough, options set keys, and mistakes are reported in plain words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_trainer.cli.arguments import read_settings
from qlora_trainer.common.errors import QLoRATrainerError
from qlora_trainer.config.load import load_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.runs import start

Qlora = Callable[..., tuple[int, str, str]]
FEW_STEPS = ("training.max_steps=1", "evaluation.samples=0", "data.max_length=128", "model.device=cpu")


def test_a_model_and_rows_are_enough(qlora: Qlora, tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, reported = qlora("train", "--model", tiny_llama, "--data", rows, "--output", run, *FEW_STEPS)
    assert code == 0, reported
    assert f"Adapter: {run}/adapter" in out
    config = load_config(run / "config.yaml")
    assert (config.model.name, config.data.train, config.training.max_steps) == (str(tiny_llama), str(rows), 1)


@pytest.fixture
def settings_of(qlora: Qlora, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """The config that a command line of `qlora train` gives, without the run."""

    def settings(*words: object) -> RunConfig:
        found: list[RunConfig] = []

        def stop(config: RunConfig, *_: Any) -> None:
            found.append(config)
            raise QLoRATrainerError("enough")

        monkeypatch.setattr(start, "start_run", stop)
        code, _, reported = qlora("train", *words)
        assert (code, reported) == (2, "error enough")
        return found[0]

    return settings


def test_each_option_sets_its_key(settings_of: Callable[..., RunConfig], rows: Path, tmp_path: Path) -> None:
    found = settings_of(
        *("--model", "owner/model", "--data", rows, "--eval", "0.2", "--output", tmp_path / "out", "--epochs", 3),
        *("--rank", 8, "--learning-rate", "1e-3", "--max-length", 512),
    )
    values = {
        "model.name": "owner/model",
        "data.train": str(rows),
        "data.eval": 0.2,
        "training.output_dir": str(tmp_path / "out"),
        "training.epochs": 3,
        "adapter.rank": 8,
        "adapter.alpha": 16.0,
        "optimizer.learning_rate": 1e-3,
        "data.max_length": 512,
    }
    assert {key: found.value(key) for key in values} == values
    changed = load_config(None, (), {"model.name": "owner/model", "data.train": str(rows)}).replace(values)
    assert found == changed, "all other keys have their defaults"
    assert settings_of("--model", "m/m", "--data", rows, "--eval", rows).data.eval == str(rows)


def test_an_option_counts_before_the_file_and_a_key_before_the_option(
    settings_of: Callable[..., RunConfig], config_file: Path, rows: Path
) -> None:
    assert settings_of(config_file, "--rank", 2).adapter.rank == 2
    assert settings_of(config_file, "--rank", 2, "adapter.rank=6").adapter.rank == 6
    without = settings_of("adapter.rank=6", "adapter.alpha=3", "--model", "m/m", "--data", rows)
    assert (without.adapter.rank, without.adapter.alpha) == (6, 3.0)
    assert settings_of("model.name=m/m", f"data.train={rows}").model.name == "m/m"
    not_given = {"adapter.rank": None, "model.name": "m/m"}
    assert (
        read_settings("train", None, ["data.train=r"], not_given).adapter == RunConfig.model_fields["adapter"].default
    )


def test_odd_names_are_taken_as_they_are_written(settings_of: Callable[..., RunConfig], tmp_path: Path) -> None:
    """They are values, not YAML."""
    path = tmp_path / "rows: [1] #2.jsonl"
    path.write_text('{"text": "a"}\n')
    assert settings_of("--model", "m/m", "--data", path).data.train == str(path)
    assert settings_of("--model", "m/m", "--data", path, "--output", "010").training.output_dir.endswith("/010")


def test_several_data_options_are_several_files(
    settings_of: Callable[..., RunConfig], rows: Path, tmp_path: Path
) -> None:
    more = tmp_path / "more.jsonl"
    more.write_bytes(rows.read_bytes())
    found = settings_of("--model", "m/m", "--data", rows, "--data", more).data.train
    assert [source.path for source in found if not isinstance(source, str)] == [str(rows), str(more)]


def test_rank_keeps_alpha_at_twice_the_rank_unless_alpha_is_set(
    settings_of: Callable[..., RunConfig], config_file: Path
) -> None:
    def rank_and_alpha(*words: object) -> tuple[int, float]:
        adapter = settings_of(config_file, *words).adapter
        return adapter.rank, adapter.alpha

    assert rank_and_alpha("--rank", 64) == (64, 128.0)
    assert rank_and_alpha("--rank", 64, "adapter.alpha=16") == (64, 16.0)


@pytest.mark.parametrize("option", ["--model", "--eval", "--rank", "--output"])
def test_an_option_given_twice_is_refused_by_its_name(qlora: Qlora, rows: Path, option: str) -> None:
    twice = (option, "8", f"{option}=9")
    code, _, reported = qlora("train", *([] if option == "--model" else ["--model", "m/m"]), "--data", rows, *twice)
    assert code == 2
    assert f"{option} is given twice" in reported


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--model Qwen/Qwen3-8B and --data rows.jsonl are missing"),
        (
            ["--model", "owner/model"],
            "error --data rows.jsonl is missing. Name a config, which `qlora init` writes, or type: "
            "qlora train --model owner/model --data rows.jsonl",
        ),
        (["--data", "{rows}"], "error --model Qwen/Qwen3-8B is missing"),
        (["model.name=m/m"], "qlora train --data rows.jsonl model.name=m/m"),
        (["none.yaml"], "There is no config file none.yaml. `qlora init` writes one, and "),
        (["--model", "no model", "--data", "{rows}"], "There is no model at no model. A hub name has the form owner/"),
        (["--model", "{model}", "--data", "gone.jsonl"], "data.train: there is no file gone.jsonl."),
        (["--model", "{model}", "--data", "{rows}", "--eval", "gone.jsonl"], "data.eval: there is no file gone.jsonl."),
        (["--model", "{model}", "--data", "{rows}", "--rank", "0"], "the command line has 1 problem: - adapter.rank"),
    ],
)
def test_a_mistake_is_reported_as_whoever_read_only_the_readme_needs_it(
    qlora: Qlora, tiny_llama: Path, rows: Path, words: list[str], message: str
) -> None:
    filled = [word.replace("{rows}", str(rows)).replace("{model}", str(tiny_llama)) for word in words]
    code, out, reported = qlora("train", *filled)
    assert (code, out) == (2, "")
    assert message.replace("{rows}", str(rows)).lower() in reported.lower()
    assert "Traceback" not in reported


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_reported_before_the_model_is_read(
    qlora: Qlora, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "resolve_model", lambda *_: pytest.fail("the model is read"))
    code, _, reported = qlora("train", "--model", "owner/model", "--data", rows, "model.device=cuda")
    assert code == 2
    assert "no CUDA device here. `qlora doctor` says what it sees" in reported


@pytest.mark.parametrize("words", [(), ("adapter.rank=2",)])
def test_a_plan_asks_for_a_model_alone(qlora: Qlora, words: tuple[str, ...]) -> None:
    code, _, reported = qlora("plan", *words)
    assert code == 2
    assert reported.startswith("error --model Qwen/Qwen3-8B is missing.")
    assert reported.endswith("or type: qlora plan --model Qwen/Qwen3-8B")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("train", "none.yaml"), "qlora train --model Qwen/Qwen3-8B --data rows.jsonl"),
        (("train", "none.yaml", "--data", "a.csv"), "qlora train --model Qwen/Qwen3-8B --data a.csv"),
        (("inspect", "none.yaml", "model.name=m/m"), "qlora inspect --data rows.jsonl model.name=m/m"),
        (("plan", "none.yaml"), "qlora plan --model Qwen/Qwen3-8B"),
        (("plan", "none.yaml", "--model", "m/m"), "qlora plan --model m/m"),
    ],
)
def test_a_missing_config_is_answered_with_options_that_the_command_has(
    qlora: Qlora, words: tuple[str, ...], line: str
) -> None:
    code, _, reported = qlora(*words)
    assert code == 2
    assert reported.startswith("error There is no config file none.yaml. `qlora init` writes one, and ")
    assert reported.endswith(f" has examples. Without a config, type: {line}")


def test_a_plan_needs_a_model_alone(qlora: Qlora, tiny_llama: Path) -> None:
    words = ("--max-length", 64, "--rank", 2, "--no-search", "--json", "training.activation_checkpointing=full")
    code, out, reported = qlora("plan", "--model", tiny_llama, *words)
    assert code == 0, reported
    plan = json.loads(out)["plan"]
    assert plan["max_length"] == 64


def test_rows_are_inspected_without_a_config(
    qlora: Qlora, config_file: Path, tiny_llama: Path, rows: Path, tmp_path: Path
) -> None:
    """By the options that train has, which count before a config."""
    more = tmp_path / "more.jsonl"
    more.write_bytes(rows.read_bytes())
    two = ("--data", rows, "--data", more, "--max-length", 100, "--json")
    for words in (["--model", tiny_llama, *two], [config_file, *two]):
        code, out, reported = qlora("inspect", *words)
        assert code == 0, reported
        report = json.loads(out)
        assert ([source["name"] for source in report["sources"]], report["max_length"]) == (
            ["rows.jsonl", "more.jsonl"],
            100,
        )
