"""Promises of the training forward: packed documents never meet, and the lean loss is the model's own loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, SHAPE
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, CohereConfig, FalconConfig, GraniteConfig

from qlora_trainer.adapters.inject import add_adapters, trainable_parameters
from qlora_trainer.attention import attends_apart, packed_documents
from qlora_trainer.config import AdapterConfig, ModelConfig
from qlora_trainer.data.packing import Example, make_packs
from qlora_trainer.forward import LossPath, examine_forward, find_loss_path, logits, loss_sum
from qlora_trainer.model import load_base_model

Models = Callable[[str], Path]


def trainable_model(directory: Path) -> Any:
    """A tiny NF4 model whose adapters are not zero."""
    model = load_base_model(directory, ModelConfig(name=str(directory))).model
    add_adapters(model, AdapterConfig(rank=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.train()


def examples(vocab_size: int) -> list[Example]:
    """Documents longer and shorter than the sliding window of 6, with prompts that are not learned."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in (21, 5, 13, 2, 30)]
    return [Example(row, [-100] * (len(row) // 3) + row[len(row) // 3 :]) for row in rows]


def loss_and_gradient(model: Any, rows: list[Example], packing: bool, limit: int) -> tuple[Tensor, Tensor]:
    path = find_loss_path(model)
    model.zero_grad()
    total = torch.zeros(())
    for pack in make_packs(rows, limit, packing):
        loss = loss_sum(model, pack, path)
        loss.backward()
        total += loss.detach()
    return total, torch.cat([parameter.grad.flatten() for _, parameter in trainable_parameters(model)])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_packing_does_not_change_loss_or_gradients(family: str, tiny_models: Models) -> None:
    model = trainable_model(tiny_models(family))
    assert examine_forward(model).notices == ()
    rows = examples(model.config.vocab_size)
    alone, expected = loss_and_gradient(model, rows, packing=False, limit=1)
    packed, gradient = loss_and_gradient(model, rows, packing=True, limit=1000)
    padded, also = loss_and_gradient(model, rows, packing=False, limit=1000)
    assert float(packed) == pytest.approx(float(alone), rel=1e-5)
    assert float(padded) == pytest.approx(float(alone), rel=1e-5)
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5
    assert float((also - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_changing_one_document_leaves_the_logits_of_another_alone(family: str, tiny_models: Models) -> None:
    model = trainable_model(tiny_models(family)).eval()
    first, second = examples(model.config.vocab_size)[:2]
    other = Example([token % 50 + 3 for token in first.input_ids[::-1]], first.labels)
    with torch.no_grad():
        before = logits(model, make_packs([first, second], 1000, packing=True)[0])
        after = logits(model, make_packs([other, second], 1000, packing=True)[0])
    boundary = len(first.input_ids)
    assert not torch.equal(before[:, :boundary], after[:, :boundary])
    assert torch.equal(before[:, boundary:], after[:, boundary:])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_lean_loss_is_the_models_own(family: str, tiny_models: Models) -> None:
    model = trainable_model(tiny_models(family)).eval()
    path = find_loss_path(model)
    assert not path.own_logits
    (pack,) = make_packs(examples(model.config.vocab_size), 1000, packing=True)
    own = loss_sum(model, pack, LossPath(own_logits=True))
    assert loss_sum(model, pack, path).item() == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CohereConfig(**SHAPE, vocab_size=64, logit_scale=0.25), LossPath(logit_scale=0.25)),
        (GraniteConfig(**SHAPE, vocab_size=64, logits_scaling=4.0), LossPath(logit_scale=0.25)),
    ],
    ids=["cohere", "granite"],
)
def test_logit_scales_are_read_from_the_config(config: Any, expected: LossPath) -> None:
    torch.manual_seed(0)
    assert find_loss_path(AutoModelForCausalLM.from_config(config)) == expected


class OddHead(nn.Module):
    """Wraps a model whose logits are made in a way that no config tells."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner, self.config, self.base_model = model, model.config, model.base_model
        self.get_output_embeddings = model.get_output_embeddings

    def forward(self, **inputs: Any) -> Any:
        output = self.inner(**inputs)
        output.logits = output.logits.sin() * 3
        return output


def test_a_model_with_a_loss_of_its_own_keeps_it(tiny_llama: Path) -> None:
    model = OddHead(load_base_model(tiny_llama, ModelConfig(name="x")).model)
    plan = examine_forward(model)
    assert plan.loss_path == LossPath(own_logits=True)
    assert "logits in a way of its own" in plan.notices[0]
    (pack,) = make_packs(examples(64)[:1], 100, packing=True)
    with torch.no_grad():
        expected = F.cross_entropy(logits(model, pack)[0], pack.labels[0], reduction="sum")
        assert float(loss_sum(model, pack, plan.loss_path)) == pytest.approx(float(expected), rel=1e-6)


def test_a_model_that_cannot_keep_documents_apart_is_padded_and_told() -> None:
    """Falcon's layers do their own attention and never ask transformers' registry."""
    torch.manual_seed(0)
    config = FalconConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64, alibi=False, bias=False
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not attends_apart(model, 64)
    plan = examine_forward(model)
    assert not plan.can_pack
    assert "padded on the right" in plan.notices[0]


def test_the_models_own_attention_comes_back(tiny_llama: Path) -> None:
    model = load_base_model(tiny_llama, ModelConfig(name="x")).model
    before = model.config._attn_implementation
    with packed_documents(model):
        assert model.config._attn_implementation != before
    assert model.config._attn_implementation == before


def test_no_mask_matrix_is_made(tiny_llama: Path) -> None:
    """The largest tensor of a packed forward grows with the tokens, not with their square."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor) and leaf.dtype != torch.int64:
                    self.numel = max(self.numel, leaf.untyped_storage().nbytes())
            return out

    model = load_base_model(tiny_llama, ModelConfig(name="x")).model
    rows = [Example(list(range(3, 43)), list(range(3, 43)))] * 50  # 2,000 tokens in documents of 40
    (pack,) = make_packs(rows, 10_000, packing=True)
    with Largest() as largest, torch.no_grad():
        loss_sum(model, pack, find_loss_path(model))
    tokens = pack.tokens
    assert largest.numel < tokens * tokens  # bytes: not even a mask of one byte a pair
