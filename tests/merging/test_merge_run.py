"""Promises of the merge command: the base is chosen by measurement, and what is written gives the trained logits."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cards import pretend_free_memory
from marks import slow_but
from safetensors.torch import load_file, save_file
from spying import noting
from tiny_models import make_model_directory
from tiny_runs import quiet
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from qlora_trainer.common.errors import (
    CheckpointError,
    DiskError,
    InsufficientMemoryError,
    MergeError,
    OutputExistsError,
)
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.batching.packing import make_packs
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.data.types import Example
from qlora_trainer.merging import fold as merging
from qlora_trainer.merging import measure as merge_measurement
from qlora_trainer.merging import merge_plan, stream_plan, streamed_model
from qlora_trainer.merging import merge_run as deployment
from qlora_trainer.merging.merge_run import merge_run
from qlora_trainer.merging.stream_plan import StreamPlan
from qlora_trainer.merging.verify import check_original
from qlora_trainer.model.forward import logits
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.runs.directory import prepare_data
from qlora_trainer.runs.start import start_run
from qlora_trainer.runs.trained import evaluate_trained, open_trained, read_trained
from qlora_trainer.training.evaluation import answer_prompts, eval_prompts
from qlora_trainer.weights import model_directory
from qlora_trainer.weights import side_files as model_files
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]


@pytest.fixture
def run_dir(tiny_config: Config) -> Path:
    """A run trained hard enough that its adapter matters."""
    run = start_run(tiny_config(optimizer={"learning_rate": 2e-2}))
    assert run.train(quiet)
    return run.directory


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
    count(model_directory, "read_json_object", lambda path: "read" if path.parent == base else "read output")
    count(merge_plan, "trained_weights", lambda *args: "trained weights")
    count(AutoModelForCausalLM, "from_config", lambda *args: "empty models")
    assert merge_run(run_dir, tmp_path / "merged").choice.eval_loss.keys() == {"dequantized", "original"}
    assert {name: seen[name] for name in ("listed", "read", "trained weights")} == {
        "listed": 1,
        "read": 1,
        "trained weights": 1,
    }
    assert seen["empty models"] == 3


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
def test_an_adapter_much_worse_on_the_original_base_is_not_merged_into_it(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for trained, original in [(2.0, 2.2), (1e-4, 0.01), (None, 9.0), (2.0, None)]:
        check_original(trained, original)
    for trained, original in [(2.0, 2.21), (1e-4, 0.0102), (2.0, float("nan"))]:
        with pytest.raises(MergeError, match="--base dequantized"):
            check_original(trained, original)
    losses = iter([2.0, 2.3])
    monkeypatch.setattr(merge_measurement, "eval_loss", lambda *args: next(losses))
    with pytest.raises(MergeError, match=r"loss of 2\.3000, and of 2\.0000 .* more than 10% worse"):
        merge_run(run_dir, tmp_path / "merged", base="original")
    assert not (tmp_path / "merged").exists()


def test_no_dense_model_is_held_whole(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(*args: Any) -> None:
        raise AssertionError("a dense model was loaded whole")

    monkeypatch.setattr(streamed_model, "load_dense_model", whole)
    assert len(merge_run(run_dir, tmp_path / "merged").choice.eval_loss) == 2


@pytest.mark.slow
def test_too_little_memory_to_verify_is_reported_before_anything_is_written(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_free_memory(monkeypatch, lambda device: 2**29)
    monkeypatch.setattr(deployment, "merge", lambda *args, **kwargs: pytest.fail("the merge was begun"))
    with pytest.raises(InsufficientMemoryError, match="Comparing logits"):
        merge_run(run_dir, tmp_path / "merged", base="dequantized")
    assert not (tmp_path / "merged").exists()


@pytest.fixture
def no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "measure_trained", lambda *args: pytest.fail("a pass over all weights was begun"))


@pytest.mark.slow
@pytest.mark.usefixtures("no_pass")
def test_a_full_disk_is_reported_before_any_pass_over_the_weights(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_files.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**24))
    with pytest.raises(DiskError, match="GiB free"):
        merge_run(run_dir, tmp_path / "merged")


@pytest.mark.usefixtures("no_pass")
def test_a_changed_embedding_is_refused_before_any_pass_over_the_weights(run_dir: Path, tmp_path: Path) -> None:
    base = Path(read_trained(run_dir).config.model.name)
    shutil.copytree(base, tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["model.embed_tokens.weight"][3, 5] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight in .*other holds other values"):
        merge_run(run_dir, tmp_path / "merged", model=str(tmp_path / "other"))


@pytest.mark.parametrize("where", slow_but(["merge", "verify_merge"], "merge"))
def test_memory_that_runs_out_in_a_merge_is_reported_as_such(
    where: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **named: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(deployment, where, full)
    with pytest.raises(InsufficientMemoryError, match=r"^Merging .* ran out of memory: .* nothing was written\.$"):
        merge_run(run_dir, tmp_path / "merged", base="dequantized")
    assert not (tmp_path / "merged").exists()


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
        assert done.warnings == [on_cpu, "reported once"]
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


def test_one_spoilt_tensor_is_caught_and_nothing_is_left(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The value is spoilt when the files have been checked: only the comparison of logits can see it."""
    right = merging.verify_files

    def spoil(directory: Path, *args: Any) -> None:
        right(directory, *args)
        path = directory / "model.safetensors"
        tensors = load_file(path)
        weight = tensors["model.layers.1.self_attn.v_proj.weight"]
        weight[3] = -weight[3]
        save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr(merging, "verify_files", spoil)
    with pytest.raises(MergeError, match="logits are not those of the trained one"):
        merge_run(run_dir, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir() if "merged" in path.name] == []


def test_an_output_that_is_taken_is_left_alone(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError):
        merge_run(run_dir, tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine.txt"]


def test_an_adapter_is_refused_on_another_base(tiny_config: Config, tmp_path: Path) -> None:
    own = make_model_directory(tmp_path / "own")
    run = start_run(tiny_config(model={"name": str(own)}))
    run.train(quiet)
    (own / "model.safetensors").unlink()
    make_model_directory(own, seed=9)
    with pytest.raises(CheckpointError, match="not the one this adapter was trained on"):
        merge_run(run.directory, tmp_path / "merged")


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


def merged_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: info.read() for name, info in ModelDirectory.open(directory).tensors.items()}


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
        merged[name] = merged_tensors(tmp_path / name)
    assert merged["original"].keys() == merged["prequantized"].keys()
    assert all(torch.equal(tensor, merged["prequantized"][name]) for name, tensor in merged["original"].items())


def test_another_model_of_the_same_shape_is_no_copy_of_the_base(run_dir: Path, tmp_path: Path) -> None:
    other = make_model_directory(tmp_path / "other", seed=9)
    with pytest.raises(CheckpointError, match=r"not the one this adapter was trained on: \S+\.weight in"):
        merge_run(run_dir, tmp_path / "merged", model=str(other))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(CheckpointError, match=r"other is not the one .* rms_norm_eps"):
        merge_run(run_dir, tmp_path / "merged", model=str(other))


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
    assert merged_tensors(tmp_path / "merged").keys() == merged_tensors(tmp_path / "moe").keys()


@pytest.mark.slow
def test_shards_are_of_the_size_asked_for(run_dir: Path, tmp_path: Path) -> None:
    merge_run(run_dir, tmp_path / "merged", base="dequantized", max_shard_bytes=100_000)
    held: dict[str, int] = {}
    for info in ModelDirectory.open(tmp_path / "merged").tensors.values():
        held[info.file.name] = held.get(info.file.name, 0) + info.nbytes
    assert len(held) == len(list((tmp_path / "merged").glob("*.safetensors"))) > 2
    assert max(held.values()) <= 100_000
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").num_parameters() > 0
