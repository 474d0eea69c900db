"""What was trained on a base without its start becomes an adapter of the original base, of twice the rank."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import load, make_model_directory
from tiny_runs import final_adapter, quiet
from transformers import AutoModelForCausalLM

from qlora_trainer.adapters.arithmetic.methods import CombineSettings
from qlora_trainer.adapters.peft_format import read_adapter
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import AdapterConfig, RunConfig
from qlora_trainer.merging.merge_run import merge_run
from qlora_trainer.runs.base_start import quantize_with_start
from qlora_trainer.runs.combined import combine_runs
from qlora_trainer.runs.directory import read_base_record, read_run_config
from qlora_trainer.runs.start import start_run
from qlora_trainer.runs.trained import evaluate_trained, open_trained
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]
Qlora = Callable[..., tuple[int, str, str]]
IDS = torch.arange(5, 45)[None]


@pytest.fixture(scope="module")
def pissa(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tiny_llama, tmp_path_factory.mktemp("copies") / "pissa")


def copied(directory: Path, output: Path) -> Path:
    settings = AdapterConfig(init="pissa", rank=4, alpha=8)
    model = ModelDirectory.open(directory)
    quantize_with_start(model, output, settings, name=str(directory), device=torch.device("cpu"))
    return output


def trained_on(tiny_config: Config, model: Path, name: str = "run", **adapter: Any) -> Path:
    training = {"max_steps": 2}
    run = start_run(tiny_config(name, model={"name": str(model)}, adapter=adapter, training=training))
    assert run.train(quiet)
    return run.directory


@pytest.mark.slow
def test_the_adapter_of_the_original_base_is_the_trained_one_less_its_start(
    qlora: Qlora, tiny_config: Config, tiny_llama: Path, pissa: Path, tmp_path: Path
) -> None:
    run, output = trained_on(tiny_config, pissa, init="pissa"), tmp_path / "original"
    code, _, reported = qlora("combine", f"{run}:1", "--output", output, "--original-base")
    assert code == 0, reported
    assert read_run_config(output).model.name == str(tiny_llama)
    record = read_base_record(output / "adapter")
    assert record is not None
    assert record.fingerprint == load(tiny_llama).fingerprint
    made, before, after = read_adapter(output / "adapter"), read_adapter(pissa / "start").tensors, final_adapter(run)
    folds = made.config.folds(made.tensors)
    assert len(folds) == 14
    for path, fold in folds.items():
        A0, B0, A, B = (
            tensors[f"base_model.model.{path}.lora_{factor}.weight"].double()
            for tensors in (before, after)
            for factor in "AB"
        )
        assert len(fold.lora_A) == 8  # type: ignore[attr-defined]
        delta = fold.scaling * fold.lora_B.double() @ fold.lora_A.double()  # type: ignore[attr-defined]
        expected = 2.0 * (B @ A - B0 @ A0)
        assert expected.norm() > 0
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_peft_loads_it_on_the_original_base_where_it_computes_what_was_trained(
    tiny_config: Config, tiny_llama: Path, pissa: Path, tmp_path: Path
) -> None:
    """But for what NF4 costs, which the original base does not have."""
    from peft import PeftModel

    run = trained_on(tiny_config, pissa, init="pissa")
    combine_runs([(run, 1.0)], tmp_path / "original", CombineSettings(), original_base=True)
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        untrained = dense(IDS).logits
        cost = (load(tiny_llama).model(IDS).logits - untrained).norm()
        found = PeftModel.from_pretrained(dense, tmp_path / "original" / "adapter")(IDS).logits
        expected = open_trained(run).base.model(IDS).logits
    assert (found - untrained).norm() > 0
    assert (found - expected).norm() < 1.5 * cost


@pytest.mark.slow
def test_evaluate_and_merge_take_it(tiny_config: Config, pissa: Path, tmp_path: Path) -> None:
    run = trained_on(tiny_config, pissa, init="pissa")
    report = combine_runs([(run, 1.0)], tmp_path / "original", CombineSettings("svd", 8), original_base=True)
    assert report.rank == 8
    trained = open_trained(tmp_path / "original")
    assert evaluate_trained(trained)["eval_loss"] > 0
    assert trained.warnings == []
    assert merge_run(tmp_path / "original", tmp_path / "merged", base="original").report.folded == 14


@pytest.mark.slow
def test_what_has_no_sum_is_refused(tiny_config: Config, tiny_llama: Path, pissa: Path, tmp_path: Path) -> None:
    plain = trained_on(tiny_config, tiny_llama, "plain")
    own = tmp_path / "copy"
    shutil.copytree(pissa, own)
    started = trained_on(tiny_config, own, "started", init="pissa")

    def refused(run: Path, *settings: Any, original_base: bool) -> str:
        with pytest.raises(AdapterError) as error:
            combine_runs([(run, 0.5)], tmp_path / "out", CombineSettings(*settings), original_base=original_base)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    assert "is an original one; leave --original-base out" in refused(plain, original_base=True)
    assert "is whole only with its start" in refused(started, original_base=False)
    assert "which --method linear cannot" in refused(started, "linear", original_base=True)
    shutil.rmtree(own)
    copied(make_model_directory(tmp_path / "other", seed=1), own)
    assert "was trained on another base than" in refused(started, original_base=True)
