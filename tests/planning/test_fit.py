"""Promises of fitting: the fastest policy that fits is found, and a run that cannot fit is refused with what would."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from large_models import LLAMA_8B
from marks import slow, slow_but

from qlora_trainer.common import machine
from qlora_trainer.common.errors import InsufficientMemoryError
from qlora_trainer.config.load import load_config, make_config, save_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning import fit as fitting
from qlora_trainer.planning.fit import (
    GRAIN,
    check_fits,
    fastest_plan,
    largest_micro_batch,
    longest_context,
)
from qlora_trainer.planning.memory_plan import Budget, MemoryPlan, plan_memory
from qlora_trainer.planning.speed import ways
from qlora_trainer.planning.variants import with_length
from qlora_trainer.runs import start as runs
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.training.memory.activations import Level, Policy
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]
PLAIN: dict[str, dict[str, Any]] = {  # no memory-efficient option; test_options.py tries those
    "model": {"embeddings": "device", "lm_head": "dense"},
    "adapter": {"dtype": "float32"},
    "optimizer": {"name": "paged_adamw_32bit"},
}
CPU: dict[str, dict[str, object]] = {"model": {"device": "cpu"}, "data": {"max_length": 512}}


@pytest.mark.slow
def test_a_search_finds_the_last_size_that_fits(llama_8b: Path) -> None:
    """On a model of few layers, against trying: what is found fits, the next size does not."""
    raw = json.loads((llama_8b / "config.json").read_text()) | {"num_hidden_layers": 4, "max_position_embeddings": 1536}
    (llama_8b / "config.json").write_text(json.dumps(raw))
    config = make_config(
        {
            **PLAIN,
            "model": {**PLAIN["model"], "name": str(llama_8b)},
            "data": {"train": "rows.jsonl", "max_length": 512},
            "training": {"activation_checkpointing": "none", "global_batch_size": 2},
        }
    )
    near = plan_memory(ModelDirectory.open(llama_8b), config)
    budget = near.total + 300 * 2**20
    longest = longest_context(ModelDirectory.open(llama_8b), config, budget)
    assert longest is not None
    assert 512 < longest.max_length < 1536
    assert (
        longest.total
        <= budget
        < plan_memory(ModelDirectory.open(llama_8b), with_length(config, longest.max_length + GRAIN)).total
    )
    largest = largest_micro_batch(ModelDirectory.open(llama_8b), config, budget)
    assert largest is not None
    assert largest.total <= budget


@pytest.fixture
def narrow_8b(llama_8b: Path, plans_once: None) -> Path:
    """The 8B's shape at a quarter of its width, with four layers."""
    shape = {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8, "num_key_value_heads": 2}
    raw = LLAMA_8B | shape | {"num_hidden_layers": 4, "vocab_size": 8192, "max_position_embeddings": 8192}
    (llama_8b / "config.json").write_text(json.dumps(raw))
    return llama_8b


def named(directory: Path, **training: Any) -> RunConfig:
    data = {"train": "rows.jsonl", "max_length": 2048}
    model = {**PLAIN["model"], "name": str(directory)}
    return make_config({**PLAIN, "model": model, "data": data, "training": training})


@pytest.mark.slow
def test_auto_takes_the_fastest_policy_that_fits(narrow_8b: Path) -> None:
    """Each time a byte less than the last one needs: layers are kept one by one no more, then offloaded, then tiled."""
    path = narrow_8b / "config.json"  # of four layers the inputs are so few that offloading is lost in the rounding
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 6}))
    config, host = named(narrow_8b), 2**40
    plan = fastest_plan(ModelDirectory.open(narrow_8b), config, Budget(2**40, host))
    found = []
    while plan is not None:
        found.append(plan)
        smaller = fastest_plan(ModelDirectory.open(narrow_8b), config, Budget(plan.total - 1, host))
        assert smaller is None or smaller.total < plan.total
        plan = smaller
    assert found[0].policy == Policy("none")
    recomputing = [plan for plan in found if plan.policy.level == "full"]
    kept = [plan.policy.uncheckpointed_layers for plan in recomputing]
    assert len(kept) >= 2
    assert kept == sorted(kept, reverse=True)
    keeping_none = fitting.plan_memory(
        ModelDirectory.open(narrow_8b), named(narrow_8b, activation_checkpointing="full")
    )
    assert recomputing[-1].total == keeping_none.total, "one layer is kept where that takes no more than none"
    assert [plan.policy.level for plan in found if plan not in recomputing] == ["none", "offload", "tiled"]


@pytest.mark.slow
def test_short_host_memory_keeps_every_second_or_third_input_there(narrow_8b: Path) -> None:
    whole = plan_memory(ModelDirectory.open(narrow_8b), named(narrow_8b, activation_checkpointing="tiled"))
    assert whole.host == 4 * 2048 * 1024 * 2
    for share, every in ((2, 2), (3, None)):
        found = fastest_plan(
            ModelDirectory.open(narrow_8b), named(narrow_8b), Budget(whole.total + 2**20, whole.host // share)
        )
        assert (
            found and found.policy.offload_every_n_layers
        ) == every  # a third of four layers' inputs: two are needed


def refused(directory: ModelDirectory, config: RunConfig, budget: Budget) -> str:
    """The message with which a run is refused."""
    with pytest.raises(InsufficientMemoryError) as raised:
        check_fits(directory, config, budget)
    return str(raised.value)


@pytest.mark.usefixtures("plans_once")
@pytest.mark.parametrize(
    ("training", "tokens", "advice"),
    slow_but(
        [
            ({"activation_checkpointing": "none"}, 512, ["activation_checkpointing"]),
            (
                {"activation_checkpointing": "full", "uncheckpointed_layers": 2},
                512,
                ["uncheckpointed_layers"],
            ),
            ({"micro_batch_tokens": 1024}, 512, ["micro_batch_tokens"]),
            (
                {"activation_checkpointing": "none", "micro_batch_tokens": 1024},
                512,
                ["micro_batch_tokens", "activation_checkpointing"],
            ),
            ({}, 256, ["max_length"]),
            (
                {"activation_checkpointing": "none", "micro_batch_tokens": 1024},
                256,
                ["max_length", "micro_batch_tokens", "activation_checkpointing"],
            ),
        ],
        ({"activation_checkpointing": "none"}, 512, ["activation_checkpointing"]),
    ),
    ids=str,
)
def test_a_run_that_cannot_fit_is_refused_with_what_would(
    tiny_config: Config, tiny_llama: Path, tmp_path: Path, training: dict[str, Any], tokens: int, advice: list[str]
) -> None:
    """With what rows of 512 tokens, or of 256, need where layers are recomputed; the message's settings, followed."""
    directory = ModelDirectory.open(tiny_llama)
    settings = {**PLAIN, "model": {**PLAIN["model"], "device": "cpu"}}
    config = tiny_config(**settings, data={"max_length": 512}, training=training)
    least = tiny_config(**settings, data={"max_length": tokens}, training={"activation_checkpointing": "full"})
    budget = Budget(fitting.plan_memory(directory, least).total, 0)
    message = refused(directory, config, budget)
    found = re.search(r" It fits with ([^ ]+=[^ ]+(?: [^ ]+=[^ ]+)*)\.$", message)
    assert found, message
    words = found[1].split()
    named = [word.partition("=")[0].partition(".")[2] for word in words]
    assert named[: len(advice)] == advice
    assert ("data.max_length=256" in words) == (tokens == 256)
    save_config(config, tmp_path / "config.yaml")
    followed = load_config(tmp_path / "config.yaml", words)
    assert budget.holds(check_fits(directory, followed, budget))


@pytest.mark.slow
@pytest.mark.usefixtures("plans_once")
def test_where_no_row_fits_that_is_said(tiny_config: Config, tiny_llama: Path) -> None:
    assert "No row length fits" in refused(ModelDirectory.open(tiny_llama), tiny_config(), Budget(2**20, 2**40))


@pytest.mark.slow
def test_rows_are_no_longer_than_what_fits_without_the_hosts_memory(narrow_8b: Path) -> None:
    """On a card, where longer rows would fit if their inputs were offloaded."""
    directory = ModelDirectory.open(narrow_8b)
    config = named(narrow_8b).replace({"data.max_length": 4096})
    whole = fitting.plan_memory(directory, named(narrow_8b, activation_checkpointing="full"))
    budget = Budget(whole.total, 0)
    found = re.search(r"It fits with data\.max_length=(\d+)\.$", refused(directory, config, budget))
    assert found
    assert int(found[1]) >= 2048
    assert budget.holds(check_fits(directory, with_length(config, int(found[1])), budget))


@pytest.mark.slow
@pytest.mark.usefixtures("plans_once")
def test_too_little_host_memory_is_reported(tiny_config: Config, tiny_llama: Path) -> None:
    offloading = tiny_config(training={"activation_checkpointing": "offload"})
    with pytest.raises(InsufficientMemoryError, match=r"in host memory, where 0\.00 GiB are free"):
        check_fits(ModelDirectory.open(tiny_llama), offloading, Budget(2**40, 0))


@pytest.mark.slow
@pytest.mark.usefixtures("plans_once")
def test_a_cuda_run_is_refused_before_its_weights_are_read(
    tiny_config: Config, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "choose_device", lambda wanted: torch.device("cuda"))
    monkeypatch.setattr(runs, "paging_refusal", lambda device: "")
    monkeypatch.setattr(runs, "pace_here", lambda *arguments: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2**20, 2**30))
    monkeypatch.setattr(runs, "load_base", lambda *arguments: pytest.fail("the weights were read"))
    config = tiny_config()
    with pytest.raises(InsufficientMemoryError, match="This run needs"):
        start_run(config)
    assert not Path(config.training.output_dir).exists()


@pytest.mark.slow
@pytest.mark.usefixtures("plans_once")
def test_a_cpu_run_of_a_large_base_is_planned_and_takes_the_policy_that_fits(
    tiny_config: Config, fitting_in: list[tuple[int, Level]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(**CPU)
    free = {"available": fitting_in[0][0]}
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=2**40, **free))
    monkeypatch.setattr(machine, "CGROUP_LIST", Path("/no such file"))
    assert start_run(config).plan is None, "a small base is not worth it"
    monkeypatch.setattr(fitting, "SMALLEST_PLANNED", 0)
    for needed, level in fitting_in:
        free["available"] = math.ceil(needed / (1 - fitting.HOST_RESERVE)) + 1
        run = start_run(tiny_config(**CPU, training={"output_dir": f"{config.training.output_dir}-{level}"}))
        assert run.plan is not None
        assert run.plan.policy == run.state.policy == Policy(level)
    free["available"] = 2**20
    monkeypatch.setattr(runs, "load_base", lambda *arguments: pytest.fail("the weights were read"))
    with pytest.raises(InsufficientMemoryError, match="GiB of memory under"):
        start_run(tiny_config(**CPU, training={"output_dir": f"{config.training.output_dir}-refused"}))


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["none", slow("auto")])
def test_a_resumed_run_is_planned_as_it_goes_on(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, activations: str
) -> None:
    """What had been lowered is neither chosen anew nor refused."""
    monkeypatch.setattr(fitting, "SMALLEST_PLANNED", 0)
    run = start_run(tiny_config(training={"activation_checkpointing": activations, "max_steps": 2}))
    run.state.set_memory(run.state.loader.micro_batch_tokens, Policy("full"))
    run.save()
    asked: list[str] = []

    def noted(directory: ModelDirectory, config: RunConfig, layers: int | None = None) -> MemoryPlan:
        asked.append(config.training.activation_checkpointing)
        return plan_memory(directory, config, layers)

    monkeypatch.setattr(ways, "plan_memory", noted)
    resumed = resume_run(run.directory)
    assert resumed.plan is not None
    assert resumed.plan.policy == resumed.state.policy == Policy("full")
    assert asked == ["full"]


@pytest.mark.parametrize(("optimizer", "order"), [("paged_adamw_32bit", ["trial", "memory"]), ("adamw", ["memory"])])
def test_paging_is_tried_before_the_cards_memory_is_asked_for(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, optimizer: str, order: list[str]
) -> None:
    """Asking makes a CUDA context, and a card in exclusive mode has one at a time."""
    asked: list[str] = []

    def mem_get_info() -> tuple[int, int]:
        asked.append("memory")
        return 2**30, 24 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fitting, "paging_refusal_here", lambda: asked.append("trial"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    assert fitting.memory_here(tiny_config(optimizer={"name": optimizer})) == 24 * 2**30
    assert asked == order
