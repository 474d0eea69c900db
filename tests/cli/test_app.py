"""The command line's promises: the whole way works as typed, and every mistake is one error message and exit code 2."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from json_docs import documented
from transformers.models.llama.modeling_llama import LlamaModel

from qlora_trainer.cli.app import app
from qlora_trainer.config.schema import RunConfig

Config = Callable[..., RunConfig]


def test_a_run_whose_samples_run_out_of_memory_trains_and_writes_its_report(
    qlora: Callable, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt as a whole does not fit where there is a cache, which training and eval loss have not."""
    real = LlamaModel.forward

    def forward(self: Any, input_ids: Any = None, use_cache: bool | None = None, **rest: Any) -> Any:
        if use_cache and input_ids.shape[1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.51 GiB.")
        return real(self, input_ids=input_ids, use_cache=use_cache, **rest)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    code, _, reported = qlora("train", config_file, "training.max_steps=2")
    assert code == 0, reported
    for when in ("before", "after"):
        warning = (
            f"The samples have no answers {when} training, as memory ran out (OutOfMemoryError: CUDA out of memory"
        )
        assert reported.count(warning) == 1
        assert warning in (tmp_path / "run" / "report.html").read_text()
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_the_whole_way_works_as_typed(qlora: Callable, config_file: Path, tiny_llama: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, reported = qlora("train", config_file, "training.max_steps=4")
    assert code == 0, reported
    assert "eval loss" in reported
    adapter, *_, report, following = out.splitlines()
    assert (adapter, report) == (f"Adapter: {run}/adapter", f"Report:  {run}/report.html")
    assert following == f"Next:    qlora merge {run} --output {run}-merged"
    page = (run / "report.html").read_text()
    assert "<svg" in page
    assert "<h2>Data</h2>" in page
    assert "https://" not in page.replace("https://www.w3.org", "")
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "metrics.jsonl", "adapter", "checkpoints"}
    samples = json.loads((run / "samples.json").read_text())
    assert len(samples) == 2
    assert all(sample["before"] is not None and sample["after"] is not None for sample in samples)

    code, out, _ = qlora("evaluate", run, "--answers", 2, "--json")
    assert code == 0
    assert json.loads(out).keys() == documented("qlora evaluate")
    code, out, _ = qlora("generate", run, "--prompt", "the quick brown fox", "--max-new-tokens", 5)
    assert code == 0
    assert out.endswith("\n")
    code, out, _ = qlora("merge", run, "--output", tmp_path / "merged", "--json")
    assert code == 0
    merged = json.loads(out)
    assert merged.keys() == documented("qlora merge")
    assert merged["report"].keys() == documented("qlora merge", "report")
    assert merged["report"]["verification"].keys() == documented("qlora merge", "verification")
    assert merged["report"]["verification"]["difference"].keys() == documented("qlora merge", "difference")
    assert merged["report"]["verification"]["difference"]["kl"] < 1e-5
    code, _, reported = qlora(
        "merge", run, "--output", tmp_path / "sharded", "--shard-size", "100KB", "--model", tiny_llama
    )
    assert code == 0
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    code, _, reported = qlora("merge", run, "--output", tmp_path / "other", "--shard-size", "5G")
    assert code == 2
    assert "write it as 24GiB" in reported
    code, _, reported = qlora("resume", run)
    assert code == 0
    assert "step 4 of 4" in reported


def test_inspect_shows_rows_and_counts_before_any_weight_is_read(
    qlora: Callable, config_file: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    without_weights = tmp_path / "no-weights"
    shutil.copytree(tiny_llama, without_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    model = f"model.name={without_weights}"
    code, out, reported = qlora("inspect", config_file, model, "--rows", 1)
    assert code == 0
    assert reported == "… reading rows.jsonl"
    for words in ("rows read", "training row 0,", "<|im_start|>user", "an epoch", "fill", "tokens a row", "█"):
        assert words in out, words
    assert "training row 1," not in out
    code, out, _ = qlora("inspect", config_file, model, "--eval", "--row", 1)
    assert code == 0
    assert "eval row 1," in out
    assert "rows read" not in out
    code, _, reported = qlora("inspect", config_file, model, "--row", 99)
    assert code == 2
    assert "no training row 99" in reported


def test_inspect_answers_a_program_by_stable_names(qlora: Callable, config_file: Path) -> None:
    code, out, _ = qlora("inspect", config_file, "--json", "--eval", "--row", 2)
    assert code == 0
    report = json.loads(out)
    assert report.keys() == documented("qlora inspect")
    assert report["train"]["examples"] + report["eval"]["examples"] == 20
    parts = {"source": report["sources"][0], "set": report["train"], "layout": report["epoch"]["packed"], **report}
    for part in ("source", "set", "lengths", "epoch", "layout", "row"):
        assert parts[part].keys() == documented("qlora inspect", part), part
    assert sum(report["lengths"]["train"]) == report["train"]["examples"] == report["epoch"]["rows"] == 16
    assert report["epoch"]["steps"] == 6, "16 rows in steps of 3"
    row = report["row"]
    assert (row["set"], row["index"]) == ("eval", 2)


@pytest.mark.slow
def test_plan_answers_a_program(qlora: Callable, config_file: Path, tmp_path: Path) -> None:
    code, out, reported = qlora("plan", config_file, "--gpu-memory", "8GiB", "--json")
    assert code == 0, reported
    answer = json.loads(out)
    assert answer.keys() == documented("qlora plan")
    assert answer["plan"].keys() == answer["longest_context"].keys() == documented("qlora plan", "a plan")
    assert all(way.keys() == documented("qlora plan", "a way") for way in answer["plan"]["elsewhere"].values())
    assert answer["gpu_memory"] == 8 * 2**30
    assert answer["fits"] is True
    assert answer["plan"]["total"] == sum(answer["plan"]["components"].values()) < answer["gpu_memory"]
    assert answer["longest_context"]["max_length"] == 512, "the model's positions end the search"
    assert answer["largest_micro_batch"]["micro_batch_tokens"] == 3 * 128, "a step's rows end the search"
    assert not (tmp_path / "run").exists()


def test_plan_answers_a_person(qlora: Callable, config_file: Path) -> None:
    code, out, reported = qlora(
        *("plan", config_file, "--gpu-memory", "512MiB", "--no-search"),
        *("training.activation_checkpointing=full", "model.embeddings=device", "model.lm_head=dense"),
        *("adapter.dtype=float32", "optimizer.name=adamw"),
    )
    assert code == 0
    assert "│" not in reported
    assert "does not fit, by" in out
    assert "CUDA context (allowance)" in out
    assert "mixed precision" in " ".join(out.split())
    assert "Full fine-tuning in 16 bits, before activations: " in out


def test_quantize_writes_a_model_in_4_bits(qlora: Callable, tiny_llama: Path, tmp_path: Path) -> None:
    code, out, _ = qlora("quantize", tiny_llama, "--output", tmp_path / "nf4", "--json")
    assert code == 0
    answer = json.loads(out)
    assert answer.keys() == documented("qlora quantize")
    assert (answer["weights"], answer["dense"], answer["source_dtype"]) == (14, 7, "bfloat16")
    assert 0 < answer["bytes"] < answer["source_bytes"]
    code, _, reported = qlora("quantize", tiny_llama, "--output", tmp_path / "nf4")
    assert code == 2
    assert "exists and is not empty" in reported


def test_doctor_answers(qlora: Callable) -> None:
    code, out, _ = qlora("doctor", "--json")
    assert code in (0, 1)
    assert json.loads(out)[0].keys() == documented("qlora doctor")


def test_a_paragraph_of_help_is_one_line_that_the_terminal_breaks() -> None:
    for command in app.registered_commands:
        assert command.help, command.name
        assert all("\n" not in paragraph for paragraph in command.help.split("\n\n")), command.name


def mistakes(tmp_path: Path, config: Path) -> dict[str, tuple[list[object], str]]:
    """Name -> (arguments, what the error message must say)."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n')
    missing_field = tmp_path / "fields.jsonl"
    missing_field.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    masked = tmp_path / "masked.jsonl"
    masked.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}\n' * 3)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("")
    no_model = tmp_path / "no-model"
    no_model.mkdir()
    return {
        "missing config": (["train", tmp_path / "none.yaml"], "no config file"),
        "misspelled key": (["train", config, "adapter.rnak=3"], "did you mean adapter.rank"),
        "wrong type": (["train", config, "adapter.rank=three"], "adapter.rank"),
        "missing data": (["train", config, f"data.train={tmp_path / 'no.jsonl'}"], "no.jsonl"),
        "broken row": (["train", config, f"data.train={broken}"], "broken.jsonl, line 2"),
        "row without a field": (["train", config, f"data.train={missing_field}"], "fields.jsonl, line 2"),
        "rows empty after masking": (["train", config, f"data.train={masked}"], "none of the 3 rows"),
        "unreadable model": (["train", config, f"model.name={no_model}"], "no config.json"),
        "missing model": (["train", config, f"model.name={tmp_path / 'nowhere'}"], "no model at"),
        "targets that match nothing": (["train", config, "adapter.target_modules=[query]"], "There are: down_proj"),
        "taken output": (["train", config, f"training.output_dir={taken}"], "not empty"),
        "no run directory": (["resume", taken], "no config.yaml"),
        "run without checkpoint": (["evaluate", tmp_path / "nowhere"], "no config.yaml"),
        "no cuda": (["train", config, "model.device=cuda"], "no CUDA device"),
        "no amount of memory": (["plan", config, "--gpu-memory", "24"], "no amount of memory"),
    }


MISTAKES = """missing config, misspelled key, wrong type, missing data, broken row, row without a field, rows empty
after masking, unreadable model, missing model, targets that match nothing, taken output, no run directory, run without
checkpoint, no cuda, no amount of memory"""


@pytest.mark.parametrize("name", " ".join(MISTAKES.split()).split(", "))
def test_a_mistake_is_one_message_and_exit_code_2(
    qlora: Callable, config_file: Path, tmp_path: Path, name: str
) -> None:
    arguments, message = mistakes(tmp_path, config_file)[name]
    code, out, reported = qlora(*arguments)
    assert code == 2
    assert message in reported
    assert reported.count("error ") == 1
    assert "Traceback" not in reported
    assert out == ""
    assert not (tmp_path / "run").exists()


def test_a_full_disk_ends_with_an_error_message_and_leaves_the_last_checkpoint(
    qlora: Callable, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_trainer.runs import checkpoint

    right, calls = checkpoint.save_file, []

    def full(*args: object, **kwargs: object) -> None:
        calls.append(args)
        if len(calls) > 2:  # of steps 0 and 4
            raise OSError(errno.ENOSPC, "No space left on device")
        right(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    code, _, reported = qlora("train", config_file)
    assert code == 2
    assert "step 8 could not be written" in reported
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-000000", "step-000004"}
    monkeypatch.setattr(checkpoint, "save_file", right)
    code, _, reported = qlora("resume", tmp_path / "run")
    assert code == 0, reported
    assert (tmp_path / "run" / "adapter").is_dir()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
)
def test_running_out_of_memory_ends_with_an_error_message(
    qlora: Callable, config_file: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from qlora_trainer.runs import run as training_run

    def raise_it(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(training_run, "train", raise_it)
    code, _, reported = qlora("train", config_file)
    assert code == 2
    assert "Memory ran out" in reported
    assert "training.activation_checkpointing=full" in reported


@pytest.mark.slow
def test_a_row_that_fits_no_memory_ends_with_an_error_message(
    qlora: Callable, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_trainer.training import step

    def run_out(*args: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(step, "loss_sum", run_out)
    code, _, reported = qlora("train", config_file)
    assert code == 2
    assert "tokens does not fit the memory of cpu by itself" in " ".join(reported.split())
    assert "Traceback" not in reported


@pytest.mark.slow
def test_our_own_fault_is_a_traceback_and_exit_code_1(config_file: Path) -> None:
    code = (
        "import sys; from qlora_trainer.cli import app; from qlora_trainer.config import load\n"
        "load.load_config = lambda *a: 1 / 0\n"
        f"sys.argv = ['qlora', 'train', {str(config_file)!r}]\n"
        "app.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(
    "command",
    ["", "init", "train", "resume", "evaluate", "generate", "merge", "plan", "inspect", "quantize", "doctor", "demo"],
)
def test_every_command_explains_itself(qlora: Callable, command: str) -> None:
    code, out, _ = qlora(*command.split(), "--help")
    assert code == 0
    assert "Usage" in out


def test_package_runs_as_a_program() -> None:
    """As where the script `qlora` is not on the path."""
    command = [sys.executable, "-m", "qlora_trainer", "merge", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--shard-size" in done.stdout


def test_the_demos_config_is_the_shipped_one() -> None:
    from qlora_trainer.cli.demo_run import demo_settings

    shipped = yaml.safe_load((Path(__file__).parents[2] / "configs" / "demo.yaml").read_text())
    used = demo_settings("m", Path("demo-run/data"), Path("x"))
    shipped["model"]["name"], shipped["training"]["output_dir"] = "m", used["training"]["output_dir"]
    assert shipped == used
