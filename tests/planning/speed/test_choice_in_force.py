"""Promises of a choice by time: kept from step 0 on, taken as it is on resume, lowered by plan where it no longer fits.

On a tiny model on a CPU, whose rows of up to 64 tokens make steps of several hundred.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from marks import slow_but
from scarcity import Scarcity, same_end
from tiny_runs import quiet

from qlora_trainer.common import machine
from qlora_trainer.config.load import load_config, save_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning import fit as fitting
from qlora_trainer.planning.memory_plan import plan_memory
from qlora_trainer.planning.speed import candidates, ways
from qlora_trainer.planning.speed.cards import CAUTIOUS
from qlora_trainer.planning.speed.choice import AS_FAST, SMALLER
from qlora_trainer.planning.speed.rates import rates_of_card, rates_of_processor
from qlora_trainer.planning.speed.rows import full_rows
from qlora_trainer.runs.checkpoint import load_checkpoint, newest_checkpoint
from qlora_trainer.runs.report.summary import summarize
from qlora_trainer.runs.run import Run
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.training.memory.activations import Policy
from qlora_trainer.training.recovery import lower

Config = Callable[..., RunConfig]
pytestmark = pytest.mark.usefixtures("plans_once")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The machine's memory, to be set; a small base is planned too."""
    found = SimpleNamespace(total=2**40, available=2**40)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)
    monkeypatch.setattr(machine, "CGROUP_LIST", Path("/no such file"))
    monkeypatch.setattr(fitting, "SMALLEST_PLANNED", 0)
    return found


@pytest.fixture
def two_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the policies only two, so that a choice is planned in half the time."""
    monkeypatch.setattr(ways, "open_policies", lambda layers: [Policy("none"), Policy("full")])
    monkeypatch.setattr(candidates, "open_policies", lambda layers: [Policy("none"), Policy("full")])


@pytest.fixture
def stepped_config(tiny_config: Config) -> Config:
    def config(output: str = "run", **changes: dict) -> RunConfig:
        own = {"global_batch_size": 12, "max_steps": 4, "evaluate_every": 4, "save_every": 2}
        training = {**own, **changes.pop("training", {})}
        data = {"max_length": 64, **changes.pop("data", {})}
        return tiny_config(output, model={"device": "cpu"}, data=data, training=training, **changes)

    return config


def in_force(run: Run) -> tuple[Policy, int]:
    return run.state.policy, run.state.loader.micro_batch_tokens


@pytest.mark.usefixtures("two_levels")
def test_a_choice_is_kept_from_step_0_and_resumed_with_half_the_memory_goes_further_down(
    stepped_config: Config, memory: SimpleNamespace
) -> None:
    run = start_run(stepped_config(adapter={"rank": 2}))  # so that more than half is what a micro-batch takes
    chosen = in_force(run)
    assert chosen[0] == Policy("none")
    assert chosen[1] > 64, "several rows go through in one pass"
    _, saved = load_checkpoint(newest_checkpoint(run.directory).path)
    assert saved["training"]["memory"]["micro_batch_tokens"] == chosen[1], "from step 0 on"
    assert saved["training"]["memory"]["policy"] == dataclasses.asdict(chosen[0])
    assert not run.train(quiet, stop_after=2)
    assert run.plan is not None
    memory.available = run.plan.total // 2
    resumed = resume_run(run.directory)
    (warning,) = [warning for warning in resumed.warnings if "no longer fits the free memory" in warning]
    assert "last bits may differ" in warning
    assert in_force(resumed) != chosen
    assert resumed.plan is not None
    assert resumed.plan.total <= memory.available
    assert resumed.train(quiet)
    memory.available = 2**40
    assert in_force(resume_run(run.directory)) == in_force(resumed), "what it was lowered to is in force from then on"


@pytest.mark.parametrize(
    ("share", "then"), slow_but([("tight", 1), ("tight", 2), ("ample", 0.5)], ("tight", 2)), ids=str
)
@pytest.mark.usefixtures("two_levels")
def test_a_choice_that_fits_is_resumed_as_it_is(
    stepped_config: Config, memory: SimpleNamespace, share: str, then: float
) -> None:
    """Bit for bit: chosen with too little memory for the fastest way, which is free again on resume; or with much."""
    ample = start_run(stepped_config("ample"))
    assert ample.plan is not None
    memory.available = ample.plan.total if share == "tight" else 2**40
    whole, stopped = (start_run(stepped_config(name)) for name in ("whole", "stopped"))
    chosen = in_force(whole)
    assert (chosen == in_force(ample)) == (share == "ample")
    assert in_force(stopped) == chosen
    assert whole.train(quiet)
    assert not stopped.train(quiet, stop_after=2)
    memory.available = int(memory.available * then)
    resumed = resume_run(stopped.directory)
    assert in_force(resumed) == chosen
    assert not any("no longer fits" in warning for warning in resumed.warnings)
    assert resumed.train(quiet)
    assert same_end(whole, resumed)


@pytest.mark.slow
def test_what_no_longer_fits_may_give_way_to_smaller_micro_batches_that_keep_more(
    stepped_config: Config, memory: SimpleNamespace
) -> None:
    run = start_run(stepped_config())
    run.state.set_memory(512, Policy("full"))
    run.save()
    settings = {"training.activation_checkpointing": "full", "training.micro_batch_tokens": 512}
    memory.available = plan_memory(run.base.directory, run.config.replace(settings)).total - 1
    assert in_force(resume_run(run.directory))[0] == Policy("none")


@pytest.mark.parametrize(
    "set_by_user",
    slow_but(
        [
            {"activation_checkpointing": "full", "micro_batch_tokens": 64},
            {"micro_batch_tokens": 64},
            {"activation_checkpointing": "full", "uncheckpointed_layers": 1},
        ],
        {"activation_checkpointing": "full", "micro_batch_tokens": 64},
    ),
    ids=str,
)
@pytest.mark.usefixtures("two_levels")
def test_what_the_user_set_is_kept_and_the_faster_is_named(
    stepped_config: Config, memory: SimpleNamespace, set_by_user: dict[str, Any]
) -> None:
    """Followed as it is written, the advice gives what it names, next to which nothing is faster."""
    config = stepped_config(training=set_by_user)
    run = start_run(config)
    assert run.plan is not None
    assert run.plan.speed is not None
    own = run.state.policy.as_settings() | {"micro_batch_tokens": run.state.loader.micro_batch_tokens}
    assert set_by_user.items() <= own.items()
    shown = dict(summarize(run))
    assert shown["to keep this choice"].startswith(f"training.activation_checkpointing={run.state.policy.level}")
    assert "estimated" in shown["duration"]
    named = run.plan.speed.faster
    assert named is not None
    assert named["seconds"] < run.plan.speed.seconds / AS_FAST
    advice = shown["faster, and fits by estimate"]
    assert advice.endswith(f" s a step, by {named['settings']}")
    save_config(config, run.directory.parent / "followed.yaml")
    words = [*advice.rpartition(" by ")[2].split(), f"training.output_dir={run.directory.parent / 'followed'}"]
    followed = start_run(load_config(run.directory.parent / "followed.yaml", words))
    assert (str(followed.state.policy), in_force(followed)[1]) == (
        named["activation_checkpointing"],
        named["micro_batch_tokens"],
    )
    assert followed.plan is not None
    assert followed.plan.speed is not None
    assert followed.plan.speed.seconds == pytest.approx(named["seconds"])
    assert followed.plan.speed.faster is None


@pytest.mark.slow
def test_the_first_lines_name_the_choice_the_next_and_what_pins_it(
    stepped_config: Config, memory: SimpleNamespace
) -> None:
    run = start_run(stepped_config())
    shown = dict(summarize(run))
    assert shown["micro-batches"] == f"of up to {run.state.loader.micro_batch_tokens:,} tokens"
    assert "next, estimated" in shown
    assert "faster, and fits by estimate" not in shown
    pinned = start_run(
        stepped_config("pinned", training=dict(word.split("=") for word in _settings(shown["to keep this choice"])))
    )
    assert in_force(pinned) == in_force(run)


def _settings(overrides: str) -> list[str]:
    return [word.removeprefix("training.") for word in overrides.split()]


def test_a_base_too_small_to_be_planned_takes_one_longest_row_and_says_so(stepped_config: Config) -> None:
    run = start_run(stepped_config())
    assert in_force(run) == (Policy("none"), 64)
    assert dict(summarize(run))["micro-batches"] == (
        "of up to 64 tokens: one longest row, as a base this small is not planned"
    )


def test_the_first_lines_say_why_no_time_is_estimated(stepped_config: Config) -> None:
    run = start_run(stepped_config())
    assert "note" not in dict(summarize(run))
    run.pace = dataclasses.replace(run.pace, rates=rates_of_card(CAUTIOUS, "Nothing is known.", is_known=False))
    shown = dict(summarize(run))
    assert shown["note"] == "Nothing is known."
    assert "duration" not in shown


@pytest.mark.slow
def test_where_memory_runs_out_the_fastest_smaller_way_by_plan_is_next(
    stepped_config: Config, memory: SimpleNamespace
) -> None:
    """At least 5 % smaller, by whole plans here; at the end it goes on as a run without a plan does."""
    run = start_run(stepped_config(training={"global_batch_size": 16}))

    def needed(policy: Policy, limit: int) -> int:
        settings = {f"training.{name}": value for name, value in policy.as_settings().items()}
        config = run.config.replace({**settings, "training.micro_batch_tokens": limit})
        return plan_memory(run.base.directory, config).total

    before, tokens = in_force(run), [40] * 10
    assert lower(run.state, tokens)
    after = in_force(run)
    assert after != before
    assert needed(*after) <= SMALLER * needed(*before)
    lowered = [before, after]
    while lower(run.state, [64]) and len(lowered) < 30:
        lowered.append(in_force(run))
    assert run.state.policy.level == "tiled"


@pytest.mark.slow
def test_an_attempt_that_failed_goes_on_under_the_planned_way(
    stepped_config: Config, memory: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    scarcity = Scarcity(monkeypatch)
    run = start_run(stepped_config())
    first, smaller = in_force(run), run.state.smaller
    assert smaller is not None
    limit = scarcity.limit = lambda: first[1] // 2

    def by_plan(*failed: Any) -> Any:
        scarcity.limit = None  # a plan has no device
        found = smaller(*failed)
        scarcity.limit = limit
        return found

    run.state.smaller = by_plan
    assert run.train(quiet)
    assert in_force(run)[1] < first[1]
    assert scarcity.failures >= 1


def test_without_a_pace_a_micro_batch_is_one_longest_row(stepped_config: Config, tiny_llama: Path) -> None:
    config = stepped_config()
    plain = ways.Ways(ways.ModelDirectory.open(tiny_llama), config, fitting.Budget(2**40, 2**40))
    assert {one.micro_batch_tokens for one in plain.ordered} == {64}
    plan = plain.fastest(2**40)
    assert plan is not None
    assert (plan.policy, plan.speed) == (Policy("none"), None)


def test_a_size_beyond_a_steps_rows_offloads_no_more_than_these(stepped_config: Config, tiny_llama: Path) -> None:
    config = stepped_config().replace({"model.device": "auto"})
    found = ways.Ways(ways.ModelDirectory.open(tiny_llama), config, fitting.Budget(2**40, 2**40))
    offloaded = [found.host_bytes(candidates.Candidate(Policy("offload"), size, 0.0)) for size in (64, 12 * 64, 10**9)]
    assert 0 < offloaded[0] < offloaded[1] == offloaded[2]


def test_what_came_next_is_no_larger_than_what_is_known_to_fit(
    stepped_config: Config, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory is ample nothing but what is taken is planned."""
    config = stepped_config()
    pace = candidates.Pace(rates_of_processor(1), full_rows(64, 12, packing=True))
    found = ways.Ways(ways.ModelDirectory.open(tiny_llama), config, fitting.Budget(2**40, 2**40), pace=pace)
    sizes = {64: 1.04, 128: 1.02, 256: 1.0}
    ordered = [candidates.Candidate(Policy("none"), size, sizes[size]) for size in sorted(sizes, reverse=True)]
    monkeypatch.setitem(found.__dict__, "ordered", ordered)
    plan = found.fastest(2**40)
    assert plan is not None
    assert plan.speed is not None
    assert plan.speed.micro_batch_tokens == 128
    assert plan.speed.following is not None
    assert plan.speed.following["micro_batch_tokens"] == 64
