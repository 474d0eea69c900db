"""Base + adapter is measured on both bases, streamed where that works, in few passes, and where there is memory."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cards import pretend_free_memory
from merge_runs import stored
from spying import noting
from tiny_runs import quiet
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from qlora_trainer.common.errors import InsufficientMemoryError
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.merging import measure as merge_measurement
from qlora_trainer.merging import merge_plan, stream_plan, streamed_model
from qlora_trainer.merging import merge_run as deployment
from qlora_trainer.merging.merge_run import merge_run
from qlora_trainer.merging.stream_plan import StreamPlan
from qlora_trainer.runs.start import start_run
from qlora_trainer.runs.trained import read_trained
from qlora_trainer.weights import model_directory
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]


def test_a_merge_lists_its_base_once_and_makes_three_empty_models(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base, measured on both bases; its first layers, on which short forwards are tried without reading all
    weights; and what was written, as its own config.json describes it."""
    base = Path(read_trained(run_dir).config.model.name)
    seen: Counter[str] = Counter()

    def count(owner: Any, name: str, what: Callable[..., str]) -> None:
        noted = noting(getattr(owner, name), lambda *args, **named: seen.update([what(*args)]))
        monkeypatch.setattr(owner, name, noted)

    count(model_directory, "list_tensors", lambda path, config: "listed" if path == base else "listed output")
    count(model_directory, "read_json_object", lambda path: path.name if path.parent == base else "read output")
    count(merge_plan, "trained_weights", lambda *args: "trained weights")
    count(AutoModelForCausalLM, "from_config", lambda *args: "empty models")
    assert merge_run(run_dir, tmp_path / "merged").choice.eval_loss.keys() == {"dequantized", "original"}
    assert {name: seen[name] for name in ("listed", "config.json", "generation_config.json", "trained weights")} == {
        "listed": 1,
        "config.json": 1,
        "generation_config.json": 1,
        "trained weights": 1,
    }
    assert seen["empty models"] == 3


def test_no_dense_model_is_held_whole(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(*args: Any) -> None:
        raise AssertionError("a dense model was loaded whole")

    monkeypatch.setattr(streamed_model, "load_dense_model", whole)
    assert len(merge_run(run_dir, tmp_path / "merged").choice.eval_loss) == 2


@pytest.mark.slow
def test_a_model_whose_code_takes_absent_weights_is_measured_whole(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = merge_run(run_dir, tmp_path / "streamed")
    monkeypatch.setattr(merge_measurement, "has_finite_logits", lambda model: False)
    monkeypatch.setattr(merge_measurement, "load_streamed_model", once(merge_measurement.load_streamed_model))
    whole = merge_run(run_dir, tmp_path / "whole")
    assert whole.choice.eval_loss == pytest.approx(streamed.choice.eval_loss, rel=1e-5)
    assert whole.report.verification is not None


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter([None])

    def call(*args: Any, **named: Any) -> Any:
        assert next(calls, "again") is None, "called again"
        return function(*args, **named)

    return call


@pytest.mark.slow
def test_an_original_base_that_cannot_be_measured_is_passed_over_or_reported(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(model: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(merge_measurement, "read_original_weights", full)
    done = merge_run(run_dir, tmp_path / "merged")
    assert done.choice.base == "dequantized"
    assert "not measured: OutOfMemoryError: CUDA out of memory" in done.warnings[0]
    with pytest.raises(InsufficientMemoryError, match="--base dequantized"):
        merge_run(run_dir, tmp_path / "other", base="original")


def test_where_the_gpu_is_too_small_the_merge_runs_on_the_cpu(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    fill, load, prepare = (
        getattr(merge_measurement, name) for name in ("fill_model", "load_streamed_model", "prepare_trained")
    )
    monkeypatch.setattr(merge_measurement, "prepare_trained", lambda *args: (prepare(*args)[0], ["reported once"]))

    def load_first_layers(base: ModelDirectory, device: torch.device, *args: Any, **named: Any) -> Any:
        tried.append(device.type)
        return load(base, torch.device("cpu"), *args, **named)

    def fill_on(plan: StreamPlan) -> Any:
        tried.append(plan.device.type)
        if plan.device.type == "cuda":
            raise torch.OutOfMemoryError("too small")
        return fill(plan)

    monkeypatch.setattr(merge_measurement, "load_streamed_model", load_first_layers)
    monkeypatch.setattr(merge_measurement, "fill_model", fill_on)
    monkeypatch.setattr(deployment, "choose_device", lambda wanted: torch.device("cuda"))
    monkeypatch.setattr(merge_measurement, "give_back_memory", lambda: None)
    free = {"cpu": 2**40}
    pretend_free_memory(monkeypatch, lambda device: free[device.type])
    for name, limit in (("early", 2**20), ("late", 2**40)):  # seen beforehand, or when it fails
        free["cuda"] = limit
        done = merge_run(run_dir, tmp_path / name, base="dequantized")
        on_cpu = "The GPU has too little memory for measuring in fp32, so the merge ran on the CPU."
        assert done.warnings[:2] == [on_cpu, "reported once"]
        assert done.warnings.count(on_cpu) == 1
        assert done.report.verification is not None
    assert tried == ["cpu", "cpu", "cuda", "cuda", "cpu", "cpu"]


@pytest.mark.slow
def test_gpt2_with_its_transposed_weights_is_measured_on_both_bases(
    tiny_config: Config, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    run = start_run(tiny_config(model={"name": str(tiny_models("gpt2"))}, training={"max_steps": 2}))
    run.train(quiet)
    for base in ("auto", "original"):
        done = merge_run(run.directory, tmp_path / base, base=base)
        assert done.choice.eval_loss.keys() == {"dequantized", "original"}
        assert done.report.verification is not None


@pytest.mark.slow
def test_no_4_bit_model_is_loaded(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_measurement, "load_base_model", lambda *args: pytest.fail("a 4-bit model was loaded"))
    assert len(merge_run(run_dir, tmp_path / "merged").choice.eval_loss) == 2


@pytest.mark.slow
def test_a_model_that_cannot_be_streamed_is_measured_whole(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same outcome."""
    streamed = merge_run(run_dir, tmp_path / "streamed")
    monkeypatch.setattr(stream_plan, "_sources", lambda *args: None)
    whole = merge_run(run_dir, tmp_path / "whole")
    assert whole.choice.eval_loss == pytest.approx(streamed.choice.eval_loss, rel=1e-5)
    assert whole.choice.base == streamed.choice.base
    assert whole.report.verification is not None


def test_a_model_measured_whole_has_the_offsets_of_training(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose last bits depend on the device that summed them, and move one element in thousands to the next float16."""
    trained = read_trained(run_dir)
    tensors = {
        path: dataclasses.replace(tensor, offset=tensor.offset * (1 + 2**-22))
        for path, tensor in trained.fingerprint.tensors.items()
    }
    summed_otherwise = dataclasses.replace(trained.fingerprint, tensors=tensors)
    monkeypatch.setattr(
        deployment, "read_trained", lambda _: dataclasses.replace(trained, fingerprint=summed_otherwise)
    )
    monkeypatch.setattr(stream_plan, "_sources", lambda *args: None)
    done = merge_run(run_dir, tmp_path / "merged", base="dequantized")
    assert done.report.verification is not None
    assert done.report.verification.beyond_rounding.kl < 1e-11


@pytest.mark.slow
def test_a_mixture_whose_experts_are_renamed_is_merged_and_measured_whole(
    tiny_config: Config, tiny_llama: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    vocabulary = json.loads((tiny_llama / "config.json").read_text())["vocab_size"]
    config = MixtralConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=vocabulary, num_local_experts=2, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "moe")
    settings = {"name": str(tmp_path / "moe"), "min_quantized_fraction": 0.0}
    run = start_run(tiny_config(model=settings, optimizer={"learning_rate": 2e-2}))
    run.train(quiet)
    done = merge_run(run.directory, tmp_path / "merged")
    assert done.report.verification is not None
    assert done.report.verification.difference.kl < 1e-5
    assert stored(tmp_path / "merged").keys() == stored(tmp_path / "moe").keys()
