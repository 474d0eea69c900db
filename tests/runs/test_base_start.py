"""A start that changes the base: its copy is known, a run on it begins with the start, and all commands find both."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from json_docs import documented
from safetensors.torch import load_file, save_file
from tiny_models import load
from tiny_runs import final_adapter, no_load, quiet
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from qlora_trainer.adapters.inject import adapter_state_dict, add_adapters, load_adapter_state
from qlora_trainer.adapters.peft_format import read_adapter
from qlora_trainer.common.errors import AdapterError, CheckpointError
from qlora_trainer.config.load import load_config, save_config
from qlora_trainer.config.schema import AdapterConfig, RunConfig
from qlora_trainer.merging.merge_run import merge_run
from qlora_trainer.model.quantized_copy import quantize_checkpoint
from qlora_trainer.runs import base_start
from qlora_trainer.runs import start as starting
from qlora_trainer.runs.base_start import quantize_with_start, taken_out_of
from qlora_trainer.runs.directory import read_base_record
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.runs.trained import evaluate_trained, open_trained
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]
Models = Callable[[str], Path]
Qlora = Callable[..., tuple[int, str, str]]
CPU = torch.device("cpu")
IDS = torch.arange(5, 45)[None]


def copy_of(directory: Path, output: Path, init: str, **settings: Any) -> dict[str, Any]:
    """Write the copy of a start of rank 4; returns what the report says of it."""
    adapter = AdapterConfig(**{"init": init, "rank": 4, "alpha": 8, **settings})
    model = ModelDirectory.open(directory)
    report = quantize_with_start(model, output, adapter, name=str(directory), device=CPU)
    assert report.start is not None
    return dict(report.start)


@pytest.fixture(scope="session")
def pissa(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("copies") / "pissa"
    copy_of(tiny_llama, output, "pissa")
    return output


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "init", ["loftq", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pissa", "olora"))]
)
def test_the_copy_with_its_start_is_the_original_base(
    init: str, family: str, tiny_models: Models, tmp_path: Path
) -> None:
    """As near as the report says, which is what NF4 costs; both bases are recorded as they load."""
    start = copy_of(tiny_models(family), tmp_path / "copy", init)
    base, plain = load(tmp_path / "copy"), load(tiny_models(family))
    record, taken_out = read_base_record(tmp_path / "copy" / "start"), taken_out_of(tmp_path / "copy")
    assert record is not None
    assert taken_out is not None
    assert record.fingerprint == base.fingerprint
    assert taken_out[1].fingerprint == plain.fingerprint
    assert base.fingerprint.difference(plain.fingerprint) is not None
    add_adapters(base.model, AdapterConfig(rank=4, alpha=8))
    load_adapter_state(base.model, taken_out[0].tensors)
    dense = AutoModelForCausalLM.from_pretrained(tiny_models(family), dtype=torch.float32)
    with torch.no_grad():
        expected = dense(IDS).logits
        with_start, by_plain = ((model(IDS).logits - expected).norm() for model in (base.model, plain.model))
    assert with_start < 1.5 * by_plain
    assert 0 < start["plain_error"] < 0.2
    if init == "loftq":
        assert start["error"] < start["plain_error"]


def test_a_run_on_the_copy_begins_with_its_start(tiny_config: Config, pissa: Path) -> None:
    run = start_run(tiny_config(model={"name": str(pissa)}, adapter={"init": "pissa"}))
    expected = read_adapter(pissa / "start").tensors
    found = adapter_state_dict(run.base.model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert not any("adapter" in warning for warning in run.warnings)


@pytest.mark.slow
def test_resume_evaluate_and_merge_find_the_copy(tiny_config: Config, pissa: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": {"name": str(pissa)}, "adapter": {"init": "pissa"}}
    whole, parts = start_run(tiny_config("whole", **settings)), start_run(tiny_config("parts", **settings))
    assert whole.train(quiet)
    assert not parts.train(quiet, stop_after=3)
    assert resume_run(parts.directory).train(quiet)
    expected, found = final_adapter(whole.directory), final_adapter(parts.directory)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert evaluate_trained(open_trained(whole.directory))["eval_loss"] > 0
    done = merge_run(whole.directory, tmp_path / "merged")
    assert done.report.base == "dequantized"
    assert done.report.folded == 14


@pytest.mark.slow
def test_plain_transformers_and_peft_load_the_copy_with_its_start(pissa: Path) -> None:
    from peft import PeftModel

    theirs = AutoModelForCausalLM.from_pretrained(pissa, dtype=torch.bfloat16, device_map={"": "cpu"})
    theirs = PeftModel.from_pretrained(theirs, pissa / "start")
    base = load(pissa, compute_dtype="bfloat16")
    add_adapters(base.model, AdapterConfig(rank=4, alpha=8))
    load_adapter_state(base.model, read_adapter(pissa / "start").tensors)
    with torch.no_grad():
        expected = base.model(IDS).logits.float()
        error = (theirs(IDS).logits.float() - expected).norm() / expected.norm()
    assert error < 0.02, float(error)  # roundings of bf16


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({}, "is what a start of pissa left of a base, and is whole only with it. Set adapter.init=pissa"),
        ({"init": "olora"}, "is what a start of pissa left of a base"),
        ({"init": "pissa", "rank": 2}, "adapter.rank=4"),
        ({"init": "pissa", "target_modules": "attention"}, "adapter.target_modules=[down_proj"),
    ],
    ids=str,
)
def test_a_run_on_the_copy_with_another_start_is_refused_before_the_base_is_loaded(
    adapter: dict[str, Any], message: str, tiny_config: Config, pissa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "load_base", no_load)
    with pytest.raises(AdapterError) as refused:
        start_run(tiny_config(model={"name": str(pissa)}, adapter=adapter))
    assert message in str(refused.value)


def test_a_start_without_a_copy_of_its_own_is_refused_with_the_command_that_makes_one(
    tiny_config: Config, tiny_llama: Path, tmp_path: Path
) -> None:
    quantize_checkpoint(ModelDirectory.open(tiny_llama), tmp_path / "plain", device=CPU)
    for name in (tiny_llama, tmp_path / "plain"):
        with pytest.raises(AdapterError) as refused:
            start_run(tiny_config(model={"name": str(name)}, adapter={"init": "pissa"}))
        assert f"quantize {name} --init pissa --rank 4 --output COPY`, and set model.name=COPY" in str(refused.value)
        assert "other than this run's" not in str(refused.value)


OTHERS = {"target_modules": ["q_proj"], "alpha": 4, "rank_pattern": {"q_proj": 2}, "use_rslora": True}


@pytest.mark.parametrize("changes", [OTHERS, {"bias": "lora_only", "layers_to_transform": [1]}], ids=str)
def test_the_command_for_a_copy_comes_with_the_settings_that_its_start_is_for(
    changes: dict[str, Any], qlora: Qlora, tiny_config: Config, tiny_llama: Path, tmp_path: Path
) -> None:
    config = tiny_config(adapter={"init": "pissa", **changes})
    with pytest.raises(AdapterError) as refused:
        start_run(config)
    message = str(refused.value)
    command, _, settings = message.partition("`")[2].partition(" --output COPY`")
    typed = shlex.split(command)
    code, _, reported = qlora(*typed[typed.index("quantize") :], "--output", tmp_path / "copy")
    assert code == 0, reported
    words = shlex.split(settings.partition(": set ")[2].partition(" too")[0])
    save_config(config, tmp_path / "others.yaml")
    with pytest.raises(AdapterError, match="was made with other settings"):
        start_run(load_config(tmp_path / "others.yaml", [f"model.name={tmp_path / 'copy'}"]))
    assert start_run(load_config(tmp_path / "others.yaml", [f"model.name={tmp_path / 'copy'}", *words]))
    assert ("quantize_with_start in Python" in message) == ("bias" not in changes), "which a start has none of"


def test_the_function_named_with_the_command_makes_the_copy_for_a_runs_own_settings(
    tiny_config: Config, tiny_llama: Path, tmp_path: Path
) -> None:
    copy_of(tiny_llama, tmp_path / "copy", "pissa", **OTHERS)
    assert start_run(tiny_config(model={"name": str(tmp_path / "copy")}, adapter={"init": "pissa", **OTHERS}))


@pytest.mark.slow
def test_a_copy_or_a_start_that_was_changed_is_refused(tiny_config: Config, tiny_llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy_of(tiny_llama, copy, "pissa")
    settings: dict[str, Any] = {"model": {"name": str(copy)}, "adapter": {"init": "pissa"}}
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(
        {**tensors, name: tensors[name] ^ torch.eye(*tensors[name].shape, dtype=torch.uint8)},
        copy / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(AdapterError, match=r"trained on another base .* 1 of 14 layers holds other weights"):
        start_run(tiny_config(**settings))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    start = copy / "start" / "adapter_model.safetensors"
    start.write_bytes(start.read_bytes()[:-1] + b"\x01")
    with pytest.raises(AdapterError, match="is missing, or not the start that was taken out of"):
        start_run(tiny_config(**settings))
    (copy / "start" / "original.json").write_text("{}")
    with pytest.raises(AdapterError, match="not the start"):
        taken_out_of(copy)


def test_a_record_of_the_original_base_that_cannot_be_read_is_reported(tiny_llama: Path, tmp_path: Path) -> None:
    copy_of(tiny_llama, tmp_path / "copy", "olora")
    (tmp_path / "copy" / "start" / "original.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"original\.json should describe the original base"):
        taken_out_of(tmp_path / "copy")


def test_a_rank_beyond_a_layers_size_is_refused_before_anything_is_read(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is 32 x 64, so no start of rank 40 can be taken out of it"):
        copy_of(tiny_llama, tmp_path / "copy", "pissa", rank=40)
    with pytest.raises(AdapterError, match=r"adapter\.init=gaussian takes nothing out of a base"):
        copy_of(tiny_llama, tmp_path / "copy", "gaussian")
    assert not (tmp_path / "copy").exists()


def test_an_adapted_layer_that_stays_dense_is_refused_before_any_weight_is_split(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", ["down_proj"])
    with monkeypatch.context() as patch:
        patch.setattr(base_start, "quantize_checkpoint", no_load)
        with pytest.raises(
            AdapterError, match=r"layers\.0\.mlp\.down_proj is adapted and stays dense .* 2 layers of 14"
        ):
            copy_of(tiny_llama, tmp_path / "copy", "pissa")
    copy_of(tiny_llama, tmp_path / "copy", "pissa", target_modules=["q_proj"])  # as the message says


@pytest.mark.slow
def test_only_what_the_settings_adapt_is_split(tiny_llama: Path, tmp_path: Path) -> None:
    copy_of(
        tiny_llama, tmp_path / "copy", "pissa", target_modules=["q_proj"], rank_pattern={"layers.0.self_attn.q_proj": 2}
    )
    ours, plain = load(tmp_path / "copy").fingerprint.tensors, load(tiny_llama).fingerprint.tensors
    assert {path for path in ours if ours[path] != plain[path]} == {path for path in ours if path.endswith("q_proj")}
    start = read_adapter(tmp_path / "copy" / "start")
    assert [len(start.tensors[f"base_model.model.{path}.lora_A.weight"]) for path in sorted(start.paths)] == [2, 4]


def test_quantize_writes_a_start_as_typed(qlora: Qlora, tiny_llama: Path, tmp_path: Path) -> None:
    typed = ("quantize", tiny_llama, "--output", tmp_path / "copy")
    code, out, reported = qlora(*typed, "--init", "pissa", "--rank", 4, "--json")
    assert code == 0, reported
    answer = json.loads(out)
    assert answer.keys() == documented("qlora quantize")
    assert (answer["start"]["init"], answer["start"]["rank"]) == ("pissa", 4)
    code, _, reported = qlora(*typed, "--init", "pissa")
    assert code == 2
    assert "--init pissa needs --rank, such as --rank 16" in reported
    code, _, reported = qlora(*typed, "--rank", 4)
    assert code == 2
    assert "--rank has no effect without --init" in reported
