"""Parts of a fused layer: only their rows learn, PEFT and a merge see one ordinary adapter; odd layouts are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow, slow_but
from safetensors.torch import load_file
from tiny_runs import quiet
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from qlora_kernels.nf4 import dequantize_nf4
from qlora_trainer.adapters.formulas import with_zero_blocks, without_zero_blocks
from qlora_trainer.adapters.fused_parts import LAYOUTS, trained_rows
from qlora_trainer.adapters.inject import adapter_state_dict, add_adapters, load_adapter_state
from qlora_trainer.adapters.layers import LoRALinear
from qlora_trainer.adapters.targets import find_targets
from qlora_trainer.adapters.trainable import trainable_parameters
from qlora_trainer.common.errors import AdapterError, ConfigError
from qlora_trainer.config.load import make_config
from qlora_trainer.config.schema import AdapterConfig, RunConfig
from qlora_trainer.merging.merge_run import merge_run
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.planning.memory_plan import plan_memory
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]
Models = Callable[[str], Path]
QUERY_AND_VALUE = {"c_attn": ["query", "value"]}


def config_of(tiny_config: Config, model: Path, output: str = "run", **adapter: Any) -> RunConfig:
    return tiny_config(
        output,
        model={"name": str(model)},
        adapter={"rank": 4, "alpha": 8, "dropout": 0.1, **adapter},
        optimizer={"learning_rate": 5e-3, "weight_decay": 0.1},
        training={"max_steps": 3, "evaluate_every": 3},
    )


class Numbered(nn.Module):
    """In the place of a linear layer: the number of each output feature, whatever comes in."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        return torch.arange(self.out_features, dtype=x.dtype).expand(*x.shape[:-1], -1)


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_the_rows_of_query_key_and_value_are_those_that_the_models_attention_takes(
    family: str, tiny_models: Models
) -> None:
    """One token at position 0 is not rotated, so what arrives at attention is what left the layer."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models(family), dtype=torch.float32)
    name = next(iter(LAYOUTS[family]))
    path = next(
        path
        for path, _ in model.named_modules()
        if path.endswith(f"0.{'attn' if family == 'gpt2' else 'self_attn'}.{name}")
    )
    rows = {part: trained_rows(model, [path], {name: [part]})[path][0] for part in ("query", "key", "value")}
    width = max(part.stop for part in rows.values())
    seen: dict[str, Tensor] = {}

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        seen.update({"query": query, "key": key, "value": value} if not seen else {})
        return torch.zeros_like(query.transpose(1, 2)), None

    AttentionInterface.register("seen_by_a_test", attention)
    model.config._attn_implementation = "seen_by_a_test"
    model.set_submodule(path, Numbered(width))
    with torch.no_grad():
        model(input_ids=torch.tensor([[5]]), use_cache=False)
    for part, where in rows.items():
        assert seen[part].flatten().tolist() == list(range(where.start, where.stop)), part


def test_the_rows_of_gate_and_up_are_those_that_the_mlp_takes(tiny_models: Models) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models("phi3"), dtype=torch.float32)
    path = "model.layers.0.mlp.gate_up_proj"
    ((gate,), (up,)) = (trained_rows(model, [path], {"gate_up_proj": [part]})[path] for part in ("gate", "up"))
    mlp = model.model.layers[0].mlp
    mlp.gate_up_proj, mlp.down_proj = Numbered(256), nn.Identity()
    numbers = torch.arange(256.0)
    assert torch.equal(mlp(torch.zeros(64)), mlp.activation_fn(numbers[gate]) * numbers[up])


def test_only_the_parts_rows_learn_by_the_formula_of_each_part(tiny_models: Models) -> None:
    model = GPT2LMHeadModel.from_pretrained(tiny_models("gpt2"), dtype=torch.float32)
    layer_path = "transformer.h.0.attn.c_attn"
    base = model.get_submodule(layer_path)
    add_adapters(model, AdapterConfig(rank=4, alpha=8, target_modules=["c_attn"], fused_parts=QUERY_AND_VALUE))
    layer = model.get_submodule(layer_path)
    assert isinstance(layer, LoRALinear)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), base(x)), "before the first step"
    with torch.no_grad():
        layer.lora_B.weight.normal_(generator=torch.Generator().manual_seed(1))
    (query_A, value_A), (query_B, value_B) = layer.lora_A.weight.split(4), layer.lora_B.weight.split(64)
    query, key, value = layer(x).chunk(3, dim=-1)
    base_query, base_key, base_value = base(x).chunk(3, dim=-1)
    assert torch.equal(key, base_key)
    torch.testing.assert_close(query, base_query + 2.0 * x @ query_A.T @ query_B.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(value, base_value + 2.0 * x @ value_A.T @ value_B.T, rtol=1e-5, atol=1e-5)


def test_rank_4_on_query_and_value_of_gpt2_small_is_147_456_numbers() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    add_adapters(model, AdapterConfig(rank=4, target_modules=["c_attn"], fused_parts=QUERY_AND_VALUE))
    assert sum(parameter.numel() for _, parameter in trainable_parameters(model)) == 147_456


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["c_attn"], "all-linear"])
def test_zero_blocks_stay_zero_in_training_and_a_resumed_run_equals_an_uninterrupted_one(
    targets: Any, tiny_config: Config, tiny_models: Models, tmp_path: Path
) -> None:
    settings = {"target_modules": targets, "fused_parts": QUERY_AND_VALUE}
    whole = start_run(config_of(tiny_config, tiny_models("gpt2"), "whole", **settings))
    assert whole.train(quiet)
    stored = load_file(whole.directory / "adapter" / "adapter_model.safetensors")
    for index in range(2):
        lora_B = stored[f"base_model.model.transformer.h.{index}.attn.c_attn.lora_B.weight"]
        query, key, value = lora_B.chunk(3)
        assert query[:, :4].all()
        assert value[:, 4:].all()
        assert not key.any()
        assert not query[:, 4:].any()
        assert not value[:, :4].any()
    parts = start_run(config_of(tiny_config, tiny_models("gpt2"), "parts", **settings))
    parts.train(quiet, stop_after=1)
    assert resume_run(parts.directory).train(quiet)
    resumed = load_file(parts.directory / "adapter" / "adapter_model.safetensors")
    assert resumed.keys() == stored.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in stored.items())

    merge_run(whole.directory, tmp_path / "merged", base="dequantized", dtype=torch.float32)
    layer = whole.base.model.get_submodule("transformer.h.1.attn.c_attn").base
    assert isinstance(layer, NF4Linear)
    merged = load_file(tmp_path / "merged" / "model.safetensors")["transformer.h.1.attn.c_attn.weight"].T
    base = dequantize_nf4(layer.nf4_weight, torch.float32)
    assert torch.equal(merged[64:128], base[64:128]), "the key's rows are the base's"
    assert not torch.equal(merged[:64], base[:64])
    assert not torch.equal(merged[128:], base[128:])


@pytest.mark.parametrize("use_rslora", slow_but([False, True], False))
@pytest.mark.parametrize(("targets", "ranks"), [(["c_attn"], {8}), slow(("all-linear", {4, 8}))])
def test_peft_gives_our_logits(
    targets: Any, ranks: set[int], use_rslora: bool, tiny_config: Config, tiny_models: Models, tmp_path: Path
) -> None:
    """On dense weights: what the adapter does is compared, not the base's rounding."""
    from peft import PeftModel

    settings = {"target_modules": targets, "fused_parts": QUERY_AND_VALUE, "use_rslora": use_rslora}
    run = start_run(config_of(tiny_config, tiny_models("gpt2"), **settings))
    run.train(quiet)
    stored = load_file(run.directory / "adapter" / "adapter_model.safetensors")
    assert {len(tensor) for name, tensor in stored.items() if "lora_A" in name} == ranks

    def dense() -> Any:
        return GPT2LMHeadModel.from_pretrained(tiny_models("gpt2"), dtype=torch.float32).eval()

    ours = dense()
    add_adapters(ours, run.config.adapter)
    load_adapter_state(ours, stored)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(dense(), run.directory / "adapter").eval()
        expected, base = theirs(input_ids=ids).logits, dense()(input_ids=ids).logits
        assert (expected - base).norm() > 1e-3 * base.norm(), "the adapter must matter"
        assert (ours.eval()(input_ids=ids).logits - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.slow
def test_the_plan_counts_the_parts_alone(tiny_config: Config, tiny_models: Models) -> None:
    config = config_of(tiny_config, tiny_models("gpt2"), target_modules=["c_attn"], fused_parts=QUERY_AND_VALUE)
    assert plan_memory(ModelDirectory.open(tiny_models("gpt2")), config).adapter_parameters == 2 * (
        2 * 4 * 64 + 2 * 64 * 4
    )


def test_an_adapter_of_the_whole_layer_is_not_taken_for_one_of_its_parts(tiny_models: Models) -> None:
    whole = GPT2LMHeadModel.from_pretrained(tiny_models("gpt2"), dtype=torch.float32)
    parts = GPT2LMHeadModel.from_pretrained(tiny_models("gpt2"), dtype=torch.float32)
    add_adapters(whole, AdapterConfig(rank=8, target_modules=["c_attn"]))
    add_adapters(parts, AdapterConfig(rank=4, target_modules=["c_attn"], fused_parts=QUERY_AND_VALUE))
    load_adapter_state(whole, adapter_state_dict(parts))  # the same function, and no more zero for ever
    for _, parameter in trainable_parameters(whole):
        parameter.data.normal_()
    before = adapter_state_dict(parts)
    with pytest.raises(AdapterError, match=r"adapts what adapter\.fused_parts leaves out"):
        load_adapter_state(parts, adapter_state_dict(whole))
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state_dict(parts).items())


@pytest.mark.slow
def test_a_run_starts_from_an_adapter_of_parts(tiny_config: Config, tiny_models: Models) -> None:
    settings = {"target_modules": ["c_attn"], "fused_parts": QUERY_AND_VALUE}
    first = start_run(config_of(tiny_config, tiny_models("gpt2"), "first", **settings))
    first.train(quiet)
    again = config_of(
        tiny_config, tiny_models("gpt2"), "second", **settings, init_from=str(first.directory / "adapter")
    )
    state, expected = adapter_state_dict(start_run(again).base.model), adapter_state_dict(first.base.model)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("family", "fused_parts", "message"),
    [
        (
            "gpt2",
            {"qkv_proj": ["query"]},
            "names qkv_proj, but no adapted layer has that name. Adapted are: c_attn, c_fc",
        ),
        ("gpt2", {"c_attn": ["query", "output"]}, "c_attn has no part output. Its parts are: query, key, value"),
        ("phi3", {"gate_up_proj": ["query"]}, "gate_up_proj has no part query. Its parts are: gate, up"),
        ("gpt_neox", {"query_key_value": ["query"]}, "in gpt_neox, query_key_value holds query, key and value of one"),
        ("falcon", {"query_key_value": ["value"]}, "in falcon, query_key_value holds .* Adapt it whole"),
        ("llama", {"q_proj": ["query"]}, "rows of q_proj are which part is not known for llama. Known are c_attn of"),
    ],
)
def test_what_cannot_be_adapted_in_parts_is_refused_by_name(
    family: str, fused_parts: dict[str, list[str]], message: str
) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, num_hidden_layers=1))
    with pytest.raises(AdapterError, match=message):
        trained_rows(model, find_targets(model, "all-linear"), fused_parts)


@pytest.mark.parametrize(
    ("fused_parts", "message"),
    [({"c_attn": []}, "names no part of c_attn"), ({"c_attn": ["key", "key"]}, "names a part of c_attn twice")],
)
def test_parts_are_checked_where_they_are_declared(fused_parts: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"adapter\.fused_parts: {message}"):
        make_config({"model": {"name": "x"}, "data": {"train": "y"}, "adapter": {"fused_parts": fused_parts}})


def test_zero_blocks_come_and_go() -> None:
    lora_B = torch.randn(7, 2)
    parts = (slice(0, 3), slice(5, 9))
    whole = with_zero_blocks(lora_B, parts, 10)
    assert whole.shape == (10, 4)
    assert int(whole.count_nonzero()) == lora_B.numel()
    assert torch.equal(whole[:3, :2], lora_B[:3])
    assert torch.equal(whole[5:9, 2:], lora_B[3:])
    back = without_zero_blocks(whole, parts)
    assert back is not None
    assert torch.equal(back, lora_B)
    whole[4, 1] = 1e-30
    assert without_zero_blocks(whole, parts) is None
