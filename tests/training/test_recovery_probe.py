"""Promises of the probe: the longest micro-batch is tried before the first step, and nothing else changes."""

from collections.abc import Callable

import pytest
import torch
from marks import slow_but
from scarcity import Scarcity, differences, everything, same_end, started
from tiny_runs import quiet

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.runs.metrics import read_metrics
from qlora_trainer.runs.start import start_run
from qlora_trainer.training.recovery import probe, take_step

Config = Callable[..., RunConfig]


@pytest.mark.parametrize("limit", [10_000, 115], ids=["fits", "does not fit"])
def test_probing_changes_nothing(wide_config: Config, scarcity: Scarcity, limit: int) -> None:
    run = started(wide_config())
    take_step(run.state)
    run.state.optimizer.zero_grad()
    before = everything(run.state)
    base = {name: buffer.clone() for name, buffer in run.state.model.named_buffers()}
    scarcity.limit = lambda: limit
    probe(run.state, run.prepared.train.lengths)
    assert (
        run.state.loader.micro_batch_tokens == 400 if limit == 10_000 else run.state.loader.micro_batch_tokens <= limit
    )
    assert differences(before, everything(run.state)) == ([] if limit == 10_000 else ["memory"])
    assert all(torch.equal(base[name], buffer) for name, buffer in run.state.model.named_buffers())
    run.state.groups[0].check_views()


def test_a_probed_run_equals_one_that_was_not(wide_config: Config) -> None:
    plain, probed = start_run(wide_config("plain")), start_run(wide_config("probed"))
    torch.manual_seed(plain.config.training.seed)
    plain.train(quiet)
    torch.manual_seed(plain.config.training.seed)
    probe(probed.state, probed.prepared.train.lengths)
    probed.train(quiet)
    assert same_end(plain, probed)


@pytest.mark.parametrize("packing", slow_but([True, False], True), ids=["packed", "padded"])
def test_the_probe_takes_the_longest_micro_batch_of_the_run(
    wide_config: Config, scarcity: Scarcity, packing: bool
) -> None:
    run = started(
        wide_config(
            data={"packing": packing}, training={"micro_batch_tokens": 200, "global_batch_size": 5, "max_steps": 6}
        )
    )
    probe(run.state, run.prepared.train.lengths)
    (probed,) = scarcity.sizes
    scarcity.sizes.clear()
    run.train(quiet)
    assert run.state.loader.epoch >= 1
    assert len(set(scarcity.sizes)) > 3
    assert probed == max(scarcity.sizes)


def test_after_a_probe_that_lowered_no_step_runs_out(wide_config: Config, scarcity: Scarcity) -> None:
    run = started(wide_config())
    scarcity.limit = lambda: 115
    probe(run.state, run.prepared.train.lengths)
    assert scarcity.failures > 0
    scarcity.failures = 0
    assert run.train(quiet)
    assert scarcity.failures == 0
    first, *others = read_metrics(run.directory / "metrics.jsonl")
    assert "in the longest micro-batch, tried before the first step" in first["recovered"]
    assert not any("recovered" in record for record in others)
