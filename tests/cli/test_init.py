"""qlora init asks nothing, and writes a config that is read as what it planned and fits the card it was written for."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_trainer.cli.init import heading
from qlora_trainer.config.commented import FIRST_KEYS, commented_yaml
from qlora_trainer.config.load import load_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning import first_config
from qlora_trainer.planning.first_config import settings_that_fit
from qlora_trainer.planning.fit import reserve_of
from qlora_trainer.planning.memory_plan import Budget, MemoryPlan, plan_memory
from qlora_trainer.planning.speed.cards import card_named
from qlora_trainer.planning.speed.choice import Speed
from qlora_trainer.planning.speed.rates import rates_of_card
from qlora_trainer.runs import pace as pacing
from qlora_trainer.training.memory.activations import Policy
from qlora_trainer.training.state import with_policy
from qlora_trainer.weights.model_directory import ModelDirectory

Qlora = Callable[..., tuple[int, str, str]]
Config = Callable[..., RunConfig]


@pytest.mark.slow
def test_what_init_writes_is_trained_as_it_is(
    qlora: Qlora, tiny_llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(directory: ModelDirectory, config: RunConfig, *_: object) -> MemoryPlan:
        return plan_memory(directory, with_policy(config, Policy("full")))  # one plan, where a search makes several

    monkeypatch.setattr(first_config, "fastest_plan", planned)
    path = tmp_path / "mine.yaml"
    words = ("--model", tiny_llama, "--data", rows, "--rank", 4)
    code, out, reported = qlora("init", path, *words, "--gpu-memory", "16GB")
    assert code == 0, reported
    assert out.splitlines()[-1] == f"Next:    qlora train {path}"
    config = load_config(path)
    assert (config.model.name, config.data.train) == (str(tiny_llama), str(rows))
    assert (config.adapter.rank, config.adapter.alpha) == (4, 8.0)
    assert config.data.max_length == 512, "the model's positions, less than the default"
    assert {config.value(key) for key in config.memory_options()} == {"auto"}, "a plain option is chosen at each start"
    code, out, reported = qlora("train", path, "--output", tmp_path / "run", "training.max_steps=1")
    assert code == 0, reported
    code, _, reported = qlora("init", path, *words, "--gpu-memory", "16GB")
    assert code == 2
    assert "exists. Name another file: qlora init FILE.yaml" in reported


def test_the_yaml_is_read_as_the_config_and_explains_each_key(tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config(data={"columns": {"prompt": "a: b # c"}, "train_on": ["assistant", "tool"]})
    text = commented_yaml(
        config, ["Two paragraphs, the first of which is long enough to be broken: " + 12 * "word ", "x"]
    )
    (tmp_path / "c.yaml").write_text(text)
    assert load_config(tmp_path / "c.yaml") == config
    said = " ".join(line.strip().removeprefix("# ") for line in text.splitlines() if line.strip().startswith("#"))
    for key in (*FIRST_KEYS, "data.columns", "training.max_steps"):
        section, _, name = key.partition(".")
        assert str(type(getattr(config, section)).model_fields[name].description) in said
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(("longest", "length"), [(100, 128), (200, 256), (400, 512), (9_000, 512)])
def test_rows_get_the_length_of_the_longest_if_it_fits(
    tiny_config: Config, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, longest: int, length: int
) -> None:
    """Never less than the config's, never more than the model's positions."""
    directory = ModelDirectory.open(tiny_llama)
    fixed = tiny_config(model={"device": "cpu"}, training={"activation_checkpointing": "full"})
    plan = plan_memory(directory, fixed)
    monkeypatch.setattr(first_config, "fastest_plan", lambda *_: plan)
    config, found = settings_that_fit(directory, fixed, longest, Budget(2**40, 2**40))
    assert (config.data.max_length, found) == (length, plan)
    assert config.memory_options() == plan.options


def test_where_the_longest_row_does_not_fit_the_longest_that_does_is_taken(
    tiny_config: Config, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = ModelDirectory.open(tiny_llama)
    fixed = tiny_config(model={"device": "cpu"}, training={"activation_checkpointing": "full"})
    shorter = plan_memory(directory, fixed.replace({"data.max_length": 256, "model.lm_head": "4bit"}))
    monkeypatch.setattr(first_config, "fastest_plan", lambda *_: None)
    monkeypatch.setattr(first_config, "longest_context", lambda *_: shorter)
    config, plan = settings_that_fit(directory, fixed, 400, Budget(shorter.total, 0))
    assert (config.data.max_length, config.model.lm_head, plan) == (256, "4bit", shorter)
    said = " ".join(heading(plan, shorter.total, 400, 20))
    assert "the longest of 400 tokens; longer ones are cut at 256, as no more fits" in said
    assert "memory-efficient options: model.lm_head=4bit" in said


@pytest.mark.parametrize("is_here", [True, False], ids=["a GPU is here", "no GPU is here"])
def test_init_plans_as_plan_and_train_do(
    qlora: Qlora,
    tiny_config: Config,
    tiny_llama: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_here: bool,
) -> None:
    """A card's reserve is left free, and the way is the fastest for the rows, if the card is known."""
    config = tiny_config(model={"device": "auto"}, training={"activation_checkpointing": "full"})
    plan = plan_memory(ModelDirectory.open(tiny_llama), config)
    asked = []

    def planned(directory: ModelDirectory, config: RunConfig, budget: Budget, progress: Any, pace: Any) -> MemoryPlan:
        asked.append((config, budget, pace))
        return plan

    monkeypatch.setattr(first_config, "fastest_plan", planned)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_here)
    monkeypatch.setattr(pacing, "rates_here", lambda device: rates_of_card(card_named("4090")))
    code, _, reported = qlora(
        "init", tmp_path / "c.yaml", "--model", tiny_llama, "--data", rows, "--gpu-memory", "16GB"
    )
    assert code == 0, reported
    ((config, budget, pace),) = asked
    assert budget.reserve == reserve_of(16 * 10**9) > 0
    if not is_here:
        assert pace is None
        return
    assert pace.rates.name == "RTX 4090"
    lengths = [length for step in pace.steps.rows for length in step]
    assert sum(lengths) < len(lengths) * config.data.max_length, "the rows' own lengths"
    assert pace.steps.count == config.training.epochs * len(pace.steps.rows)


def test_a_config_says_which_micro_batches_it_was_planned_with(tiny_config: Config, tiny_llama: Path) -> None:
    directory = ModelDirectory.open(tiny_llama)
    fixed = tiny_config(model={"device": "cpu"}, training={"activation_checkpointing": "full"})
    plan = plan_memory(directory, fixed)
    assert "in micro-batches of one longest row: auto" in " ".join(heading(plan, plan.total, 40, 20))
    timed = dataclasses.replace(plan, speed=Speed(1.0, 0.0, 1.0, 4096, "a card", "", True, "", None, None))
    assert "in micro-batches of up to 4,096 tokens: auto" in " ".join(heading(timed, plan.total, 40, 20))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [],
            "error --model Qwen/Qwen3-8B and --data rows.jsonl are missing: "
            "qlora init --model Qwen/Qwen3-8B --data rows.jsonl",
        ),
        (["--model", "owner/model"], "missing: qlora init --model owner/model --data rows.jsonl"),
        (["--model", "{model}", "--data", "gone.jsonl"], "data.train: there is no file gone.jsonl."),
        (["--model", "gone", "--data", "{rows}"], "There is no model at gone. A hub name has the form owner/model."),
        (["--model", "{model}", "--data", "{rows}", "--gpu-memory", "8"], "write it as 24GiB"),
    ],
)
def test_a_mistake_of_init_is_one_message_and_writes_nothing(
    qlora: Qlora, tiny_llama: Path, rows: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    filled = [word.replace("{rows}", str(rows)).replace("{model}", str(tiny_llama)) for word in words]
    code, out, reported = qlora("init", tmp_path / "c.yaml", *filled)
    assert (code, out) == (2, "")
    assert message.lower() in reported.lower()
    assert not (tmp_path / "c.yaml").exists()


@pytest.mark.slow
def test_what_init_writes_for_8_gb_fits_them(qlora: Qlora, tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    assert qlora("init", path, "--model", tiny_llama, "--data", rows, "--gpu-memory", "8GB")[0] == 0
    code, out, _ = qlora("plan", path, "--gpu-memory", "8GB", "--no-search", "--json")
    assert code == 0
    assert json.loads(out)["fits"] is True
