"""Several runs' adapters become one run, which every command takes, and which merges to base + weighted sum."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from json_docs import documented
from merge_runs import stored
from tiny_models import load
from tiny_runs import quiet
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_kernels.nf4 import dequantize_nf4
from qlora_trainer.adapters.arithmetic.methods import CombineSettings
from qlora_trainer.adapters.inject import lora_layers
from qlora_trainer.adapters.peft_format import read_adapter
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.merging.merge_run import merge_run
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.runs.combined import combine_runs
from qlora_trainer.runs.start import start_run
from qlora_trainer.runs.trained import evaluate_trained, open_trained

Config = Callable[..., RunConfig]
Qlora = Callable[..., tuple[int, str, str]]
WEIGHTS = (0.7, -0.4)


@pytest.fixture
def runs(tiny_config: Config) -> list[Path]:
    """Two runs on one base, with other layers, ranks and scalings."""

    def trained(name: str, **adapter: Any) -> Path:
        training = {"max_steps": 2}
        run = start_run(tiny_config(name, adapter=adapter, training=training, optimizer={"learning_rate": 0.02}))
        assert run.train(quiet)
        return run.directory

    return [trained("one"), trained("two", rank=2, target_modules="attention", use_rslora=True)]


def summed(runs: list[Path]) -> dict[str, Tensor]:
    """The weighted deltas of the runs' files, by path, in fp64."""
    total: dict[str, Tensor] = {}
    for directory, weight in zip(runs, WEIGHTS, strict=True):
        adapter = read_adapter(directory / "adapter")
        for path, fold in adapter.config.folds(adapter.tensors).items():
            delta = fold.scaling * fold.lora_B.double() @ fold.lora_A.double()  # type: ignore[attr-defined]
            total[path] = total.get(path, torch.zeros(())) + weight * delta
    return total


def combine(runs: list[Path], output: Path, *settings: Any) -> Path:
    combine_runs(list(zip(runs, WEIGHTS, strict=True)), output, CombineSettings(*settings))
    return output


def test_the_command_makes_a_run_whose_adapter_is_the_sum(qlora: Qlora, runs: list[Path], tmp_path: Path) -> None:
    named = [f"{runs[0]}:{WEIGHTS[0]}", f"{runs[1]}:{WEIGHTS[1]}"]
    code, out, reported = qlora("combine", *named, "--output", tmp_path / "both", "--json")
    assert code == 0, reported
    answer = json.loads(out)
    assert answer.keys() == documented("qlora combine")
    assert (answer["layers"], answer["rank"]) == (14, 6)
    trained = open_trained(tmp_path / "both")
    layers, expected = lora_layers(trained.base.model), summed(runs)
    assert layers.keys() == expected.keys()
    for path, layer in layers.items():
        delta = layer.scaling * layer.lora_B.weight.double() @ layer.lora_A.weight.double()
        torch.testing.assert_close(delta, expected[path], rtol=1e-5, atol=1e-7)
    assert evaluate_trained(trained)["eval_loss"] > 0
    assert trained.warnings == []


@pytest.mark.slow
@pytest.mark.parametrize("settings", [("cat",), ("svd", 64)], ids=str)
def test_a_merge_of_the_sum_is_the_base_and_the_weighted_deltas(
    settings: tuple[Any, ...], runs: list[Path], tiny_llama: Path, tmp_path: Path
) -> None:
    done = merge_run(
        combine(runs, tmp_path / "both", *settings), tmp_path / "merged", base="dequantized", dtype=torch.float32
    )
    assert done.report.verification is not None
    merged, expected = stored(tmp_path / "merged"), summed(runs)
    layers = {path: m for path, m in load(tiny_llama).model.named_modules() if isinstance(m, NF4Linear)}
    assert layers.keys() == expected.keys()
    for path, layer in layers.items():
        weight = dequantize_nf4(layer.nf4_weight, torch.float32) + expected[path]
        torch.testing.assert_close(merged[f"{path}.weight"].double(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_peft_loads_the_sum_next_to_its_base(runs: list[Path], tiny_llama: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    both = combine(runs, tmp_path / "both", "cat")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    weights = {path: base.get_submodule(path).weight.detach().clone() for path in summed(runs)}
    loaded = PeftModel.from_pretrained(base, both / "adapter").merge_and_unload()
    for path, delta in summed(runs).items():
        found = loaded.get_submodule(path).weight - weights[path]
        torch.testing.assert_close(found.double(), delta, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_run_may_start_from_the_sum(runs: list[Path], tiny_config: Config, tmp_path: Path) -> None:
    both = combine(runs, tmp_path / "both", "svd", 3)
    adapter = {"rank": 3, "alpha": 3, "init_from": str(both / "adapter")}
    run = start_run(tiny_config("next", adapter=adapter))
    assert run.warnings == [] or not any("adapter" in warning for warning in run.warnings)


@pytest.mark.slow
def test_adapters_of_other_bases_and_of_no_run_are_refused_in_one_message(
    qlora: Qlora, runs: list[Path], tmp_path: Path
) -> None:
    record = runs[1] / "adapter" / "base.json"
    content = json.loads(record.read_text())
    next(iter(content["base"]["tensors"].values()))["packed_sha256"] = "0" * 64
    record.write_text(json.dumps(content))
    code, out, reported = qlora("combine", f"{runs[0]}:1", f"{runs[1]}:1", "--output", tmp_path / "both")
    assert (code, out) == (2, "")
    assert f"{runs[1]} was trained on another base than {runs[0]}: 1 of 14 layers holds other weights" in reported
    code, _, reported = qlora("combine", f"{runs[0]}/adapter:1", "--output", tmp_path / "both")
    assert code == 2
    assert "None of these is a run directory" in reported
    code, _, reported = qlora("combine", f"{tmp_path}/gone:1", "--output", tmp_path / "both")
    assert code == 2
    assert f"{tmp_path}/gone is not an adapter" in reported
    assert not (tmp_path / "both").exists()


@pytest.mark.slow
def test_another_programs_adapter_takes_part_with_a_warning_where_it_names_another_base(
    runs: list[Path], tmp_path: Path
) -> None:
    theirs = runs[1] / "adapter"
    (theirs / "base.json").unlink()
    config = json.loads((theirs / "adapter_config.json").read_text())
    (theirs / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "other/model"}))
    report = combine_runs([(runs[0], 1.0), (theirs, 1.0)], tmp_path / "both", CombineSettings("cat"))
    assert [warning.partition(",")[0] for warning in report.warnings] == [f"{theirs} was made for other/model"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a:1", "--method", "svd"], "--method svd needs --rank, such as --rank 8."),
        (["a:1", "--method", "ties", "--density", "1.5"], "--density is 1.5, and must be over 0 and at most 1"),
        (["a:1", "--rank", "4"], "--rank has no effect with --method cat; leave it out."),
        (
            ["runs/a"],
            "runs/a has no weight. Write the directory, a colon and a number that is not 0, such as runs/a:0.5",
        ),
        (["runs/a:0"], "runs/a:0 has no weight."),
        (["a:1", "--method", "sum"], "'sum' is not one of 'cat', 'svd'"),
    ],
    ids=str,
)
def test_a_mistake_in_the_command_is_one_message(qlora: Qlora, tmp_path: Path, words: list[str], message: str) -> None:
    code, out, reported = qlora("combine", *words, "--output", tmp_path / "both")
    assert (code, out) == (2, "")
    assert message in reported


def test_an_output_that_exists_is_kept(qlora: Qlora, tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "file").touch()
    code, _, reported = qlora("combine", f"{tmp_path}:1", "--output", tmp_path / "both")
    assert code == 2
    assert "exists and is not empty" in reported
