"""What the time of a run's steps depends on is read from its own rows, and what was chosen is what is in force."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qlora_trainer.common.progress import silent
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning.speed.cards import card_named
from qlora_trainer.runs.pace import hours_of, limit_in_force, lowered_warning, pace_to_plan, steps_to_take
from qlora_trainer.runs.start import start_run
from qlora_trainer.training.memory.activations import Policy
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]


def planned(policy: Policy, limit: int | None) -> Any:
    """As much of a plan as says what was chosen."""
    return SimpleNamespace(policy=policy, speed=limit and SimpleNamespace(micro_batch_tokens=limit))


def test_a_runs_steps_are_those_of_its_rows_and_settings(tiny_config: Config) -> None:
    run = start_run(tiny_config(training={"global_batch_size": 3, "max_steps": 8}))
    steps = steps_to_take(run.config, run.prepared)
    packs = [run.state.loader.next() for _ in range(8)]
    assert steps.count == 8
    assert steps.largest == max(sum(pack.tokens for pack in step) for step in packs)
    trained = sum(pack.label_tokens for step in packs[:6] for pack in step)
    assert 0 < trained < steps.trained * sum(map(sum, steps.rows)) * 1.01, "the first epoch's, less each row's first"
    assert steps.eval_lengths == tuple(run.prepared.eval.lengths.tolist())


def test_rows_that_a_config_cuts_are_taken_as_cut(tiny_config: Config) -> None:
    run = start_run(tiny_config(training={"global_batch_size": 3}))
    lengths = [*run.prepared.train.lengths, *run.prepared.eval.lengths]
    shorter = int(np.median(lengths))
    steps = steps_to_take(run.config.replace({"data.max_length": shorter}), run.prepared)
    assert max(map(max, steps.rows)) == max(steps.eval_lengths) == shorter < max(lengths)
    assert steps.largest <= 3 * shorter


def test_the_time_left_is_that_of_the_steps_left(tiny_config: Config) -> None:
    run = start_run(tiny_config())
    first = hours_of(run)
    assert first is not None
    assert first.count == 8
    run.state.step = 6
    later = hours_of(run)
    assert later is not None
    assert later.steps == pytest.approx(first.steps / 4)
    run.state.step = 8
    assert hours_of(run) is None


def test_the_size_of_a_micro_batch_in_force(tiny_config: Config) -> None:
    """The one chosen for an open setting, or the user's; on resume the checkpoint's, unless that was lowered."""
    config = tiny_config()
    saved = config.replace({"training.micro_batch_tokens": 512, "training.activation_checkpointing": "none"})
    set_by_user = config.replace({"training.micro_batch_tokens": 256})
    assert limit_in_force(None, config) == 128
    assert limit_in_force(planned(Policy("none"), 384), config) == 384
    assert limit_in_force(planned(Policy("none"), 384), set_by_user) == 256
    assert limit_in_force(None, config, saved) == 512
    assert limit_in_force(planned(Policy("none"), None), config, saved) == 512
    assert limit_in_force(planned(Policy("full"), None), config, saved) == 128


def test_a_choice_that_was_lowered_is_warned_of(tiny_config: Config) -> None:
    saved = tiny_config(training={"micro_batch_tokens": 512, "activation_checkpointing": "none"})
    assert lowered_warning(None, saved) is None
    assert lowered_warning(planned(Policy("none"), 512), saved) is None
    for policy, limit in ((Policy("full"), 512), (Policy("none"), 256)):
        warning = lowered_warning(planned(policy, limit), saved)
        assert warning is not None
        assert f"goes on with {policy}, micro-batches of up to {limit} tokens" in warning
        assert "(activation checkpointing none, micro-batches of up to 512 tokens) no longer fits" in warning
    open_policy = saved.replace({"training.activation_checkpointing": "auto"})
    warning = lowered_warning(planned(Policy("full"), 256), open_policy)
    assert warning is not None
    assert "(micro-batches of up to 512 tokens) no longer fits" in warning
    warning = lowered_warning(planned(Policy("full"), 256), saved.replace({"training.micro_batch_tokens": "auto"}))
    assert warning is not None
    assert "(activation checkpointing none) no longer fits" in warning
    left_open = saved.replace({"training.activation_checkpointing": "auto", "training.micro_batch_tokens": "auto"})
    assert lowered_warning(planned(Policy("full"), 256), left_open) is None


def test_a_plan_is_for_a_named_card_and_for_rows_where_they_can_be_had(
    tiny_config: Config, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config, directory = tiny_config(model={"device": "auto"}), ModelDirectory.open(tiny_llama)
    assert pace_to_plan(config, directory, None, silent) is None, "no card is known"
    card = card_named("4090")
    found = pace_to_plan(config, directory, card, silent)
    assert found is not None
    assert (found.rates.name, found.steps.count, found.note) == ("RTX 4090", 8, "")
    without = pace_to_plan(config, None, card, silent)
    assert without is not None
    assert (without.steps.count, without.steps.rows) == (None, ((128, 128, 128),))
    missing = pace_to_plan(config.replace({"data.train": "none.jsonl"}), directory, card, silent)
    assert missing is not None
    assert missing.steps == without.steps
    assert "none.jsonl" in missing.note
    assert dataclasses.replace(missing, note="") == without
