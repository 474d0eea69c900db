"""Promises of the record of activations: the largest values by place, those inside an MLP and adapters included."""

from pathlib import Path

import pytest
import torch
from tiny_models import make_model_beyond_float16
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_trainer.adapters.layers import LoRALinear
from qlora_trainer.model.modules.activation_range import ActivationRange, watched_activations

LIMIT = torch.finfo(torch.float16).max


class Product(nn.Module):
    """An MLP's product, which is the input of one module and the output of none."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.up.weight.copy_(torch.tensor([[-300.0, 0.0], [0.0, 1.0]]))
            self.down.weight.fill_(1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x) ** 3)


def test_the_largest_value_of_each_place_is_known_in_the_order_of_computation() -> None:
    model = Product()
    with watched_activations(model) as seen:
        model(torch.ones(1, 2))
        model(torch.tensor([[0.5, 1.0]]))
    largest = seen.largest()
    assert largest is not None
    assert (largest.place, largest.value) == ("the input of down", 2.7e7)
    assert str(seen.first_beyond(LIMIT)) == "the input of down, 27,000,000"
    assert str(seen.first_beyond(299)) == "the output of up, 300"
    assert seen.first_beyond(3e7) is None
    model(torch.full((1, 2), 1e6))  # outside of the block
    assert seen.first_beyond(3e7) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_beyond_every_limit_and_the_largest(value: float) -> None:
    seen = ActivationRange()
    seen.take("before", torch.tensor([1e30]))
    seen.take("there", torch.tensor([1.0, value, 2.0]))
    seen.take("there", (torch.tensor([3.0]), None))
    seen.take("ids", torch.tensor([10**6]))
    seen.take("nothing", torch.empty(0))
    found = seen.first_beyond(torch.finfo(torch.float32).max)
    assert found is not None
    assert found.place == "there"
    largest = seen.largest()
    assert largest is not None
    assert largest.place == "there"


def test_an_adapted_layer_is_looked_at_once_and_with_its_adapter() -> None:
    """What the layer gives without its adapter is in no merged model."""
    base = nn.Linear(2, 2, bias=False)
    layer = LoRALinear.from_base(
        base, rank=1, alpha=1.0, dropout=0.0, use_rslora=False, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        base.weight.fill_(50_000.0)
        layer.lora_A.weight.fill_(1.0)
        layer.lora_B.weight.fill_(-49_999.0)
    model = nn.Sequential(layer)
    with torch.no_grad(), watched_activations(model) as seen:
        model(torch.ones(1, 2))
    largest = seen.largest()
    assert largest is not None
    assert (largest.place, largest.value) == ("the output of 0", 2.0)


@pytest.mark.parametrize(
    ("where", "first"),
    [("MLP", "the input of model.layers.0.mlp.down_proj"), ("hidden", "the output of model.layers.0.mlp.down_proj")],
)
def test_fp32_shows_where_a_model_leaves_float16(where: str, first: str, tmp_path: Path) -> None:
    """And float16 itself, and bfloat16, agree."""
    directory = make_model_beyond_float16(tmp_path / "model", where)
    ids = torch.arange(5, 45)[None]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        with torch.no_grad(), watched_activations(model) as seen:
            logits = model(ids).logits
        assert bool(torch.isfinite(logits).all()) == (dtype != torch.float16)
        found = seen.first_beyond(LIMIT)
        assert found is not None
        assert found.place == first
