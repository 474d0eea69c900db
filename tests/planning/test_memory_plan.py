"""The plan's promises: it is the step itself, it counts as real memory counts, and it says what fits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cards import a_card_is_here
from marks import slow_but

from qlora_trainer.cli.plan import describe
from qlora_trainer.common.units import gib
from qlora_trainer.config.load import make_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.model import forward
from qlora_trainer.planning import fit as fitting
from qlora_trainer.planning import memory_plan as planning
from qlora_trainer.planning.empty_run import empty_run, longest_pack
from qlora_trainer.planning.memory_plan import Budget, plan_memory
from qlora_trainer.planning.step_memory import (
    ACTIVATIONS,
    ADAPTERS,
    BASE,
    DENSE,
    GRADIENTS,
    HEAD,
    PAGED,
    PAGED_ELEMENTS,
    STATE,
    track_steps,
)
from qlora_trainer.runs.report.summary import write_run_report
from qlora_trainer.runs.start import start_run
from qlora_trainer.training import step
from qlora_trainer.training.memory.activations import choose_policy, offloaded_bytes
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]
SETTINGS: list[dict[str, dict[str, Any]]] = [
    {"training": {"activation_checkpointing": "none"}},
    {"training": {"activation_checkpointing": "full"}},
    {"training": {"activation_checkpointing": "full", "micro_batch_tokens": 256}, "adapter": {"rank": 16}},
    {
        "training": {"activation_checkpointing": "none", "neftune_noise_alpha": 5.0},
        "data": {"max_length": 256},
        "adapter": {"dropout": 0.1},
    },
    {"training": {"activation_checkpointing": "full"}, "data": {"max_length": 512}, "optimizer": {"name": "adamw"}},
    {
        "training": {"activation_checkpointing": "none"},
        "adapter": {"rank": 32},
        "optimizer": {"name": "paged_adamw_8bit"},
    },
    {"training": {"activation_checkpointing": "full"}, "data": {"packing": False, "max_length": 256}},
    {
        "training": {"activation_checkpointing": "none"},
        "adapter": {"target_modules": ["q_proj", "v_proj"], "bias": "all"},
    },
    {"training": {"activation_checkpointing": "full", "uncheckpointed_layers": 1}, "data": {"max_length": 256}},
    {"training": {"activation_checkpointing": "offload"}, "adapter": {"dropout": 0.1}},
    {"training": {"activation_checkpointing": "offload", "offload_every_n_layers": 2}, "data": {"max_length": 256}},
    {"training": {"activation_checkpointing": "tiled"}, "data": {"max_length": 512}},
    {"model": {"embeddings": "cpu"}},
    {"model": {"lm_head": "8bit"}},
    {"model": {"lm_head": "4bit"}, "training": {"activation_checkpointing": "full"}},
    {"adapter": {"dtype": "bfloat16", "rank": 16}},
    {"adapter": {"kind": "bottleneck", "bottleneck_size": 16}, "training": {"activation_checkpointing": "none"}},
    {"adapter": {"kind": "bottleneck"}, "training": {"activation_checkpointing": "full"}, "data": {"max_length": 256}},
    {
        "model": {"embeddings": "cpu", "lm_head": "4bit"},
        "adapter": {"dtype": "bfloat16"},
        "optimizer": {"name": "paged_adamw_8bit"},
        "training": {"activation_checkpointing": "offload"},
    },
]
MEMORY_EFFICIENT = SETTINGS[-1]


FAMILIES = ["llama_tied", "mistral", "gemma2", "gemma3", "qwen2", "phi3"]
COMPARED = [("llama", setting) for setting in SETTINGS] + [(family, SETTINGS[1]) for family in FAMILIES]
COMPARED += [("llama_tied", MEMORY_EFFICIENT), ("gemma3", MEMORY_EFFICIENT)]


@pytest.mark.parametrize(
    ("family", "changes"), slow_but(COMPARED, ("llama", SETTINGS[1]), ("gemma3", SETTINGS[-1])), ids=str
)
def test_fake_and_real_steps_take_the_same_bytes(
    tiny_config: Config, tiny_models: Callable[[str], Path], family: str, changes: dict[str, Any]
) -> None:
    directory = tiny_models(family)
    config = tiny_config(**{**changes, "model": {**changes.get("model", {}), "name": str(directory)}})
    policy = choose_policy(config.training, torch.device("cpu"))
    state, pack, fake = empty_run(ModelDirectory.open(directory), config, torch.float32, policy)
    with fake:
        planned, _ = track_steps(state, pack)

    real = start_run(config).state
    real_pack = longest_pack(ModelDirectory.open(directory), config, real.loader.packing)
    measured, _ = track_steps(real, real_pack)
    assert planned.peak == measured.peak
    assert [event.bytes for event in planned.trace] == [event.bytes for event in measured.trace]
    # The second step is the first once more, and so a plan takes but one.
    trace = [event.bytes for event in planned.trace]
    second = trace[planned.began :]
    assert trace[planned.began - len(second) : planned.began] == second
    assert sum(second) == 0


def with_live_tensor(monkeypatch: pytest.MonkeyPatch, numel: int) -> None:
    """Make the step hold one more fp32 tensor."""
    original = forward.loss_sum

    def hoarding(model: Any, pack: Any, path: Any) -> torch.Tensor:
        model.extra = torch.empty(numel, device=pack.input_ids.device)
        return original(model, pack, path)

    monkeypatch.setattr(step, "loss_sum", hoarding)


def test_a_change_of_the_step_changes_the_plan(
    tiny_config: Config, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plan_memory(ModelDirectory.open(tiny_llama), tiny_config())
    with_live_tensor(monkeypatch, numel=10_000)
    after = plan_memory(ModelDirectory.open(tiny_llama), tiny_config())
    assert after.allocated - before.allocated == 40_000
    assert after.components[ACTIVATIONS] - before.components[ACTIVATIONS] == 40_000


@pytest.mark.slow
def test_a_window_costs_a_card_nothing(tiny_config: Config, tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    """Flash attention takes it there, in the memory it takes without."""
    windowed = tiny_models("mistral")
    config = json.loads((windowed / "config.json").read_text())
    assert config["sliding_window"] == 6
    (tmp_path / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    settings = tiny_config(training={"activation_checkpointing": "none"})
    plain, planned = (plan_memory(ModelDirectory.open(directory), settings) for directory in (tmp_path, windowed))
    assert planned.allocated == plain.allocated
    assert planned.attention == plain.attention == "flash attention over packed documents"


def test_components_sum_to_what_the_card_must_hold(tiny_config: Config, tiny_llama: Path) -> None:
    plan = plan_memory(ModelDirectory.open(tiny_llama), tiny_config(adapter={"rank": 64}))
    parts = plan.components
    assert plan.total == plan.reserved + parts[PAGED] + parts[planning.CONTEXT]
    assert plan.reserved == plan.allocated + parts[planning.SLACK]
    run = start_run(tiny_config(adapter={"rank": 64}, model={"compute_dtype": "bfloat16"}))
    assert parts[BASE] + parts[HEAD] + parts[DENSE] == run.base.bytes
    (group,) = run.state.groups
    assert parts[ADAPTERS] == parts[GRADIENTS] == group.data.nbytes
    # Of the same bytes the moments page, as the group has over 100,000 numbers.
    assert group.data.numel() > PAGED_ELEMENTS
    assert parts[PAGED] == run.state.optimizer.state_bytes
    assert parts[STATE] == 0


@pytest.mark.slow
def test_memory_options_take_what_they_say(tiny_config: Config, tiny_llama: Path) -> None:
    """Of the dense embeddings and head, bf16 each, one goes to the host, and the other becomes codes and scales."""

    def planned(**changes: dict[str, Any]) -> planning.MemoryPlan:
        return plan_memory(ModelDirectory.open(tiny_llama), tiny_config(**changes))

    plain, host = planned(), planned(model={"embeddings": "cpu"})
    dense = plain.components[HEAD] // 2
    assert (host.host, host.components[HEAD]) == (dense, dense)
    assert host.base_parameters == plain.base_parameters
    numbers = dense // 2
    eight, four = planned(model={"lm_head": "8bit"}), planned(model={"lm_head": "4bit"})
    assert eight.components[HEAD] == dense + numbers + 4 * (numbers // 64)
    assert dense + 0.5 * numbers < four.components[HEAD] < dense + 0.55 * numbers + 4 * 256
    assert eight.base_parameters == four.base_parameters == plain.base_parameters
    halved = planned(adapter={"dtype": "bfloat16", "rank": 64})
    whole = planned(adapter={"rank": 64})
    for part in (ADAPTERS, GRADIENTS):
        assert 2 * halved.components[part] == whole.components[part]
    assert halved.components[PAGED] == whole.components[PAGED], "Adam's moments stay fp32"


@pytest.mark.slow
def test_small_state_and_plain_adamw_do_not_page(tiny_config: Config, tiny_llama: Path) -> None:
    small = plan_memory(ModelDirectory.open(tiny_llama), tiny_config(adapter={"rank": 2}))
    plain = plan_memory(ModelDirectory.open(tiny_llama), tiny_config(adapter={"rank": 64}, optimizer={"name": "adamw"}))
    for plan in (small, plain):
        assert plan.components[PAGED] == 0
        assert plan.components[STATE] >= 2 * plan.components[ADAPTERS]


@pytest.mark.slow
def test_live_bytes_are_linear_in_like_layers(llama_8b: Path) -> None:
    config = make_config({"model": {"name": str(llama_8b)}, "data": {"train": "rows.jsonl", "max_length": 1024}})
    two, three, seven = (plan_memory(ModelDirectory.open(llama_8b), config, layers).allocated for layers in (2, 3, 7))
    assert seven - two == 5 * (three - two)


@pytest.mark.parametrize("every", slow_but([1, 2, 3], 2))
@pytest.mark.parametrize("level", slow_but(["offload", "tiled", "full"], "offload"))
def test_what_recovery_expects_on_the_host_is_what_is_planned_there(
    tiny_config: Config, tiny_llama: Path, level: str, every: int
) -> None:
    every = every if level != "full" else 1
    plan = plan_memory(
        ModelDirectory.open(tiny_llama),
        tiny_config(training={"activation_checkpointing": level, "offload_every_n_layers": every}),
    )
    model = start_run(tiny_config(f"run-{level}-{every}", model={"compute_dtype": "bfloat16"})).base.model
    assert offloaded_bytes(model, plan.policy, plan.micro_batch_tokens) == plan.host


def test_a_plan_for_a_cpu_is_what_its_step_takes(tiny_config: Config, tiny_llama: Path) -> None:
    config = tiny_config(model={"device": "cpu"}, training={"activation_checkpointing": "full"})
    plan = plan_memory(ModelDirectory.open(tiny_llama), config)
    run = start_run(config)
    pack = longest_pack(ModelDirectory.open(tiny_llama), config, packing=True)
    live, _ = track_steps(run.state, pack)
    assert plan.total == plan.allocated == plan.reserved == live.peak.bytes
    assert plan.host == plan.components[planning.CONTEXT] == plan.components[planning.SLACK] == 0
    assert describe(plan, Budget(2**40, 0))[-1][0] == f"in {gib(2**40)} of host memory"


def test_a_cpu_run_ends_with_its_peak_next_to_the_plan(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "SMALLEST_PLANNED", 0)
    run = start_run(tiny_config(training={"max_steps": 1}))
    assert run.plan is not None
    assert run.program_bytes is not None
    assert run.train(lambda record: None)
    page = write_run_report(run).read_text()
    assert "memory of the process" in page
    assert f"planned {gib(run.plan.total + run.program_bytes)}" in page


@pytest.mark.slow
def test_the_report_sets_the_peak_next_to_the_plan(
    tiny_config: Config, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run(tiny_config(training={"max_steps": 1}))
    assert run.train(lambda record: None)
    run.plan = plan_memory(ModelDirectory.open(tiny_llama), run.config)
    run.base.device = torch.device("cuda")
    a_card_is_here(monkeypatch, (8, 6))
    page = write_run_report(run).read_text()
    assert "planned memory" in page
    assert f"planned {gib(run.plan.allocated)}" in page
