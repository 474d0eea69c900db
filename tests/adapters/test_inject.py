"""Adapters on a model: what trains, under which names, and how it is saved and loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tiny_models import FAMILIES
from torch import nn

from qlora_trainer.adapters.inject import (
    adapter_state_dict,
    add_adapters,
    load_adapter_state,
    lora_layers,
    lora_state_dict,
)
from qlora_trainer.adapters.trainable import (
    BiasMode,
    check_trainable,
    mark_only_lora_as_trainable,
    trainable_parameters,
)
from qlora_trainer.common.cache import user_cache
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import AdapterConfig, ModelConfig
from qlora_trainer.model.load import load_base_model
from qlora_trainer.weights.model_directory import ModelDirectory

Models = Callable[[str], Path]


def base_model(directory: Path) -> Any:
    return load_base_model(ModelDirectory.open(directory), ModelConfig(name=str(directory)), user_cache()).model


def randomize(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_fresh_adapter_changes_nothing(family: str, tiny_models: Models) -> None:
    model = base_model(tiny_models(family))
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        before = model(ids).logits
        add_adapters(model, AdapterConfig(rank=4), seed=0)
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    ("family", "bias", "count"),
    [("llama", "none", 0), ("qwen2", "none", 0), ("qwen2", "lora_only", 6), ("qwen2", "all", 6)],
)
def test_only_adapters_and_the_biases_named_train(family: str, bias: str, count: int, tiny_models: Models) -> None:
    model = base_model(tiny_models(family))
    paths = add_adapters(model, AdapterConfig(rank=4, bias=bias), seed=0)
    names = [name for name, _ in trainable_parameters(model)]
    assert sum(name.endswith(".bias") for name in names) == count
    assert len(names) == 2 * len(paths) + count
    assert all(parameter.dtype == torch.float32 for _, parameter in trainable_parameters(model))
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(AssertionError, match="must be frozen"):
        check_trainable(model)


def test_biases_of_adapted_layers_alone_train_under_lora_only(tiny_models: Models) -> None:
    model = base_model(tiny_models("qwen2"))
    add_adapters(model, AdapterConfig(rank=4, bias="lora_only", target_modules=["q_proj"]), seed=0)
    biases = [name for name, _ in trainable_parameters(model) if name.endswith("bias")]
    assert biases == [f"base_model.model.model.layers.{i}.self_attn.q_proj.base_layer.bias" for i in (0, 1)]


def test_adapters_start_the_same_from_the_same_seed(tiny_models: Models) -> None:
    def initial(seed: int) -> dict[str, torch.Tensor]:
        model = base_model(tiny_models("llama"))
        torch.manual_seed(seed + 77)  # the global generator does not matter
        add_adapters(model, AdapterConfig(rank=4), seed)
        return adapter_state_dict(model)

    one, same, other = initial(1), initial(1), initial(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_bf16_adapters_are_the_fp32_ones_rounded_and_take_any_float_dtype(tiny_models: Models) -> None:
    models = {}
    for dtype in ("float32", "bfloat16"):
        models[dtype] = base_model(tiny_models("qwen2"))
        add_adapters(models[dtype], AdapterConfig(rank=4, dtype=dtype, bias="all"), seed=3)
    wide, low = (dict(trainable_parameters(model)) for model in models.values())
    assert wide.keys() == low.keys()
    for name, parameter in low.items():
        assert parameter.dtype == (torch.float32 if name.endswith(".bias") else torch.bfloat16)
        assert torch.equal(parameter, wide[name].to(parameter.dtype))
    given = {name: torch.full_like(parameter, 0.3) for name, parameter in wide.items()}
    load_adapter_state(models["bfloat16"], given)
    assert all(torch.equal(p, given[name].to(p.dtype)) for name, p in low.items())


def test_adapter_state_round_trips_and_takes_nothing_else(tiny_models: Models) -> None:
    model = base_model(tiny_models("llama"))
    add_adapters(model, AdapterConfig(rank=4), seed=0)
    randomize(model)
    state = adapter_state_dict(model)
    add_again = base_model(tiny_models("llama"))
    add_adapters(add_again, AdapterConfig(rank=4), seed=5)
    load_adapter_state(add_again, state)
    assert all(torch.equal(state[name], tensor) for name, tensor in adapter_state_dict(add_again).items())

    name = next(iter(state))
    spoilt = {
        "1 tensor missing": {k: v for k, v in state.items() if k != name},
        "no place for, such as lm_head.weight": {**state, "lm_head.weight": torch.zeros(1)},
        "has shape": {**state, name: state[name][:2]},
        "not finite": {**state, name: torch.full_like(state[name], float("nan"))},
    }
    before = adapter_state_dict(add_again)
    for message, tensors in spoilt.items():
        with pytest.raises(AdapterError, match=message):
            load_adapter_state(add_again, tensors)
    assert all(torch.equal(before[key], tensor) for key, tensor in adapter_state_dict(add_again).items())


class OneLayer(nn.Module):
    """A model that no library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.dense: Any = nn.Linear(768, 768)
        self.norm = nn.LayerNorm(768)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.dense(x))


def test_the_worked_example_holds() -> None:
    model = nn.Sequential(nn.Linear(768, 768))
    x = torch.randn(3, 768)
    before = model(x)
    add_adapters(model, AdapterConfig(rank=8))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert (trainable, total) == (12_288, 602_880)
    assert round(100 * trainable / total, 2) == 2.04
    assert torch.equal(model(x), before)


def test_rank_4_on_the_attention_of_gpt2_small_is_small() -> None:
    """147,456 numbers on the query and value projections, were they apart: 12 layers of two 768 x 768."""
    model = nn.ModuleList(nn.ModuleDict({n: nn.Linear(768, 768) for n in ("q_proj", "v_proj")}) for _ in range(12))
    add_adapters(model, AdapterConfig(rank=4, target_modules=["q_proj", "v_proj"]))
    state = lora_state_dict(model)
    assert sum(tensor.numel() for tensor in state.values()) == 147_456
    assert sum(tensor.nbytes for tensor in state.values()) < 0.6 * 2**20


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_a_plain_loop_trains_any_module_and_saves_what_the_mode_trains(bias: Any) -> None:
    torch.manual_seed(0)
    model = OneLayer()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    add_adapters(model, AdapterConfig(rank=4, bias=bias))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, y = torch.randn(32, 768), torch.randn(32, 768)
    losses = []
    for _ in range(20):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    state = lora_state_dict(model, bias=bias)
    expected = {"none": 0, "lora_only": 1, "all": 2}[bias]
    assert sum(name.endswith(".bias") for name in state) == expected
    assert len(state) == 2 + expected
    assert torch.equal(model.dense.base.weight, frozen["dense.weight"])
    assert torch.equal(model.norm.weight, frozen["norm.weight"])
    for other in get_args(BiasMode):
        if other == bias:
            continue
        with pytest.raises(AdapterError, match=f"bias mode {bias}, and its state was asked for under {other}"):
            lora_state_dict(model, bias=other)

    again = OneLayer()
    add_adapters(again, AdapterConfig(rank=4, bias=bias), seed=9)
    with torch.no_grad():
        again.dense.base.weight.copy_(model.dense.base.weight)
        again.dense.base.bias.copy_(frozen["dense.bias"])
    load_adapter_state(again, state)
    assert torch.equal(again(x), model(x))


def test_a_bias_mode_that_differs_between_save_and_load_is_refused_by_name() -> None:
    saved, other = OneLayer(), OneLayer()
    add_adapters(saved, AdapterConfig(rank=4, bias="all"))
    add_adapters(other, AdapterConfig(rank=4, bias="lora_only"))
    with pytest.raises(AdapterError, match="saved under the bias mode all, and the model trains under lora_only"):
        load_adapter_state(other, lora_state_dict(saved, bias="all"))


def test_marking_again_under_another_mode_changes_what_trains() -> None:
    model = OneLayer()
    add_adapters(model, AdapterConfig(rank=4))
    mark_only_lora_as_trainable(model, bias="all")
    assert [name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")] == [
        "dense.base.bias",
        "norm.bias",
    ]
    mark_only_lora_as_trainable(model)
    assert sum(p.requires_grad for p in model.parameters()) == 2


def test_a_bias_trains_in_fp32_next_to_16_bit_weights() -> None:
    """A layer norm takes one dtype only; the bias is cast where it runs, and small updates are not lost."""
    model = OneLayer().to(torch.bfloat16)
    add_adapters(model, AdapterConfig(rank=4, bias="all"))
    state = lora_state_dict(model, bias="all")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert set(state) >= {"base_model.model.norm.bias", "base_model.model.dense.base_layer.bias"}
    model(torch.randn(2, 768, dtype=torch.bfloat16)).float().square().mean().backward()
    biases = [p for name, p in model.named_parameters() if name.endswith("bias") and p.requires_grad]
    assert len(biases) == 2
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in biases)


def test_gpt2s_conv1d_is_a_linear_layer_too() -> None:
    from transformers.pytorch_utils import Conv1D

    model: Any = nn.Sequential(Conv1D(24, 8))  # 8 in, 24 out; weight (8, 24)
    x = torch.randn(3, 8)
    before = model(x)
    add_adapters(model, AdapterConfig(rank=2))
    assert torch.equal(model(x), before)
    assert model[0].lora_A.weight.shape == (2, 8)
    assert model[0].lora_B.weight.shape == (24, 2)


def test_the_library_names_are_where_they_are_promised() -> None:
    import qlora_trainer

    for name in qlora_trainer.__all__:
        assert callable(getattr(qlora_trainer, name)), name


def test_a_gaussian_start_is_drawn_as_pefts_and_leaves_the_models_output() -> None:
    """Of deviation 1 / R, and B zero."""
    from peft import LoraConfig, get_peft_model

    sizes: dict[str, Any] = {"rank": 8, "target_modules": ["0"]}
    ours, theirs = nn.Sequential(nn.Linear(2048, 64)), nn.Sequential(nn.Linear(2048, 64))
    x = torch.randn(3, 2048)
    expected = ours(x)
    add_adapters(ours, AdapterConfig(init="gaussian", **sizes), seed=1)
    assert torch.equal(ours(x), expected)
    drawn = lora_layers(ours)["0"].lora_A.weight.detach()
    model = get_peft_model(theirs, LoraConfig(r=8, target_modules=["0"], init_lora_weights="gaussian"))
    peft_drawn = model.base_model.model[0].lora_A["default"].weight.detach()
    for values in (drawn, peft_drawn):  # 16,384 values: the deviation is known to 0.6 %
        assert float(values.std()) == pytest.approx(1 / 8, rel=0.03)
        assert float(values.abs().max()) > 3 / 8  # no uniform distribution of that deviation goes there
    again = nn.Sequential(nn.Linear(2048, 64))
    add_adapters(again, AdapterConfig(init="gaussian", **sizes), seed=1)
    assert torch.equal(lora_layers(again)["0"].lora_A.weight, drawn)
