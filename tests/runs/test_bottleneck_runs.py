"""Promises of runs with bottleneck adapters: what is recomputed and counted, and no merge.

The laws that they share with other kinds are in tests/adapters/kinds/test_laws.py.
"""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from marks import slow_but
from tiny_runs import gradients_of_one_step, no_load, quiet

from qlora_trainer.adapters.trainable import trainable_parameters
from qlora_trainer.common.errors import AdapterError, MergeError
from qlora_trainer.config.load import load_config, save_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.merging import merge_run as deployment
from qlora_trainer.merging.merge_run import merge_run
from qlora_trainer.planning.memory_plan import plan_memory
from qlora_trainer.planning.speed.shape import count_shape
from qlora_trainer.runs import start as runs
from qlora_trainer.runs.report.summary import summarize
from qlora_trainer.runs.start import start_run
from qlora_trainer.runs.trained import open_trained
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]
BOTTLENECK = {"kind": "bottleneck", "bottleneck_size": 16}


@pytest.mark.parametrize("level", slow_but(["full", "offload"], "full"))
def test_recomputing_activations_changes_no_bit(tiny_config: Config, level: str) -> None:
    (loss, kept), (same_loss, again) = (
        gradients_of_one_step(tiny_config(name, adapter=BOTTLENECK, training={"activation_checkpointing": name}))
        for name in ("none", level)
    )
    assert loss == same_loss
    assert all(torch.equal(*pair) for pair in zip(kept, again, strict=True))


def test_matrices_decay_and_biases_do_not_and_a_micro_batch_is_taken_whole(tiny_config: Config) -> None:
    run = start_run(tiny_config(adapter=BOTTLENECK, optimizer={"weight_decay": 0.1}, training={"cpu_workers": 2}))
    weights, biases = run.state.groups
    assert (weights.weight_decay, biases.weight_decay) == (0.1, 0.0)
    assert {name.rsplit(".", 2)[1:][0] for name in weights.parameters} == {"bottleneck_down", "bottleneck_up"}
    assert all(name.endswith(".weight") for name in weights.parameters)
    assert all(name.endswith(".bias") for name in biases.parameters)
    assert len(weights.parameters) == len(biases.parameters) == 8
    assert run.state.workers == 1


def test_the_plan_counts_the_numbers_that_a_run_trains(tiny_config: Config, tiny_llama: Path) -> None:
    config = tiny_config(adapter=BOTTLENECK)
    planned = plan_memory(ModelDirectory.open(tiny_llama), config).adapter_parameters
    run = start_run(config)
    real = sum(parameter.numel() for _, parameter in trainable_parameters(run.base.model))
    assert planned == real == 4 * (2 * 64 * 16 + 64 + 16)
    assert count_shape(ModelDirectory.open(tiny_llama), config, torch.float32).adapters == 4 * 2 * 64 * 16
    described = dict(summarize(run))
    assert described["adapters"].startswith("bottlenecks of 16 (relu, attention+mlp) on 4 ")


def test_a_run_is_evaluated_as_it_ended_and_cannot_be_merged_which_is_said_before_the_base_is_looked_for(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run(tiny_config(adapter=BOTTLENECK))
    assert run.train(quiet)
    tokens = torch.arange(2, 22)[None]
    model = run.base.model.eval()
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        opened = open_trained(run.directory).base.model
        found = opened(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(deployment, "resolve_model", no_load)
    with pytest.raises(
        MergeError, match=r"does not merge: bottlenecks of 16 .* Deploy it with its base, by this program alone: "
    ):
        merge_run(run.directory, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_run_from_an_adapter_of_another_kind_is_refused_with_the_settings_to_type(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start_run(tiny_config("first", adapter={**BOTTLENECK, "placement": "mlp"}))
    source = first.directory / "checkpoints" / "step-000000"
    config = tiny_config("second", adapter={"init_from": str(source), "rank": 16, "alpha": 32})
    with monkeypatch.context() as patched:
        patched.setattr(runs, "load_base", no_load)
        with pytest.raises(AdapterError) as refused:
            start_run(config)
    typed = shlex.split(str(refused.value).partition("To start from it, set ")[2].removesuffix("."))
    assert typed == ["adapter.kind=bottleneck", "adapter.bottleneck_size=16", "adapter.placement=mlp"]
    save_config(config, tmp_path / "second.yaml")
    second = start_run(load_config(tmp_path / "second.yaml", typed))
    assert second.adapted == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_an_adapter_of_another_architecture_is_refused_before_the_base_is_loaded(
    tiny_config: Config, tiny_models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start_run(tiny_config("first", adapter=BOTTLENECK))
    source = first.directory / "checkpoints" / "step-000000"
    monkeypatch.setattr(runs, "load_base", no_load)
    config = tiny_config(
        "second", model={"name": str(tiny_models("gpt2"))}, adapter={**BOTTLENECK, "init_from": str(source)}
    )
    with pytest.raises(AdapterError, match=r"4 adapted modules, such as model\.layers\.0\.mlp, .*architecture"):
        start_run(config)
