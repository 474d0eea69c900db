"""Promises of resuming: what would make another run is refused by its key; what may change last bits is reported."""

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from kind_cases import CASES
from marks import needs_compiler
from tiny_runs import edit_config, final_adapter, no_load, quiet

from qlora_trainer.common.errors import CheckpointError, ConfigError
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.runs import start as runs
from qlora_trainer.runs.resume_rules import (
    config_changes,
    cpu_name,
    environment,
    environment_differences,
    with_saved_options,
)
from qlora_trainer.runs.start import resume_run, start_run

Config = Callable[..., RunConfig]


@pytest.mark.parametrize(
    ("section", "fields", "change"),
    [
        ("adapter", {"dropout": 0.5}, r"adapter\.dropout: 0\.0 → 0\.5"),
        ("adapter", {"alpha": 9.0}, r"adapter\.alpha: 8\.0 → 9\.0"),
        ("optimizer", {"learning_rate": 0.1}, r"optimizer\.learning_rate: 0\.005 → 0\.1"),
        ("training", {"max_steps": 9}, r"training\.max_steps: 8 → 9"),
        ("training", {"epochs": 2}, r"training\.epochs: 1 → 2"),
        ("training", {"global_batch_size": 4}, r"training\.global_batch_size: 3 → 4"),
        ("training", {"neftune_noise_alpha": 5.0}, r"training\.neftune_noise_alpha: 0\.0 → 5\.0"),
        ("training", {"seed": 1}, r"training\.seed: 0 → 1"),
        ("model", {"compute_dtype": "bfloat16"}, r"model\.compute_dtype: auto → bfloat16"),
    ],
)
def test_a_setting_that_would_make_another_run_is_refused_on_resume(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, section: str, fields: dict, change: str
) -> None:
    run = start_run(tiny_config())
    monkeypatch.setattr(runs, "load_base", no_load)
    (key, value) = next(iter(fields.items()))
    with pytest.raises(CheckpointError, match=change):
        resume_run(run.directory, [f"{section}.{key}={json.dumps(value)}"])
    edit_config(run.directory, section, **fields)
    with pytest.raises(CheckpointError, match=change):
        resume_run(run.directory)


OF_KINDS = {case.settings["kind"]: case.settings for case in CASES.values() if case.tokenizer is None}


@pytest.mark.parametrize("was", OF_KINDS)
def test_another_kind_of_adapter_is_another_run(was: str, tiny_config: Config) -> None:
    saved = tiny_config(adapter=OF_KINDS[was]).model_dump(mode="json")
    for now, settings in OF_KINDS.items():
        refused, _ = config_changes(saved, tiny_config(adapter=settings))
        assert [change for change in refused if "kind" in change] == [f"adapter.kind: {was} → {now}"] * (now != was)


def test_another_kind_is_refused_by_its_name_whatever_settings_are_left_of_the_one_before(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run(tiny_config())
    assert run.config.adapter.rank == 4, "which other kinds do not have"
    monkeypatch.setattr(runs, "load_base", no_load)
    for kind in OF_KINDS.keys() - {"lora"}:
        with pytest.raises(CheckpointError, match=rf"different run:\n  - adapter\.kind: lora → {kind}\n"):
            resume_run(run.directory, [f"adapter.kind={kind}"])
    with pytest.raises(ConfigError, match=r"adapter\.kind"):
        resume_run(run.directory, ["adapter.kind=lorra"])
    edit_config(run.directory, "adapter", kind="ia3")
    with pytest.raises(CheckpointError, match=r"adapter\.kind: lora → ia3"):
        resume_run(run.directory)


@pytest.mark.slow
def test_overrides_of_memory_and_logging_change_no_bit_and_are_written_back(tiny_config: Config) -> None:
    whole = start_run(tiny_config("whole", adapter={"dropout": 0.2}))
    assert whole.train(quiet)
    parts = start_run(tiny_config("parts", adapter={"dropout": 0.2}))
    assert not parts.train(quiet, stop_after=3)
    overrides = [
        "training.activation_checkpointing=full",
        "training.save_every=1",
        "checkpoint.keep=1",
        "evaluation.samples=1",
    ]
    resumed = resume_run(parts.directory, overrides)
    assert resumed.warnings == []
    assert resumed.train(quiet)
    expected, found = final_adapter(whole.directory), final_adapter(parts.directory)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    written = yaml.safe_load((parts.directory / "config.yaml").read_text())
    assert written["training"]["activation_checkpointing"] == "full"
    assert written["checkpoint"]["keep"] == 1
    assert [path.name for path in (parts.directory / "checkpoints").iterdir()] == ["step-000008"]


def test_adapters_of_another_dtype_are_another_run(tiny_config: Config) -> None:
    run = start_run(tiny_config())
    with pytest.raises(CheckpointError, match=r"adapter\.dtype: float32 → bfloat16"):
        resume_run(run.directory, ["adapter.dtype=bfloat16"])


def test_a_checkpoint_older_than_a_setting_was_trained_by_its_default(tiny_config: Config) -> None:
    config = tiny_config()
    saved = config.model_dump(mode="json")
    del saved["adapter"]["dtype"], saved["model"]["lm_head"]
    resumed = with_saved_options(saved, config)
    assert resumed.memory_options() == config.memory_options()
    assert config_changes(saved, resumed) == ([], [])
    changed = resumed.replace({"adapter.dtype": "bfloat16"})
    assert config_changes(saved, changed) == (["adapter.dtype: float32 → bfloat16"], [])


def test_an_option_left_open_is_that_of_the_checkpoint(tiny_config: Config) -> None:
    saved = tiny_config(model={"lm_head": "8bit"}, adapter={"dtype": "bfloat16"}).model_dump(mode="json")
    resumed = with_saved_options(saved, tiny_config(adapter={"dtype": "float32"}))
    assert (resumed.model.lm_head, resumed.adapter.dtype) == ("8bit", "float32"), "what is set stays, to be refused"


@pytest.mark.slow
def test_a_run_goes_on_where_its_base_and_its_data_have_been_moved(
    tiny_config: Config, tiny_llama: Path, rows: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    run = start_run(tiny_config(model={"name": str(base)}))
    assert not run.train(quiet, stop_after=2)
    base.rename(tmp_path / "moved-base")
    rows.rename(tmp_path / "moved.jsonl")
    moved = [f"model.name={tmp_path / 'moved-base'}", f"data.train={tmp_path / 'moved.jsonl'}"]
    assert resume_run(run.directory, moved).train(quiet)


@pytest.mark.slow
def test_packing_changed_on_resume_is_reported_as_it_may_change_last_bits(tiny_config: Config) -> None:
    run = start_run(tiny_config())
    (warning,) = resume_run(run.directory, ["data.packing=false"]).warnings
    assert "data.packing was True and is False" in warning


@pytest.mark.slow
def test_a_changed_micro_batch_is_reported_as_it_may_change_last_bits(tiny_config: Config) -> None:
    run = start_run(tiny_config())
    (warning,) = resume_run(run.directory, ["training.micro_batch_tokens=512"]).warnings
    assert "training.micro_batch_tokens was auto and is 512" in warning
    assert "last bits may differ" in warning


def test_a_refused_override_leaves_the_config_as_it_was(tiny_config: Config) -> None:
    run = start_run(tiny_config())
    before = (run.directory / "config.yaml").read_bytes()
    with pytest.raises(CheckpointError):
        resume_run(run.directory, ["training.activation_checkpointing=full", "adapter.rank=8"])
    assert (run.directory / "config.yaml").read_bytes() == before


def test_a_checkpoint_records_what_its_last_bits_depend_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QLORA_KERNELS", "reference")
    recorded = environment(torch.device("cpu"), torch.float32)
    assert recorded["kernels"] == "reference"
    assert recorded["compute_dtype"] == "float32"
    assert {"cpu", "cuda", "device", "accelerate", "qlora-trainer", "bitsandbytes"} <= recorded.keys()
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 3: fast\n\nprocessor\t: 1\n")
    assert cpu_name(tmp_path / "cpuinfo") == "Some CPU @ 3: fast"


@pytest.mark.slow
@needs_compiler()
def test_a_run_that_goes_on_without_a_compiler_says_that_its_kernels_changed(
    tiny_config: Config, request: pytest.FixtureRequest
) -> None:
    run = start_run(tiny_config(model={"device": "cpu"}))
    assert not [warning for warning in resume_run(run.directory).warnings if "its last bits may differ" in warning]
    request.getfixturevalue("without_compiler")
    (warning,) = [text for text in resume_run(run.directory).warnings if "its last bits may differ" in text]
    assert "kernels_taken was" in warning
    assert "plain torch for dequantize_nf4, quantize_nf4" in warning


@pytest.mark.parametrize(("before", "after"), [("3.6.0", "3.7.1"), ("3.6.0", "none"), ("none", "3.7.1")])
def test_a_run_that_goes_on_under_another_triton_says_so(
    before: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what importlib finds installed; a checkpoint of an earlier version does not say which it was."""
    installed = importlib.metadata.distribution

    def recorded(triton: str) -> dict[str, Any]:
        def found(name: str) -> Any:
            if name != "triton":
                return installed(name)
            if triton == "none":
                raise importlib.metadata.PackageNotFoundError(name)
            return SimpleNamespace(version=triton)

        monkeypatch.setattr(importlib.metadata, "distribution", found)
        return environment(torch.device("cuda"), torch.bfloat16)

    monkeypatch.setenv("QLORA_KERNELS", "reference")  # no kernel is tried for this
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    first, second = recorded(before), recorded(after)
    (warning,) = environment_differences(first, second)
    assert f"(triton was {before} and is {after})" in warning
    of_before = {key: value for key, value in first.items() if key not in ("triton", "kernels_taken")}
    assert environment_differences(of_before, second) == []
    assert environment(torch.device("cpu"), torch.float32)["triton"] is None, "a CPU's bits do not depend on it"
