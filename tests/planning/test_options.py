"""Promises of memory-efficient options: taken only where a run fits no other way, the cheapest first, and kept."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from marks import slow_but

from qlora_trainer.common import machine
from qlora_trainer.common.errors import CheckpointError
from qlora_trainer.common.units import parse_bytes
from qlora_trainer.config.load import load_config, make_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning import fit as fitting
from qlora_trainer.planning.fit import check_fits, fastest_plan
from qlora_trainer.planning.memory_plan import Budget, plan_memory
from qlora_trainer.planning.options import changed_options, option_steps, options_in_words
from qlora_trainer.runs import start
from qlora_trainer.runs.pace import pace_here
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]


def steps(directory: Path, **sections: dict[str, Any]) -> list[str]:
    """What each step changes from the plain values, as settings."""
    sections["model"] = {**sections.get("model", {}), "name": str(directory)}
    config = make_config({"data": {"train": "rows.jsonl"}, **sections})
    found = option_steps(ModelDirectory.open(directory), config)
    return [options_in_words(changed_options(config, step.memory_options())) for step in found]


def test_options_come_in_the_order_of_what_they_cost(tiny_llama: Path) -> None:
    embedding, adam = "model.embeddings=cpu", "optimizer.name=paged_adamw_8bit"
    assert steps(tiny_llama) == [
        "",
        embedding,
        f"{embedding} {adam}",
        f"{embedding} model.lm_head=8bit {adam}",
        f"{embedding} model.lm_head=8bit adapter.dtype=bfloat16 {adam}",
        f"{embedding} model.lm_head=4bit adapter.dtype=bfloat16 {adam}",
    ]


def test_a_tied_embedding_moves_together_with_a_quantized_head(tiny_models: Callable[[str], Path]) -> None:
    tied = tiny_models("llama_tied")
    found = steps(tied)
    assert found[1] == "optimizer.name=paged_adamw_8bit"
    assert found[2] == "model.embeddings=cpu model.lm_head=8bit optimizer.name=paged_adamw_8bit"
    assert not any("embeddings" in step for step in steps(tied, model={"lm_head": "dense"}))
    assert steps(tied, model={"lm_head": "8bit"})[1] == "model.embeddings=cpu"


def test_what_the_config_sets_is_never_changed(tiny_llama: Path) -> None:
    fixed = {"model": {"embeddings": "device", "lm_head": "dense"}, "adapter": {"dtype": "float32"}}
    assert steps(tiny_llama, **fixed, optimizer={"name": "paged_adamw_32bit"}) == [""]
    assert steps(tiny_llama, **fixed) == ["", "optimizer.name=paged_adamw_8bit"]


def test_adapters_of_torchs_adamw_stay_in_float32(tiny_llama: Path) -> None:
    assert not any("bfloat16" in step for step in steps(tiny_llama, optimizer={"name": "adamw"}))


@pytest.mark.usefixtures("plans_once")
@pytest.mark.parametrize("level", slow_but(["full", "auto"], "full"))
def test_the_first_options_that_fit_are_taken(tiny_config: Config, tiny_llama: Path, level: str) -> None:
    """With a byte less than the plain options need, and with a byte less than that needs, to the end."""
    directory = ModelDirectory.open(tiny_llama)
    config = tiny_config(model={"device": "cpu"}, training={"activation_checkpointing": level})
    levels = ["none", "full", "offload", "tiled"] if level == "auto" else [level]
    needed = {
        options_in_words(step.memory_options()): min(
            fitting.plan_memory(directory, step.replace({"training.activation_checkpointing": each})).total
            for each in levels
        )
        for step in option_steps(directory, config)
    }
    budget, taken = max(needed.values()), []
    while (plan := fastest_plan(directory, config, Budget(budget, 2**40))) is not None:
        assert plan.total <= budget
        first = next(options for options, total in needed.items() if total <= budget)
        assert options_in_words(plan.options) == first
        taken.append(first)
        budget = min(plan.total, needed[first]) - 1
    assert budget < min(needed.values())
    assert len(set(taken)) >= 3


@pytest.mark.usefixtures("plans_once")
def test_a_run_keeps_the_options_that_were_chosen_for_it(
    tiny_config: Config, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in its config, so a resumed run has them where it would fit without; other ones would be another run."""
    memory = SimpleNamespace(total=2**40, available=2**40)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(machine, "CGROUP_LIST", Path("/no such file"))
    config = tiny_config(
        model={"device": "cpu", "embeddings": "device"},
        optimizer={"name": "paged_adamw_32bit"},
        training={"activation_checkpointing": "full", "micro_batch_tokens": 128, "max_steps": 2},
    )
    # One way is planned for each option; that no other is looked for to be named saves a dozen plans.
    monkeypatch.setattr(start, "pace_here", lambda *words: dataclasses.replace(pace_here(*words), names_faster=False))
    directory = ModelDirectory.open(tiny_llama)
    assert start_run(config).config.memory_options() == config.memory_options(), "a small base is not planned"
    monkeypatch.setattr(fitting, "SMALLEST_PLANNED", 0)
    memory.available = fitting.plan_memory(directory, config).total - 1
    run = start_run(config.replace({"training.output_dir": f"{config.training.output_dir}-tight"}))
    assert run.plan is not None
    chosen = changed_options(config, run.plan.options)
    assert chosen == {"model.lm_head": "8bit"}
    assert any(options_in_words(chosen) in warning for warning in run.warnings)
    assert load_config(run.directory / "config.yaml").memory_options() == run.plan.options
    memory.available = 2**40
    resumed = resume_run(run.directory)
    assert resumed.plan is not None
    assert resumed.plan.options == run.plan.options
    assert resumed.config == run.config
    with pytest.raises(CheckpointError, match=r"model\.lm_head: 8bit → dense"):
        resume_run(run.directory, ["model.lm_head=dense"])


@pytest.mark.slow
def test_an_8_gb_card_gets_the_options_by_itself(llama_8b: Path) -> None:
    """Rows of 2,972 tokens at rank 32, which the plain options do not hold there."""
    raw = {"model": {"name": str(llama_8b)}, "adapter": {"rank": 32}, "data": {"train": "rows.jsonl"}}
    config = make_config(raw).replace({"data.max_length": 2972})
    budget = Budget(parse_bytes("8GB"), parse_bytes("16GB"))
    plan = check_fits(ModelDirectory.open(llama_8b), config, budget)
    assert budget.holds(plan)
    assert plan.options["model.embeddings"] == "cpu"
    plain = config.replace(config.memory_options() | {"training.activation_checkpointing": "tiled"})
    assert not budget.holds(plan_memory(ModelDirectory.open(llama_8b), plain))
    assert dataclasses.asdict(plan)["options"] == plan.options
