"""The whole job on real rows: train, stop half way, resume, merge, reload in plain transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf_files import tiny_weights, write_gguf
from marks import slow
from tiny_runs import quiet
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_trainer.cli.demo_run import packaged_model
from qlora_trainer.common.errors import FileMissingError
from qlora_trainer.config.load import make_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.merging.merge_run import merge_run
from qlora_trainer.runs.metrics import read_metrics
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.training.evaluation import answer_prompts, eval_prompts
from qlora_trainer.weights.nf4 import WEIGHT_TENSORS, quantize_weight


def train_stop_resume_merge_reload(config: RunConfig, output: Path) -> None:
    run = start_run(config)
    half = run.state.total_steps // 2
    assert not run.train(quiet, stop_after=half)
    run.release()
    run = resume_run(run.directory)
    assert run.state.step == half
    assert run.train(quiet)
    assert len(read_metrics(run.directory / "metrics.jsonl")) == run.state.total_steps

    done = merge_run(run.directory, output)
    assert done.report.verification is not None
    assert done.report.verification.difference.kl < 1e-5
    assert done.choice.eval_loss.keys() == {"dequantized", "original"}

    merged = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    prompts = eval_prompts(run.renderer, run.prepared.eval, 2)
    theirs = answer_prompts(merged, tokenizer, prompts, max_new_tokens=8)
    if done.choice.base == "dequantized":
        ours = answer_prompts(run.base.model, run.renderer.tokenizer, prompts, max_new_tokens=8)
        assert [answer.answer for answer in theirs] == [answer.answer for answer in ours]


@pytest.mark.parametrize(
    ("folder", "file"),
    [slow(("alpaca_en_demo", "alpaca_en_demo.json")), ("fastchat_dummy", "dummy_conversation.json")],
)
def test_two_hundred_real_rows_from_start_to_merged_model(
    folder: str, file: str, shared_data: Callable[[str], Path], tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    rows = json.loads(shared_data(f"{folder}/{file}").read_text())[:200]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = tiny_config(
        data={"train": str(tmp_path / "rows.json"), "eval": 0.05, "max_length": 256},
        training={"global_batch_size": 16, "max_steps": 6, "save_every": 3, "evaluate_every": 3},
    )
    train_stop_resume_merge_reload(config, tmp_path / "merged")


@pytest.mark.slow
def test_a_real_small_model_from_gguf_to_merged_model(rows: Path, tmp_path: Path) -> None:
    try:
        model = packaged_model()
    except FileMissingError as error:
        pytest.skip(str(error))
    config = make_config(
        {
            "model": {"name": model, "device": "cpu"},
            "data": {"train": str(rows), "eval": 0.2, "max_length": 128},
            "training": {"output_dir": str(tmp_path / "run"), "max_steps": 2, "global_batch_size": 2},
            "evaluation": {"samples": 0},
        }
    )
    train_stop_resume_merge_reload(config, tmp_path / "merged")


def test_a_run_starts_from_a_gguf_file_and_trains_on_the_weights_of_the_file(
    tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    weights = tiny_weights()
    file = write_gguf(tmp_path / "tiny.gguf", weights)
    run = start_run(tiny_config(model={"name": str(file)}, training={"max_steps": 1}, evaluation={"samples": 0}))
    trained = {f"{path}.weight" for path in run.adapted}
    assert trained == {name for name in weights if name.endswith("_proj.weight")}
    for path in run.adapted:
        held = run.base.model.get_submodule(path).base
        expected = quantize_weight(torch.from_numpy(weights[f"{path}.weight"]))
        assert all(torch.equal(getattr(held, name).cpu(), getattr(expected, name)) for name in WEIGHT_TENSORS), path
    assert run.train(quiet)
    assert (run.directory / "adapter" / "adapter_model.safetensors").is_file()
