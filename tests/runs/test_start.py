"""Promises of a run's directory: it resumes from its first moment on, only as what it was, and says what changed."""

import dataclasses
import datetime
import errno
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from marks import slow_but
from safetensors.torch import load_file, save_file
from spying import opened_files
from tiny_models import make_model_directory
from tiny_tokenizers import tiny_tokenizer
from torch import Tensor

from qlora_kernels.registry import implementations
from qlora_trainer.adapters.peft_format import read_adapter
from qlora_trainer.common.atomic import new_directory
from qlora_trainer.common.errors import AdapterError, CheckpointError, DataError, DiskError, FileMissingError
from qlora_trainer.common.progress import silent
from qlora_trainer.config.load import dump_config, make_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.model.device import FAST
from qlora_trainer.model.fingerprint import base_fingerprint
from qlora_trainer.runs import checkpoint
from qlora_trainer.runs import start as runs
from qlora_trainer.runs.directory import read_samples, run_renderer
from qlora_trainer.runs.report.summary import write_run_report
from qlora_trainer.runs.resume_rules import config_changes, cpu_name, environment, environment_differences
from qlora_trainer.runs.run import Run
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.runs.trained import evaluate_trained, open_trained
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.nf4 import bitsandbytes

Config = Callable[..., RunConfig]


def quiet(record: dict[str, Any]) -> None:
    """A display that shows nothing."""


def edit_config(directory: Path, section: str, **fields: Any) -> None:
    """Change a run's config.yaml by hand."""
    path = directory / "config.yaml"
    raw = yaml.safe_load(path.read_text())
    raw[section] |= fields
    path.write_text(yaml.safe_dump(raw))


def final_adapter(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "adapter" / "adapter_model.safetensors")


def no_load(*args: object, **kwargs: object) -> None:
    raise AssertionError("the base was loaded, though the mistake could be seen before")


@pytest.fixture
def own_base(tmp_path: Path) -> Path:
    """A model directory that a test may change."""
    return make_model_directory(tmp_path / "own-base")


@pytest.fixture
def finished(tiny_config: Config) -> Path:
    run = start_run(tiny_config("finished", training={"max_steps": 2}))
    assert run.train(quiet)
    return run.directory


def change_tensor(base: Path, name: str, factor: float) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors[name] = tensors[name] * factor
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def test_a_run_reads_the_config_of_its_base_once(tiny_config: Config, own_base: Path) -> None:
    """From its start to its adapter, samples and report; once more where it is resumed, and where it is evaluated."""

    def train(run: Run, stop_after: int | None = None) -> None:
        run.answer_samples("before")
        run.train(quiet, stop_after)
        write_run_report(run)

    config = tiny_config(model={"name": str(own_base)}, training={"max_steps": 2})
    directory = Path(config.training.output_dir)
    for part in (
        lambda: train(start_run(config), stop_after=1),
        lambda: train(resume_run(directory)),
        lambda: evaluate_trained(open_trained(directory), answers=1),
    ):
        with opened_files() as paths:
            part()
        assert paths.count(str(own_base / "config.json")) == 1


@pytest.mark.parametrize(
    "name", slow_but(["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"], "model.embed_tokens.weight")
)
def test_a_base_with_another_dense_tensor_is_refused_on_resume(tiny_config: Config, own_base: Path, name: str) -> None:
    run = start_run(tiny_config(model={"name": str(own_base)}))
    change_tensor(own_base, name, 1.5)
    with pytest.raises(CheckpointError, match=rf"1 of 7 tensors outside the 4-bit layers differs, such as {name}"):
        resume_run(run.directory)


def test_a_base_with_the_same_codes_and_other_scales_is_refused_on_resume(tiny_config: Config, own_base: Path) -> None:
    """Twice the weights have the same 4-bit codes."""
    run = start_run(tiny_config(model={"name": str(own_base)}))
    change_tensor(own_base, "model.layers.1.mlp.up_proj.weight", 2.0)
    with pytest.raises(CheckpointError, match=r"1 of 14 layers holds other weights, such as model\.layers\.1\.mlp\.up"):
        resume_run(run.directory)


def test_another_config_of_the_base_is_refused_with_the_key_that_changed(tiny_config: Config, own_base: Path) -> None:
    run = start_run(tiny_config(model={"name": str(own_base)}))
    path = own_base / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"transformers_version": "4.0.0", "use_cache": False, "dtype": "float32"}))
    resume_run(run.directory)
    path.write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(
        CheckpointError, match=r"config\.json differs in rms_norm_eps \(rms_norm_eps was .* and is 0\.5"
    ):
        resume_run(run.directory)


def test_a_base_is_the_same_in_every_compute_dtype(tiny_config: Config) -> None:
    fingerprints = [
        start_run(tiny_config(dtype, model={"compute_dtype": dtype})).base.fingerprint
        for dtype in ("float32", "bfloat16")
    ]
    assert fingerprints[0] == fingerprints[1]


def test_a_last_bit_of_the_statistics_does_not_make_another_base(tiny_config: Config) -> None:
    """The offset is a mean, summed otherwise by other devices and numbers of threads."""
    run = start_run(tiny_config())
    layer = run.base.model.get_submodule("model.layers.0.mlp.up_proj").base
    original = base_fingerprint(run.base.model, {}, torch.bfloat16)
    layer.offset.copy_(torch.nextafter(layer.offset, torch.tensor(1.0)))
    assert original.difference(base_fingerprint(run.base.model, {}, torch.bfloat16)) is None
    layer.offset.mul_(1.001)
    assert original.difference(base_fingerprint(run.base.model, {}, torch.bfloat16)) is not None


def test_a_new_run_from_our_adapter_is_refused_on_another_base(
    tiny_config: Config, finished: Path, own_base: Path
) -> None:
    change_tensor(own_base, "model.norm.weight", 1.5)
    for source in (finished / "adapter", finished / "checkpoints" / "step-000002"):
        config = tiny_config("second", model={"name": str(own_base)}, adapter={"init_from": str(source)})
        with pytest.raises(AdapterError, match=r"trained on another base .* such as model\.norm\.weight"):
            start_run(config)
        assert not Path(config.training.output_dir).exists()


@pytest.mark.slow
def test_a_new_run_from_anothers_adapter_says_which_base_it_names(tiny_config: Config, finished: Path) -> None:
    foreign = finished / "adapter"
    (foreign / "base.json").unlink()
    (foreign / "trainer_state.json").write_text("{}")  # other trainers write one too
    run = start_run(tiny_config("same", adapter={"init_from": str(foreign)}))
    assert not [warning for warning in run.warnings if "was made for" in warning]
    path = foreign / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "someone/else"}))
    run = start_run(tiny_config("other", adapter={"init_from": str(foreign)}))
    assert [warning for warning in run.warnings if "was made for someone/else" in warning]


@pytest.mark.parametrize(
    ("trained", "wanted", "message"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, {}, r"set adapter\.target_modules=\[q_proj,v_proj\]"),
        (
            {},
            {"target_modules": ["q_proj"]},
            r"adapter\.target_modules=\[down_proj,gate_proj,k_proj,o_proj,q_proj,up_proj,v_proj\]",
        ),
        ({"bias": "lora_only"}, {}, r"set adapter\.bias=lora_only"),
        ({"use_rslora": True}, {}, r"set adapter\.alpha=16\.0"),
    ],
)
def test_an_adapter_of_other_settings_is_refused_before_the_base_is_loaded(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, trained: dict, wanted: dict, message: str
) -> None:
    first = start_run(tiny_config("first", adapter=trained))
    monkeypatch.setattr(runs, "load_base", no_load)
    source = first.directory / "checkpoints" / "step-000000"
    with pytest.raises(AdapterError, match=message):
        start_run(tiny_config("second", adapter={"init_from": str(source), **wanted}))


def test_a_missing_adapter_is_reported_before_the_base_is_looked_for(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "resolve_model", no_load)
    with pytest.raises(FileMissingError, match="nowhere"):
        start_run(tiny_config(adapter={"init_from": str(tmp_path / "nowhere")}))


@pytest.mark.parametrize(
    ("section", "fields", "change"),
    [
        ("adapter", {"dropout": 0.5}, r"adapter\.dropout: 0\.0 → 0\.5"),
        ("adapter", {"alpha": 9.0}, r"adapter\.alpha: 8\.0 → 9\.0"),
        ("optimizer", {"learning_rate": 0.1}, r"optimizer\.learning_rate: 0\.005 → 0\.1"),
        ("training", {"max_steps": 9}, r"training\.max_steps: 8 → 9"),
        ("training", {"epochs": 2}, r"training\.epochs: 1 → 2"),
        ("training", {"global_batch_size": 4}, r"training\.global_batch_size: 3 → 4"),
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


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", slow_but(["paged_adamw_32bit", "paged_adamw_8bit"], "paged_adamw_32bit"))
def test_bf16_adapters_resume_bit_for_bit(tiny_config: Config, optimizer: str) -> None:
    settings = {"adapter": {"dtype": "bfloat16", "rank": 16}, "optimizer": {"name": optimizer, "learning_rate": 5e-3}}
    whole = start_run(tiny_config("whole", **settings))
    losses: list[float] = []
    assert whole.train(lambda record: losses.append(record["loss"]))
    assert losses[-1] < losses[0]
    parts = start_run(tiny_config("parts", **settings))
    assert not parts.train(quiet, stop_after=3)
    assert resume_run(parts.directory).train(quiet)
    expected, found = final_adapter(whole.directory), final_adapter(parts.directory)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_adapters_of_another_dtype_are_another_run(tiny_config: Config) -> None:
    run = start_run(tiny_config())
    with pytest.raises(CheckpointError, match=r"adapter\.dtype: float32 → bfloat16"):
        resume_run(run.directory, ["adapter.dtype=bfloat16"])


def test_a_checkpoint_older_than_a_setting_was_trained_by_its_default(tiny_config: Config) -> None:
    config = tiny_config()
    saved = config.model_dump(mode="json")
    del saved["adapter"]["dtype"], saved["model"]["lm_head"]
    assert config_changes(saved, config) == ([], [])
    changed = config.replace({"adapter.dtype": "bfloat16"})
    assert config_changes(saved, changed) == (["adapter.dtype: float32 → bfloat16"], [])


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


def test_skipped_rows_are_listed_in_the_run_directory(tiny_config: Config, rows: Path) -> None:
    rows.write_text('{"messages": []}\n' + rows.read_text())
    run = start_run(tiny_config(data={"on_bad_row": "skip"}))
    (line,) = (run.directory / "skipped_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["where"] == "rows.jsonl, line 1"
    assert [warning for warning in run.warnings if "1 bad row was skipped" in warning]


@pytest.mark.slow
def test_a_mixed_run_resumes_bit_for_bit_and_only_in_the_same_mixture(tiny_config: Config, rows: Path) -> None:
    second = rows.with_name("second.jsonl")
    second.write_text("".join(rows.read_text().splitlines(keepends=True)[:4]))
    sources: Any = [{"path": str(rows), "weight": 0.5}, {"path": str(second), "weight": 0.5}]
    mixed = {"train": sources, "eval": 0.0}
    run = start_run(tiny_config("straight", data=mixed))
    assert run.state.loader.epoch_rows == run.prepared.report.epoch_examples == 8
    run.train(quiet)
    start_run(tiny_config("stopped", data=mixed)).train(quiet, stop_after=5)
    directory = Path(tiny_config("stopped").training.output_dir)
    resume_run(directory).train(quiet)
    straight = final_adapter(Path(tiny_config("straight").training.output_dir))
    for name, tensor in final_adapter(directory).items():
        assert torch.equal(tensor, straight[name]), name
    edit_config(directory, "data", train=[{**sources[0], "weight": 0.9}, {**sources[1], "weight": 0.5}])
    with pytest.raises(CheckpointError, match="data of this run changed"):
        resume_run(directory)


def test_a_refused_override_leaves_the_config_as_it_was(tiny_config: Config) -> None:
    run = start_run(tiny_config())
    before = (run.directory / "config.yaml").read_bytes()
    with pytest.raises(CheckpointError):
        resume_run(run.directory, ["training.activation_checkpointing=full", "adapter.rank=8"])
    assert (run.directory / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("bias", slow_but(["lora_only", "all"], "all"))
def test_a_bias_mode_that_differs_between_save_and_load_is_refused_by_name(finished: Path, bias: str) -> None:
    edit_config(finished, "adapter", bias=bias)
    with pytest.raises(CheckpointError, match=rf"adapter\.bias is {bias} in config\.yaml and none there"):
        open_trained(finished)
    with pytest.raises(CheckpointError, match=rf"adapter\.bias: none → {bias}"):
        resume_run(finished)


@pytest.mark.slow
def test_a_run_that_died_in_its_first_step_resumes_as_if_it_had_not(tiny_config: Config) -> None:
    whole = start_run(tiny_config("whole", adapter={"dropout": 0.2}))
    whole.answer_samples("before")
    assert whole.train(quiet)
    dead = start_run(tiny_config("dead", adapter={"dropout": 0.2}))
    torch.manual_seed(12345)  # what a new process would hold
    resumed = resume_run(dead.directory)
    assert resumed.state.step == 0
    assert resumed.train(quiet)
    expected, found = final_adapter(whole.directory), final_adapter(dead.directory)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.slow
def test_the_first_checkpoint_is_deleted_like_any_other(tiny_config: Config) -> None:
    run = start_run(tiny_config(checkpoint={"keep": 2}))
    assert [path.name for path in (run.directory / "checkpoints").iterdir()] == ["step-000000"]
    run.train(quiet)
    assert {path.name for path in (run.directory / "checkpoints").iterdir()} == {"step-000004", "step-000008"}


def test_a_run_that_cannot_write_its_first_checkpoint_leaves_no_directory(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = tiny_config()
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(DiskError, match="step 0"):
        start_run(config)
    directory = Path(config.training.output_dir)
    assert [path for path in directory.parent.iterdir() if directory.name in path.name] == []


@pytest.mark.parametrize("has_ended", slow_but([True, False], False))
def test_evaluating_on_rows_that_changed_since_training_says_so(tiny_config: Config, has_ended: bool) -> None:
    """Rows kept for evaluation now may have been trained on."""
    run = start_run(tiny_config("own", training={"max_steps": 2}))
    if has_ended:
        run.train(quiet)
    trained = open_trained(run.directory)
    evaluate_trained(trained)
    assert trained.warnings == []
    assert isinstance(run.config.data.train, str)
    rows = Path(run.config.data.train)
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    evaluate_trained(trained)
    (warning,) = trained.warnings
    assert "changed since training" in warning


@pytest.mark.slow
def test_a_finished_run_needs_no_checkpoints(finished: Path) -> None:
    expected = evaluate_trained(open_trained(finished))
    shutil.rmtree(finished / "checkpoints")
    trained = open_trained(finished)
    assert trained.source == "the final adapter"
    assert evaluate_trained(trained) == expected


@pytest.mark.slow
def test_the_adapter_with_more_steps_is_opened(tiny_config: Config, finished: Path) -> None:
    longer = start_run(tiny_config("longer", training={"max_steps": 4}))
    longer.train(quiet, stop_after=3)
    shutil.copytree(finished / "adapter", longer.directory / "adapter")
    assert open_trained(longer.directory).source == "the checkpoint of step 3; training has not ended"
    shutil.rmtree(longer.directory / "checkpoints")
    assert open_trained(longer.directory).source == "the final adapter"


def write_half(final: Path) -> None:
    with new_directory(final, replaces=True) as work:
        (work / "adapter_config.json").write_text("half")
        raise ZeroDivisionError


def test_the_final_adapter_is_replaced_whole_or_not_at_all(finished: Path) -> None:
    final = finished / "adapter"
    before = {path.name: path.read_bytes() for path in final.iterdir()}
    assert before.keys() == {"adapter_config.json", "adapter_model.safetensors", "base.json"}
    with pytest.raises(ZeroDivisionError):
        write_half(final)
    assert {path.name: path.read_bytes() for path in final.iterdir()} == before
    (final / "leftover").write_text("")
    assert resume_run(finished).train(quiet)
    assert {path.name: path.read_bytes() for path in final.iterdir()} == before
    assert [path.name for path in finished.iterdir() if path.name.startswith(".")] == []
    assert read_adapter(final).paths


@pytest.mark.slow
def test_a_hub_name_is_recorded_with_the_commit_it_was(
    tiny_config: Config, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--owner--model" / "snapshots" / commit
    shutil.copytree(tiny_llama, snapshot)
    asked = []

    def resolve(name: str, revision: str | None, *rest: object) -> ModelDirectory:
        asked.append((name, revision))
        return ModelDirectory.open(snapshot)

    monkeypatch.setattr(runs, "resolve_model", resolve)
    run = start_run(tiny_config(model={"name": "owner/model"}))
    assert yaml.safe_load((run.directory / "config.yaml").read_text())["model"]["revision"] == commit
    resume_run(run.directory)
    assert asked == [("owner/model", None), ("owner/model", commit)]
    local = start_run(tiny_config("local", model={"name": str(snapshot)}))
    assert local.config.model.revision is None


def test_a_checkpoint_records_what_its_last_bits_depend_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QLORA_KERNELS", "reference")
    recorded = environment(torch.device("cpu"), torch.float32)
    assert recorded["kernels"] == "reference"
    assert recorded["compute_dtype"] == "float32"
    assert {"cpu", "cuda", "device", "accelerate", "qlora-trainer", "bitsandbytes"} <= recorded.keys()
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 3: fast\n\nprocessor\t: 1\n")
    assert cpu_name(tmp_path / "cpuinfo") == "Some CPU @ 3: fast"


@pytest.mark.slow
def test_a_run_that_goes_on_without_a_compiler_says_that_its_kernels_changed(
    tiny_config: Config, request: pytest.FixtureRequest
) -> None:
    if implementations("cpu")["dequantize_nf4"] != FAST:
        pytest.skip("there is no C++ compiler here")
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


@pytest.mark.slow
@pytest.mark.parametrize("samples", slow_but([1, 3], 1))
def test_another_number_of_samples_on_resume_keeps_the_answers_that_match(tiny_config: Config, samples: int) -> None:
    run = start_run(tiny_config(training={"max_steps": 1}))
    run.answer_samples("before")
    before = [sample["before"] for sample in read_samples(run.directory)]
    resumed = resume_run(run.directory, [f"evaluation.samples={samples}"])
    resumed.train(quiet)
    resumed.answer_samples("after")
    kept = read_samples(run.directory)
    assert len(kept) == samples
    assert [sample["before"] for sample in kept] == [*before, None][:samples]
    assert all(sample["after"] is not None for sample in kept)
    assert write_run_report(resumed).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("packing", slow_but([True, False], True))
def test_a_sample_is_asked_by_no_more_tokens_than_a_row_of_training_has(
    tiny_config: Config, rows: Path, packing: bool
) -> None:
    """Also of rows that are cut: by whole turns, or at the end of a completion."""
    messages = [{"role": role, "content": "fox"} for role in ("user", "assistant") * 30]
    long: list[dict[str, Any]] = [{"messages": messages}, {"prompt": "fox " * 9, "completion": "dog " * 900}]
    for row in long:
        rows.write_text(4 * (json.dumps(row) + "\n"))
        data = {"eval": 0, "max_length": 64, "packing": packing}
        run = start_run(tiny_config("-".join(row), data=data, training={"global_batch_size": 2, "max_steps": 1}))
        asked: list[int] = []
        run.base.model.get_input_embeddings().register_forward_pre_hook(
            lambda _, x, seen=asked: seen.append(x[0].shape[1])
        )
        run.answer_samples("before")
        assert 1 < max(asked) <= 64


def test_a_tokenizer_with_tokens_beyond_the_embedding_is_refused_before_the_base_is_loaded(
    tiny_config: Config, own_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = own_base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 64}))
    monkeypatch.setattr(runs, "load_base", no_load)
    with pytest.raises(DataError, match="has only 64"):
        start_run(tiny_config(model={"name": str(own_base)}))


def test_a_released_run_leaves_no_paged_buffer_of_its_own(tiny_config: Config) -> None:
    run = start_run(tiny_config())
    manager = bitsandbytes.functional.GlobalPageManager.get_instance()
    others = torch.zeros(3)
    state = run.state.optimizer.optimizer.state[run.state.groups[0].data]
    manager.paged_tensors += [state["state1"], others, state["state2"]]  # as on CUDA; nothing is paged on a CPU
    try:
        run.release()
        assert len(manager.paged_tensors) == 1
        assert manager.paged_tensors[0] is others
    finally:
        manager.paged_tensors.clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_base_is_the_same_on_cpu_and_cuda(tiny_config: Config) -> None:
    runs_of = [start_run(tiny_config(device, model={"device": device})) for device in ("cpu", "cuda")]
    first, second = (run.base.fingerprint for run in runs_of)
    assert first.difference(second) is None
    assert dataclasses.replace(first, dense={}).difference(second) is not None


@pytest.fixture
def run_as_on_a_card(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The warnings of a run whose config finds a card, by torch's device functions; its base lies in host memory."""
    original = runs.load_base

    def on_the_host(model: ModelDirectory, settings: Any, *rest: Any) -> Any:
        with pytest.MonkeyPatch.context() as no_card:
            no_card.setattr(torch.cuda, "is_available", lambda: False)
            return original(model, settings, *rest)

    def warnings(name: str, device: str = "auto") -> list[str]:
        config = tiny_config(f"{name}-{device}", model={"device": device}, optimizer={"name": name})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(runs, "load_base", on_the_host)
        monkeypatch.setattr(runs, "check_fits_here", lambda *arguments: None)  # would plan for the card's memory
        model = ModelDirectory.open(Path(config.model.name))
        return runs._assemble(
            config, model.path, model, run_renderer(config, runs.load_tokenizer(model)), silent
        ).warnings

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_86"])
    return warnings


@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize("name", slow_but(["paged_adamw_32bit", "paged_adamw_8bit", "adamw"], "paged_adamw_32bit"))
def test_a_run_on_a_card_that_refuses_to_page_says_so_with_what_it_said(
    run_as_on_a_card: Callable[..., list[str]],
    bitsandbytes_of_the_child: Callable[..., Path],
    name: str,
    works: bool,
) -> None:
    end = "print('Error operation not supported at line 5', flush=True); ctypes.CDLL(None).exit(1)"
    asked = bitsandbytes_of_the_child("return torch.empty(shape, dtype=dtype)" if works else end)
    reported = [warning for warning in run_as_on_a_card(name) if "not paged" in warning]
    assert asked.exists() == (name != "adamw")
    if works or name == "adamw":
        assert reported == []
        return
    (warning,) = reported
    assert "Error operation not supported at line 5" in warning
    assert "a lower adapter.rank" in warning
    assert ("optimizer.name=paged_adamw_8bit" in warning) == (name == "paged_adamw_32bit")
    assert not any("not paged" in warning for warning in run_as_on_a_card(name, device="cpu"))


def test_a_run_under_wsl_says_that_nothing_is_paged(
    run_as_on_a_card: Callable[..., list[str]],
    bitsandbytes_of_the_child: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = bitsandbytes_of_the_child("return torch.empty(shape, dtype=dtype)")
    monkeypatch.setattr(platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    (warning,) = [warning for warning in run_as_on_a_card("paged_adamw_32bit") if "not paged" in warning]
    assert "WSL does not let host and card use managed memory at the same time" in warning
    assert not asked.exists(), "no child is needed for that"


def test_the_day_a_run_starts_is_recorded_where_the_template_writes_it(tiny_config: Config) -> None:
    config = tiny_config()
    assert runs._with_date(config, run_renderer(config, tiny_tokenizer("llama3"))) == config
    dated = runs._with_date(config, run_renderer(config, tiny_tokenizer("llama3_2")))
    assert dated.data.template_date == datetime.date.today()
    named = tiny_config(data={"template_date": "2024-02-29"})
    assert runs._with_date(named, run_renderer(named, tiny_tokenizer("llama3_2"))) == named
    assert make_config(yaml.safe_load(dump_config(dated))) == dated
