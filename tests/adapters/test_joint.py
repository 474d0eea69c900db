"""Layers over one input are found by trying, in every family that has such, and compute what they compute alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from random_tensors import normal
from torch import Tensor, nn

from qlora_kernels.nf4 import quantize_nf4
from qlora_trainer.adapters.inject import add_adapters, lora_layers
from qlora_trainer.adapters.joint import JointForward, JointLayers, join_layers, with_stacks_together
from qlora_trainer.adapters.layers import LoRALinear
from qlora_trainer.adapters.trainable import trainable_parameters
from qlora_trainer.common.cache import user_cache
from qlora_trainer.config.schema import AdapterConfig, ModelConfig
from qlora_trainer.model.load import load_base_model
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.training.patches import GatedMLP, patch_model
from qlora_trainer.weights.model_directory import ModelDirectory

QKV = {"q_proj", "k_proj", "v_proj"}
JOINT = {  # family -> (layers of attention over one input, whether the gated MLP has such)
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3"), (QKV, True)),
    **dict.fromkeys(("olmo2", "granite", "cohere", "qwen3_moe"), (QKV, True)),
    **dict.fromkeys(("starcoder2", "mixtral"), (QKV, False)),
    **dict.fromkeys(("phi3", "gpt2", "gpt_neox", "falcon"), (set(), False)),  # one fused layer
}


def adapted_model(directory: Path, **settings: Any) -> Any:
    """A tiny model in fp64, its adapters too, whose B's are not zero."""
    config = ModelConfig(name=str(directory), device="cpu")
    model = load_base_model(ModelDirectory.open(directory), config, user_cache()).model
    add_adapters(model, AdapterConfig(**{"rank": 4, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.double()
        for index, layer in enumerate(lora_layers(model).values()):
            layer.lora_B.weight.copy_(normal(*layer.lora_B.weight.shape, seed=index) / 10)
    model.config.dtype = torch.float64
    return model


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Let every layer compute alone in the block: a layer with a hook does."""
    hooks = [m.register_forward_hook(lambda *_: None) for m in model.modules() if isinstance(m, LoRALinear | NF4Linear)]
    yield
    for hook in hooks:
        hook.remove()


def joint_names(module: nn.Module) -> list[list[str]]:
    return [list(names) for names, _ in module.forward.groups] if isinstance(module.forward, JointForward) else []


@pytest.mark.parametrize("family", slow_but(JOINT, "llama", "phi3", "qwen3"))
def test_the_layers_over_one_input_of_every_family_are_found(family: str, tiny_models: Callable[[str], Path]) -> None:
    model = adapted_model(tiny_models(family))
    names, has_gate = JOINT[family]
    for _ in range(2):  # twice is as once
        patch_model(model)
        groups = [group for module in model.modules() for group in joint_names(module)]
        assert len(groups) == (model.config.num_hidden_layers if names else 0)
        assert all(set(group) == names for group in groups)
        gated = [m.forward for m in model.modules() if isinstance(m.forward, GatedMLP)]
        assert all(isinstance(forward.gate_and_up, JointLayers) == has_gate for forward in gated)


@pytest.mark.parametrize(
    "settings", [{}, {"dropout": 0.2}, {"target_modules": ["q_proj", "v_proj", "up_proj"]}, {"bias": "all"}]
)
@pytest.mark.parametrize("family", slow_but(["llama", "qwen2", "qwen3", "gemma3", "mixtral", "starcoder2"], "qwen3"))
def test_a_model_computes_what_it_computes_with_each_layer_alone(
    family: str, settings: dict[str, Any], tiny_models: Callable[[str], Path]
) -> None:
    if family in ("mixtral", "starcoder2") and "target_modules" in settings:
        settings = {"target_modules": ["q_proj", "v_proj"]}
    model = adapted_model(tiny_models(family), **settings).train()
    patch_model(model)
    ids = torch.arange(3, 23)[None]
    names, parameters = zip(*trainable_parameters(model), strict=True)

    def results() -> list[Tensor]:
        torch.manual_seed(7)  # of dropout
        logits = model(ids).logits
        return [logits.detach(), *torch.autograd.grad(logits.square().sum(), parameters)]

    together = results()
    with apart(model):
        alone = results()
    for name, one, other in zip(("logits", *names), together, alone, strict=True):
        assert one.shape == other.shape
        error = float((one - other).norm() / other.norm().clamp(min=1e-300))
        assert error < 1e-12, f"{name}: {error}"


class Attention(nn.Module):
    """What a library might call so: `between` is computed of the input of its second layer alone."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.one, self.two, self.three = (self.layer(seed) for seed in range(3))
        self.norm = nn.RMSNorm(64)
        self.between = between

    @staticmethod
    def layer(seed: int) -> LoRALinear:
        base = NF4Linear(quantize_nf4(normal(64, 64, seed=seed) / 8), None)
        generator = torch.Generator().manual_seed(seed)
        return LoRALinear.from_base(base, rank=2, alpha=4, dropout=0.0, use_rslora=False, generator=generator)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        normed = self.norm(x)
        one = self.one(normed).tanh()
        two = self.two(self.between(normed) if other is None else other)
        return one * two + self.three(normed)


def joined(module: nn.Module) -> list[list[str]]:
    join_layers([module])
    return joint_names(module)


def test_a_layer_whose_input_is_another_tensor_stays_apart() -> None:
    assert joined(Attention()) == [["one", "two", "three"]]
    assert joined(Attention(lambda x: x * 1.0)) == [["one", "three"]]


class TwoInputs(Attention):
    """Two layers over one tensor and one over another, and a norm of each before them."""

    def __init__(self) -> None:
        super().__init__()
        self.other_norm = nn.RMSNorm(64)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.one(self.norm(x)) + self.two(self.other_norm(x))


class SameInputTwice(Attention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.one(x) + self.two(x) + self.two(self.one(x) + self.three(x))


def test_a_norm_for_each_layer_keeps_them_apart_and_so_does_a_second_call() -> None:
    assert joined(TwoInputs()) == []
    assert joined(SameInputTwice()) == []


class WritesBetween(Attention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        normed = self.norm(x)
        return self.one(normed) + self.two(normed.mul_(2.0)) + self.three(normed)


def test_an_input_that_is_written_to_between_is_another() -> None:
    assert joined(WritesBetween()) == [["two", "three"]]


class FailsEarly(Attention):
    def forward(self, x: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
        return self.one(x) * positions.cos() + self.two(x)


def test_what_cannot_be_tried_to_the_end_stays_as_far_as_it_was_not_seen() -> None:
    assert joined(FailsEarly()) == []


def test_a_call_with_another_input_than_when_it_was_tried_is_right_all_the_same() -> None:
    module, x, other = Attention(), normal(2, 5, 64), normal(2, 5, 64, seed=1)
    expected = [module(x), module(x, other), module(x)]
    join_layers([module])
    for found, wanted in zip([module(x), module(x, other), module(x)], expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_layers_put_in_later_are_taken_once_the_module_is_joined_again() -> None:
    module, x = Attention(), normal(2, 5, 64)
    join_layers([module])
    module.two = Attention.layer(7)
    assert joined(module) == [["one", "two", "three"]]
    other = Attention()
    other.two = module.two
    torch.testing.assert_close(module(x), other(x))


def test_hooks_on_a_layer_are_called_as_before() -> None:
    """Another program may watch or change what a layer gives."""
    module, x = Attention(), normal(2, 5, 64)
    join_layers([module])
    before = module(x)
    seen: list[torch.Size] = []

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(output.shape)
        return 2 * output

    handle = module.two.register_forward_hook(hook)
    assert not torch.allclose(module(x), before)
    assert seen == [(2, 5, 64)]
    handle.remove()
    torch.testing.assert_close(module(x), before)


class Asks(Attention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        assert self.one.base.in_features == x.shape[-1]
        assert not hasattr(self.one.base, "weight"), "a 4-bit layer has none"
        return self.one(x) + self.two(x) + self.three(x)


def test_a_module_may_ask_its_layers_for_what_they_have() -> None:
    module = Asks()
    assert joined(module) == [["one", "two", "three"]]
    module(normal(2, 5, 64))


def test_layers_without_adapters_are_joined_and_16_bit_ones_are_not() -> None:
    module = Attention()
    module.one, module.three = module.one.base, module.three.base  # type: ignore[assignment]
    assert joined(module) == [["one", "two", "three"]]
    assert module.two.joint == (), "one adapter has nothing to be stacked with"
    module = Attention()
    module.one = nn.Linear(64, 64)  # type: ignore[assignment]
    assert joined(module) == [["two", "three"]]


def test_the_as_of_layers_over_one_input_follow_each_other(tiny_models: Callable[[str], Path]) -> None:
    model = adapted_model(tiny_models("llama"), target_modules=["q_proj", "k_proj", "o_proj", "up_proj"])
    patch_model(model)
    named = list(trainable_parameters(model))
    ordered = with_stacks_together(named, lora_layers(model).values())
    names = [name.removeprefix("base_model.model.model.layers.").removesuffix(".weight") for name, _ in ordered]
    of_a_layer = ["q_proj.lora_A", "k_proj.lora_A", "q_proj.lora_B", "k_proj.lora_B", "o_proj.lora_A", "o_proj.lora_B"]
    assert names[:8] == [
        *(f"0.self_attn.{name}" for name in of_a_layer),
        "0.mlp.up_proj.lora_A",
        "0.mlp.up_proj.lora_B",
    ]
    assert dict(ordered) == dict(named)
