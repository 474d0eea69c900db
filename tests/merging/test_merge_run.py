"""Promises of the merge command: the base is chosen by measurement, and what is written gives the trained logits."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from merge_runs import stored
from tiny_runs import quiet
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_trainer.common.errors import MergeError
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.batching.packing import make_packs
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.data.types import Example
from qlora_trainer.merging.merge_run import merge_run
from qlora_trainer.model.forward import logits
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.runs.directory import prepare_data
from qlora_trainer.runs.start import start_run
from qlora_trainer.runs.trained import evaluate_trained, open_trained
from qlora_trainer.training.evaluation import answer_prompts, eval_prompts
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]


def test_the_merged_model_gives_the_trained_logits_in_plain_transformers(run_dir: Path, tmp_path: Path) -> None:
    done = merge_run(run_dir, tmp_path / "merged", base="dequantized")
    assert done.report.verification is not None
    assert done.report.verification.difference.kl < 1e-5
    assert done.report.folded == 14

    trained = open_trained(run_dir)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    own = trained.renderer.tokenizer
    prepared = prepare_data(trained.config, own, trained.base.directory)
    prompts = eval_prompts(Renderer(own), prepared.eval)
    theirs = answer_prompts(model, tokenizer, prompts, max_new_tokens=12)
    ours = answer_prompts(trained.base.model, own, prompts, max_new_tokens=12)
    assert [a.answer for a in theirs] == [a.answer for a in ours]
    row = prepared.eval[0].input_ids
    with torch.no_grad():
        plain = model(torch.tensor([row])).logits
        pack = make_packs([Example(row, row)], 1000, packing=True)[0]
        expected = logits(trained.base.model, pack)
    assert float((plain - expected).norm() / expected.norm()) < 3e-3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_4_bit_model_itself_gives_the_merged_logits_in_plain_transformers(
    family: str, tiny_config: Config, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    """Nothing streamed, no code of the merge on either side; square weights, and Conv1D's, stored (I, O)."""
    settings = {"name": str(tiny_models(family)), "compute_dtype": "float32"}
    run = start_run(tiny_config(model=settings, optimizer={"learning_rate": 2e-2}))
    run.train(quiet)
    merge_run(run.directory, tmp_path / "merged", base="dequantized", dtype=torch.float32)
    trained = open_trained(run.directory).base.model
    layers = [module for module in trained.modules() if isinstance(module, NF4Linear)]
    assert any(layer.nf4_weight.shape[0] == layer.nf4_weight.shape[1] for layer in layers)
    ids = torch.arange(5, 65)[None]
    with torch.no_grad():
        expected = trained(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(input_ids=ids).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_auto_measures_both_bases_and_takes_the_better(run_dir: Path, tmp_path: Path) -> None:
    done = merge_run(run_dir, tmp_path / "merged")
    losses = done.choice.eval_loss
    assert losses.keys() == {"dequantized", "original"}
    assert done.choice.base == min(losses, key=lambda name: losses[name])
    assert losses["dequantized"] == pytest.approx(evaluate_trained(open_trained(run_dir))["eval_loss"], rel=1e-6)
    record = json.loads((tmp_path / "merged" / "qlora_merge.json").read_text())
    assert record["base"] == done.choice.base
    assert record["base_choice"]["eval_loss"] == losses


@pytest.mark.slow
def test_the_original_base_is_verified_against_itself_and_its_difference_reported(
    run_dir: Path, tmp_path: Path
) -> None:
    done = merge_run(run_dir, tmp_path / "merged", base="original")
    assert done.report.base == "original"
    assert done.report.verification is not None
    assert done.report.verification.difference.kl < 1e-5
    assert done.difference_from_trained is not None
    assert done.difference_from_trained.kl > 10 * done.report.verification.difference.kl


@pytest.mark.slow
def test_without_eval_rows_the_dequantized_base_is_taken_and_reported(tiny_config: Config, tmp_path: Path) -> None:
    run = start_run(tiny_config(data={"eval": 0.0}))
    run.train(quiet)
    done = merge_run(run.directory, tmp_path / "merged")
    assert done.choice.base == "dequantized"
    assert "no eval rows" in done.warnings[0]


def test_a_merge_works_where_the_data_is_gone(run_dir: Path, rows: Path, tmp_path: Path) -> None:
    rows.unlink()
    done = merge_run(run_dir, tmp_path / "merged")
    assert done.choice.base == "dequantized"
    assert "data could not be read" in done.warnings[0]
    assert done.report.verification is not None


def test_a_prequantized_base_merges_without_its_originals(
    tiny_config: Config, tiny_llama: Path, tmp_path: Path
) -> None:
    from prequantized import prequantized

    base = prequantized(tiny_llama, tmp_path / "nf4")
    run = start_run(tiny_config(model={"name": str(base)}))
    run.train(quiet)
    done = merge_run(run.directory, tmp_path / "merged")
    assert done.choice.base == "dequantized"
    with pytest.raises(MergeError, match="prequantized"):
        merge_run(run.directory, tmp_path / "other", base="original")


def test_evaluate_counts_exact_answers(run_dir: Path) -> None:
    trained = open_trained(run_dir)
    result = evaluate_trained(trained, answers=-1)
    assert result["answered"] == result["rows"] == 4
    assert 0.0 <= result["exact_match"] <= 1.0
    assert result["perplexity"] == pytest.approx(torch.tensor(result["eval_loss"]).exp().item(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("trained_on", ["original", "prequantized"])
def test_another_copy_of_the_base_merges_to_the_same_bits(
    trained_on: str, tiny_config: Config, tiny_llama: Path, tmp_path: Path
) -> None:
    from prequantized import prequantized

    copies = {"original": tiny_llama, "prequantized": prequantized(tiny_llama, tmp_path / "nf4")}
    run = start_run(tiny_config(model={"name": str(copies[trained_on])}, optimizer={"learning_rate": 2e-2}))
    run.train(quiet)
    merged = {}
    for name, copy in copies.items():
        done = merge_run(run.directory, tmp_path / name, base="dequantized", model=str(copy))
        assert done.report.verification is not None
        assert done.report.verification.difference.kl < 1e-5
        assert json.loads((tmp_path / name / "qlora_merge.json").read_text())["base_model"] == str(copy)
        merged[name] = stored(tmp_path / name)
    assert merged["original"].keys() == merged["prequantized"].keys()
    assert all(torch.equal(tensor, merged["prequantized"][name]) for name, tensor in merged["original"].items())


@pytest.mark.slow
def test_shards_are_of_the_size_asked_for(run_dir: Path, tmp_path: Path) -> None:
    merge_run(run_dir, tmp_path / "merged", base="dequantized", max_shard_bytes=100_000)
    held: dict[str, int] = {}
    for info in ModelDirectory.open(tmp_path / "merged").tensors.values():
        held[info.file.name] = held.get(info.file.name, 0) + info.nbytes
    assert len(held) == len(list((tmp_path / "merged").glob("*.safetensors"))) > 2
    assert max(held.values()) <= 100_000
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").num_parameters() > 0
