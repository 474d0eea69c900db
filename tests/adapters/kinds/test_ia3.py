"""Promises of IA3: what it scales, PEFT's files, and a merge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds_of_adapters import dense, differ_by, four_bit, logits_of
from tiny_runs import final_adapter, quiet
from torch import Tensor, nn

from qlora_trainer.adapters.inject import adapter_state_dict, add_adapters, load_adapter_state
from qlora_trainer.adapters.kinds.ia3 import IA3Linear, feedforward_paths
from qlora_trainer.adapters.kinds.ia3_file import Ia3FileConfig
from qlora_trainer.adapters.peft_format import read_adapter
from qlora_trainer.adapters.targets import adapted_paths, last_of_mlps
from qlora_trainer.adapters.trainable import adapter_modules, trainable_parameters
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import AdapterConfig, RunConfig
from qlora_trainer.merging.merge_run import merge_run
from qlora_trainer.planning.memory_plan import plan_memory
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.runs.trained import open_trained
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]
Models = Callable[[str], Path]
IA3: dict[str, Any] = {"kind": "ia3"}
# By hand, from each family's own names and PEFT's table; phi3 computes query, key and value at once, gpt2 too.
LAYERS = {
    "llama": {"k_proj": False, "v_proj": False, "down_proj": True},
    "qwen2": {"k_proj": False, "v_proj": False, "down_proj": True},
    "gpt2": {"attn.c_attn": False, "mlp.c_proj": True},
    "phi3": {"qkv_proj": False, "down_proj": True},
}


def randomize(model: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    for _, parameter in trainable_parameters(model):
        parameter.data.normal_(1.0, 0.3, generator=generator)


@pytest.mark.parametrize("family", LAYERS)
def test_keys_values_and_the_inputs_of_mlps_last_layers_are_scaled(family: str, tiny_models: Models) -> None:
    model = dense(tiny_models(family))
    add_adapters(model, AdapterConfig(**IA3))
    found = {path: module.of_input for path, module in adapter_modules(model).items() if isinstance(module, IA3Linear)}
    ends = {end for path in found for end in LAYERS[family] if f".{path}".endswith(f".{end}")}
    assert ends == LAYERS[family].keys()
    assert all(
        of_input == next(value for end, value in LAYERS[family].items() if f".{path}".endswith(f".{end}"))
        for path, of_input in found.items()
    )


@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("is_4bit", [False, True])
def test_output_and_gradients_are_those_of_the_formula(is_4bit: bool, of_input: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(128, 64)
    base: Any = four_bit(linear) if is_4bit else linear
    layer = IA3Linear(base, of_input=of_input)
    x, grad = torch.randn(5, 128, requires_grad=True), torch.randn(5, 64)
    assert torch.equal(layer(x), base(x)), "vectors of ones change nothing"
    layer.ia3_l.data.normal_(1.0, 0.3)

    def expected() -> Tensor:
        return base(x * layer.ia3_l) if of_input else base(x) * layer.ia3_l

    torch.testing.assert_close(layer(x), expected(), rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(layer(x), [x, layer.ia3_l], grad)
    for one, other in zip(found, torch.autograd.grad(expected(), [x, layer.ia3_l], grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_we_read_peft_and_peft_reads_us_with_equal_logits(
    family: str, tiny_config: Config, tiny_models: Models, tmp_path: Path
) -> None:
    """qwen2 has biases on keys and values, and gpt2 stores its weights the other way."""
    from peft import IA3Config, PeftModel, get_peft_model

    targets = list(LAYERS[family])
    last = [end for end, of_input in LAYERS[family].items() if of_input]
    settings = IA3Config(
        target_modules=targets, feedforward_modules=last, task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2"
    )
    theirs = get_peft_model(dense(tiny_models(family)), settings)
    for name, parameter in theirs.named_parameters():
        if "ia3_l" in name:
            parameter.data.normal_(1.0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs")
    ours = dense(tiny_models(family))
    add_adapters(ours, AdapterConfig(**IA3))
    load_adapter_state(ours, adapter.tensors)
    expected = logits_of(theirs.eval())
    assert differ_by(logits_of(ours), expected) < 1e-5
    assert differ_by(logits_of(dense(tiny_models(family))), expected) > 1e-2

    run = start_run(tiny_config(model={"name": str(tiny_models(family))}, adapter=IA3))
    randomize(run.base.model)
    (tmp_path / "ours").mkdir()
    run.write_adapter(tmp_path / "ours")
    again = dense(tiny_models(family))
    add_adapters(again, AdapterConfig(**IA3))
    load_adapter_state(again, adapter_state_dict(run.base.model))
    loaded = PeftModel.from_pretrained(dense(tiny_models(family)), tmp_path / "ours").eval()
    assert differ_by(logits_of(loaded), logits_of(again)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_run_resumes_bit_for_bit_counts_as_planned_and_merges(
    family: str, tiny_config: Config, tiny_models: Models, tmp_path: Path
) -> None:
    model = tiny_models(family)
    optimizer = {"learning_rate": 3e-2, "weight_decay": 0.1}
    config = tiny_config(
        model={"name": str(model)}, adapter=IA3, optimizer=optimizer, training={"max_steps": 4, "save_every": 2}
    )
    whole = start_run(config)
    assert [group.weight_decay for group in whole.state.groups] == [0.0], "a vector that decays goes to 0"
    real = sum(p.numel() for group in whole.state.groups for p in group.parameters.values())
    assert plan_memory(ModelDirectory.open(model), config).adapter_parameters == real
    assert whole.train(quiet)
    parts = start_run(config.replace({"training.output_dir": str(tmp_path / "parts")}))
    parts.train(quiet, stop_after=2)
    resumed = resume_run(parts.directory)
    assert resumed.train(quiet)
    first, second = final_adapter(whole.directory), final_adapter(resumed.directory)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all((tensor == 1).all() for tensor in first.values())

    done = merge_run(whole.directory, tmp_path / "merged", base="dequantized", dtype=torch.float32)
    assert done.report.verification is not None
    trained = open_trained(whole.directory, compute_dtype="float32").base.model
    expected = logits_of(trained)
    assert differ_by(logits_of(dense(tmp_path / "merged")), expected) < 1e-5
    half = merge_run(whole.directory, tmp_path / "half", base="dequantized", dtype=torch.float16)
    assert half.report.verification is not None
    assert half.report.verification.beyond_rounding.kl < 1e-9


def test_layers_can_be_named_and_what_is_not_adapted_is_refused(tiny_llama: Path) -> None:
    model = dense(tiny_llama)
    settings = AdapterConfig(kind="ia3", target_modules=["v_proj", "up_proj"], feedforward_modules=["up_proj"])
    paths = adapted_paths(model, settings)
    assert {path.rsplit(".", 1)[-1] for path in paths} == {"v_proj", "up_proj"}
    assert all(path.endswith("up_proj") for path in feedforward_paths(model, settings, paths))
    wrong = settings.model_copy(update={"feedforward_modules": ["down_proj"]})
    with pytest.raises(AdapterError, match=r"feedforward_modules names down_proj, .*target_modules too"):
        feedforward_paths(model, wrong, paths)


def test_peft_reads_us_where_one_of_two_like_named_layers_scales_its_input(
    tiny_config: Config, tiny_llama: Path, tmp_path: Path
) -> None:
    """PEFT refuses feedforward_modules that are not among the names of target_modules."""
    from peft import PeftModel

    adapter = {**IA3, "target_modules": ["down_proj"], "feedforward_modules": ["layers.0.mlp.down_proj"]}
    run = start_run(tiny_config(adapter=adapter))
    randomize(run.base.model)
    (tmp_path / "ours").mkdir()
    run.write_adapter(tmp_path / "ours")
    again = dense(tiny_llama)
    add_adapters(again, AdapterConfig(**adapter))
    load_adapter_state(again, adapter_state_dict(run.base.model))
    loaded = PeftModel.from_pretrained(dense(tiny_llama), tmp_path / "ours").eval()
    assert differ_by(logits_of(loaded), logits_of(again)) < 1e-5


def test_a_model_whose_keys_are_not_found_by_name_asks_for_names() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    with pytest.raises(AdapterError, match=r"Name them in adapter\.target_modules, .*There are: 0\."):
        adapted_paths(model, AdapterConfig(**IA3))
    assert last_of_mlps(model) == []


def test_a_file_with_other_tensors_or_shapes_is_refused() -> None:
    config = Ia3FileConfig(target_modules=["k_proj"], feedforward_modules=[])
    name = "base_model.model.layers.0.k_proj.ia3_l"
    config.check_tensors({name: torch.ones(6, 1)}, "it")
    for tensors, message in (
        ({}, "holds no ia3_l"),
        ({name: torch.ones(6)}, r"has shape \(6,\)"),
        ({name: torch.ones(2, 3)}, r"has shape \(2, 3\)"),
        ({name: torch.ones(6, 1), "base_model.model.lm_head.weight": torch.ones(2, 2)}, "no part of an IA3 adapter"),
    ):
        with pytest.raises(AdapterError, match=message):
            config.check_tensors(tensors, "it")
