"""Promises of ranks and alphas by layer, and of adapting some decoder layers only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow
from tiny_runs import final_adapter, quiet
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qlora_trainer.adapters.inject import add_adapters, load_adapter_state, lora_layers
from qlora_trainer.adapters.kinds.lora_file import LoraFileConfig
from qlora_trainer.adapters.layers import linear_facts
from qlora_trainer.adapters.patterns import (
    check_patterns,
    layer_alpha,
    layer_parts,
    layer_rank,
    layers_differ,
    of_pattern,
)
from qlora_trainer.adapters.peft_format import read_adapter
from qlora_trainer.adapters.targets import adapted_paths
from qlora_trainer.common.errors import AdapterError, CheckpointError
from qlora_trainer.config.schema import AdapterConfig, RunConfig
from qlora_trainer.merging.merge_run import merge_run
from qlora_trainer.planning.estimate import estimate
from qlora_trainer.planning.memory_plan import plan_memory
from qlora_trainer.planning.skeleton import build_skeleton
from qlora_trainer.planning.speed.shape import count_shape
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.runs.trained import open_trained
from qlora_trainer.training import patches
from qlora_trainer.training.step import accumulate_gradients
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]
TARGETS = ["q_proj", "v_proj", "down_proj"]
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"layers.1.self_attn.q_proj": 8, "q_proj": 2},
    "alpha_pattern": {"v_proj": 3.0, "layers.0.mlp.down_proj": 1.0},
}
SCALINGS = {  # by hand: alpha / rank, with alpha 8 and rank 4 where no pattern says otherwise
    "model.layers.0.self_attn.q_proj": (2, 8 / 2),
    "model.layers.1.self_attn.q_proj": (8, 8 / 8),
    "model.layers.0.self_attn.v_proj": (4, 3 / 4),
    "model.layers.1.self_attn.v_proj": (4, 3 / 4),
    "model.layers.0.mlp.down_proj": (4, 1 / 4),
    "model.layers.1.mlp.down_proj": (4, 8 / 4),
}


def tiny_model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()


def random_factors(model: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.3, generator=generator)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40)[None]).logits


def test_the_first_name_that_a_path_ends_in_holds() -> None:
    settings = AdapterConfig(rank=4, alpha=8.0, target_modules=TARGETS, **PATTERNS)
    for path, (rank, scaling) in SCALINGS.items():
        assert (layer_rank(settings, path), layer_alpha(settings, path) / rank) == (rank, scaling)
    assert of_pattern({"proj": 1}, "model.q_proj", 0) == 0, "a part of a name is no name"
    parts = AdapterConfig(fused_parts={"c_attn": ["query", "value"]})
    assert (layer_parts(parts, "h.0.attn.c_attn"), layer_parts(parts, "h.0.attn.c_proj")) == (2, 1)


def test_each_layer_has_the_rank_and_scaling_of_its_pattern() -> None:
    model = tiny_model()
    add_adapters(model, AdapterConfig(rank=4, alpha=8.0, target_modules=TARGETS, **PATTERNS))
    found = {path: (layer.lora_A.out_features, layer.scaling) for path, layer in lora_layers(model).items()}
    assert found == SCALINGS


def test_peft_gives_our_logits_and_we_those_of_peft(tiny_config: Config, tiny_llama: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    settings = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", **PATTERNS)
    theirs = get_peft_model(tiny_model(), settings)
    random_factors(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs")
    config = AdapterConfig(rank=4, alpha=8.0, target_modules=TARGETS, **PATTERNS)
    assert adapter.differences(config) == {}
    ours = tiny_model()
    add_adapters(ours, config)
    load_adapter_state(ours, adapter.tensors)
    assert torch.allclose(logits_of(ours), logits_of(theirs), atol=1e-5)
    assert not torch.allclose(logits_of(ours), logits_of(tiny_model()), atol=1e-2)

    run = start_run(tiny_config(adapter={"rank": 4, "alpha": 8, "target_modules": TARGETS, **PATTERNS}))
    random_factors(run.base.model)
    (tmp_path / "ours").mkdir()
    run.write_adapter(tmp_path / "ours")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "ours")
    scalings = {
        path.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for path, module in loaded.named_modules()
        if hasattr(module, "lora_A")
    }
    assert scalings == SCALINGS


def test_a_run_with_patterns_resumes_merges_and_counts_as_planned(tiny_config: Config, tmp_path: Path) -> None:
    adapter = {"rank": 4, "alpha": 8, "target_modules": TARGETS, "layers_to_transform": None, **PATTERNS}
    config = tiny_config(adapter=adapter, training={"max_steps": 4, "save_every": 2})
    whole = start_run(config)
    assert whole.train(quiet)
    parts = start_run(config.replace({"training.output_dir": str(tmp_path / "parts")}))
    parts.train(quiet, stop_after=2)
    resumed = resume_run(parts.directory)
    assert resumed.train(quiet)
    first, second = (final_adapter(run.directory) for run in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(CheckpointError, match=r"adapter\.rank_pattern"):
        resume_run(parts.directory, ["adapter.rank_pattern={}"])

    done = merge_run(whole.directory, tmp_path / "merged", base="dequantized")
    assert done.report.verification is not None
    assert done.report.verification.beyond_rounding.kl < 1e-9
    assert open_trained(whole.directory).adapter.config.kind == "lora"


def test_layers_over_one_input_may_differ_in_rank_and_scaling(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Query and value are one function in a step; their gradients are those of each layer alone."""

    def gradients(output: str) -> list[torch.Tensor]:
        run = start_run(tiny_config(output, adapter={"rank": 4, "alpha": 8, "target_modules": TARGETS, **PATTERNS}))
        random_factors(run.base.model)
        accumulate_gradients(run.state, run.state.loader.next())
        return [group.grad.clone() for group in run.state.groups]

    together = gradients("together")
    monkeypatch.setattr(patches, "join_layers", lambda modules: 0)
    alone = gradients("alone")
    assert together[0].abs().max() > 0
    named = [sorted(gradient.tolist()) for gradient in (together[0], alone[0])]  # their order in memory differs
    torch.testing.assert_close(torch.tensor(named[0]), torch.tensor(named[1]), rtol=1e-4, atol=1e-7)


def test_only_the_chosen_decoder_layers_are_adapted() -> None:
    model = tiny_model()
    settings = AdapterConfig(rank=4, target_modules=TARGETS, layers_to_transform=[1])
    assert adapted_paths(model, settings) == [
        f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ]
    with pytest.raises(AdapterError, match=r"layers_to_transform names 2, 7, .* are 0 to 1, counted from 0"):
        adapted_paths(model, settings.model_copy(update={"layers_to_transform": [7, 1, 2]}))


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_name_that_fits_no_adapted_layer_is_refused(key: str) -> None:
    settings = AdapterConfig(target_modules=["q_proj"], **{key: {"q_proj": 2, "qproj": 8}})
    with pytest.raises(AdapterError, match=rf"adapter\.{key} names qproj, .* are: q_proj\."):
        check_patterns(settings, ["model.layers.0.self_attn.q_proj"])


def test_what_a_file_says_of_ranks_is_compared_layer_by_layer(tmp_path: Path) -> None:
    """The same ranks and scalings, written as another base value and other patterns, are no difference."""
    model = tiny_model()
    wanted = AdapterConfig(rank=4, alpha=8.0, target_modules=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 8})
    add_adapters(model, wanted)
    tensors = {
        f"base_model.model.{path}.{name}": parameter.detach()
        for path, layer in lora_layers(model).items()
        for name, parameter in layer.own_parameters()
    }
    same = LoraFileConfig(
        r=8,
        lora_alpha=8.0,
        rank_pattern={"layers.0.self_attn.q_proj": 4},
        target_modules=["q_proj"],
    )
    assert same.differences(tensors, wanted) == {}
    other = same.model_copy(update={"lora_alpha": 16.0})
    assert other.differences(tensors, wanted) == {"adapter.alpha": (16.0, 8.0)}
    without = wanted.model_copy(update={"rank_pattern": {}})
    assert same.differences(tensors, without).keys() == {"adapter.rank", "adapter.rank_pattern"}


@pytest.mark.parametrize("name", [r".*layers\\.0\\..*q_proj", "(q|v)_proj", "layers.[01].self_attn.q_proj"])
def test_an_expression_in_a_pattern_of_peft_is_refused(name: str) -> None:
    """PEFT would take it for the layers that it matches; taken as written it would change nothing, silently."""
    tensors = {
        f"base_model.model.layers.0.self_attn.q_proj.lora_{part}.weight": torch.ones(shape)
        for part, shape in (("A", (4, 8)), ("B", (8, 4)))
    }
    config = LoraFileConfig(r=4, lora_alpha=8.0, target_modules=["q_proj"], alpha_pattern={name: 64.0})
    with pytest.raises(AdapterError, match=r"alpha_pattern names .* regular expression\. That is not supported"):
        config.check_tensors(tensors, "it")
    unused = config.model_copy(update={"alpha_pattern": {"k_proj": 64.0, "layers.0.self_attn.q_proj": 8.0}})
    unused.check_tensors(tensors, "it")


@pytest.mark.parametrize(
    "adapter",
    [
        {"layers_to_transform": [3, 4]},
        slow({"rank_pattern": {"layers.4.mlp.up_proj": 2}}),
        slow({"target_modules": r".*\.4\..*_proj"}),
    ],
    ids=["layers", "pattern", "expression"],
)
def test_layers_with_other_adapters_are_counted_and_planned_each(
    adapter: dict[str, Any], deep_llama: Path, tiny_config: Config
) -> None:
    config = tiny_config(model={"name": str(deep_llama)}, adapter=adapter)
    directory = ModelDirectory.open(deep_llama)
    assert layers_differ(config.adapter)
    model = build_skeleton(directory)
    expected = sum(
        layer_rank(config.adapter, path) * sum(linear_facts(model.get_submodule(path))[:2])
        for path in adapted_paths(model, config.adapter)
    )
    assert count_shape(directory, config, torch.float32).adapters == expected
    assert plan_memory(directory, config).adapter_parameters == expected
    assert estimate(directory, config) == plan_memory(directory, config).total
    assert not layers_differ(AdapterConfig(rank_pattern={"up_proj": 2}))
