"""Promises of the training forward: packed documents never meet, and the memory-efficient loss is the model's own
loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from packed_losses import examples, loss_and_gradient
from tiny_models import FAMILIES, SHAPE, load
from tiny_tokenizers import tiny_tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
    MptConfig,
    Phi3Config,
)

from qlora_trainer.adapters.inject import add_adapters
from qlora_trainer.adapters.trainable import trainable_parameters
from qlora_trainer.common.errors import ModelError
from qlora_trainer.config.schema import AdapterConfig, RunConfig
from qlora_trainer.data.batching.packing import make_packs
from qlora_trainer.data.types import Example
from qlora_trainer.model.forward import LossPath, examine_forward, find_loss_path, logits, loss_sum
from qlora_trainer.model.modules.packed_attention import attends_apart
from qlora_trainer.runs.start import start_run

Models = Callable[[str], Path]


def trainable_model(directory: Path) -> Any:
    """A tiny NF4 model whose adapters are not zero."""
    model = load(directory).model
    add_adapters(model, AdapterConfig(rank=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.train()


@pytest.mark.parametrize("family", slow_but(sorted(FAMILIES), "gemma2", "gpt2", "llama"))
def test_packing_does_not_change_loss_or_gradients(family: str, tiny_models: Models) -> None:
    model = trainable_model(tiny_models(family))
    assert examine_forward(model).warnings == ()
    rows = examples(model.config.vocab_size)
    alone, expected = loss_and_gradient(model, rows, packing=False, limit=1)
    packed, gradient = loss_and_gradient(model, rows, packing=True, limit=1000)
    padded, also = loss_and_gradient(model, rows, packing=False, limit=1000)
    assert packed == pytest.approx(alone, rel=1e-5)
    assert padded == pytest.approx(alone, rel=1e-5)
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5
    assert float((also - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("family", slow_but(sorted(FAMILIES), "gemma2", "gpt2", "llama"))
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


@pytest.mark.parametrize("family", slow_but(sorted(FAMILIES), "gemma2", "gpt2", "llama"))
def test_the_patched_loss_is_the_models_own(family: str, tiny_models: Models) -> None:
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
        self.get_input_embeddings, self.get_output_embeddings = model.get_input_embeddings, model.get_output_embeddings

    def forward(self, **inputs: Any) -> Any:
        output = self.inner(**inputs)
        output.logits = output.logits.sin() * 3
        return output


def test_a_model_with_a_loss_of_its_own_keeps_it(tiny_llama: Path) -> None:
    model = OddHead(load(tiny_llama).model)
    plan = examine_forward(model)
    assert plan.loss_path == LossPath(own_logits=True)
    assert "logits in a way of its own" in plan.warnings[0]
    (pack,) = make_packs(examples(64)[:1], 100, packing=True)
    with torch.no_grad():
        expected = F.cross_entropy(logits(model, pack)[0], pack.labels[0], reduction="sum")
        assert float(loss_sum(model, pack, plan.loss_path)) == pytest.approx(float(expected), rel=1e-6)


def test_a_model_that_cannot_keep_documents_apart_is_padded_and_reported() -> None:
    """Falcon's layers do their own attention and never ask transformers' registry."""
    torch.manual_seed(0)
    config = FalconConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64, alibi=False, bias=False
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not attends_apart(model, 64)
    plan = examine_forward(model)
    assert not plan.can_pack
    assert "padded on the right" in plan.warnings[0]


def test_a_model_that_needs_a_mask_is_padded_and_reported() -> None:
    """MPT's layers take the mask for granted, and a packed forward makes none."""
    torch.manual_seed(0)
    config = MptConfig(d_model=64, n_heads=4, n_layers=1, vocab_size=64)
    assert not examine_forward(AutoModelForCausalLM.from_config(config)).can_pack


def raising_model(error: Exception, when: Callable[[dict[str, Any]], bool]) -> Any:
    """A model whose decoder raises `error` where its inputs are of that kind."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, vocab_size=64)).requires_grad_(False)
    forward = model.model.forward

    def raise_or_run(**inputs: Any) -> Any:
        if when(inputs):
            raise error
        return forward(**inputs)

    model.model.forward = raise_or_run
    return model


def always(inputs: dict[str, Any]) -> bool:
    return True


def packed_only(inputs: dict[str, Any]) -> bool:
    return "document_bounds" in inputs


@pytest.mark.parametrize(
    "error",
    [
        TypeError("forward() got an unexpected keyword argument 'position_ids'"),
        AttributeError("no 'to'"),
        KeyError(3),
        NotImplementedError("no cache"),
        AssertionError("two dimensions"),
        ZeroDivisionError("division by zero"),
    ],
)
def test_a_model_that_cannot_run_is_refused_by_name(error: Exception) -> None:
    model = raising_model(error, always)
    for examine in (examine_forward, find_loss_path):
        with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot be trained here") as caught:
            examine(model)
        assert str(error) in str(caught.value)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
]


@pytest.mark.parametrize("when", [always, packed_only])
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["device", "accelerator", "host"])
def test_a_full_or_failing_device_is_never_taken_for_a_models_way(
    error: Exception, when: Callable[[dict[str, Any]], bool]
) -> None:
    with pytest.raises(type(error)) as caught:
        examine_forward(raising_model(error, when))
    assert caught.value is error


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["device", "accelerator", "host"])
def test_memory_that_runs_out_in_the_patched_loss_is_reported(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr("qlora_trainer.model.forward.linear_cross_entropy", fail)
    with pytest.raises(type(error)):
        find_loss_path(raising_model(error, packed_only))


def test_hidden_states_that_the_head_cannot_take_leave_the_model_its_own_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = raising_model(ValueError(), packed_only)
    fail = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr("qlora_trainer.model.forward.linear_cross_entropy", lambda *a, **k: (_ for _ in ()).throw(fail))
    assert find_loss_path(model) == LossPath(own_logits=True)


def test_a_heads_bias_that_trains_gets_its_gradient() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPTJConfig(n_embd=64, n_head=4, n_layer=1, vocab_size=64, rotary_dim=16))
    model.requires_grad_(False)
    assert not find_loss_path(model).own_logits
    model.lm_head.bias.requires_grad_(True)
    path = find_loss_path(model)
    (pack,) = make_packs(examples(64)[:1], 100, packing=False)
    loss_sum(model, pack, path).backward()
    expected = torch.autograd.grad(loss_sum(model, pack, LossPath(own_logits=True)), model.lm_head.bias)[0]
    assert model.lm_head.bias.grad.abs().sum() > 0
    assert torch.equal(model.lm_head.bias.grad, expected)


def longrope_model(vocab_size: int = 64) -> Any:
    torch.manual_seed(0)
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    config = Phi3Config(
        **{**SHAPE, "max_position_embeddings": 256},
        vocab_size=vocab_size,
        original_max_position_embeddings=16,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors},
    )
    return AutoModelForCausalLM.from_config(config)


def test_rows_whose_positions_hang_on_their_neighbors_are_reported() -> None:
    """Long-rope models take other frequencies for all rows of a forward pass once one of them is long."""
    model = longrope_model()
    assert examine_forward(model, max_length=16).warnings == ()
    (warning,) = examine_forward(model, max_length=17).warnings
    assert "data.max_length=16" in warning
    with torch.no_grad():
        short, long = (Example(ids, ids) for ids in (list(range(3, 13)), list(range(3, 33))))
        (alone,), (packed,) = (make_packs(rows, 1000, packing=True) for rows in ([short], [short, long]))
        assert not torch.allclose(logits(model, alone), logits(model, packed)[:, :10], rtol=1e-3)


def test_a_run_with_such_rows_says_so(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("smollm2")
    longrope_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run = start_run(tiny_config(model={"name": str(tmp_path / "model")}, data={"max_length": 100}))
    assert any("data.max_length=16" in warning for warning in run.warnings)


def test_no_mask_matrix_is_made(tiny_llama: Path) -> None:
    """The largest tensor of a packed forward grows with the tokens, not with their square."""
    from torch.utils._pytree import tree_leaves

    from qlora_kernels.torch_internals import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor) and leaf.dtype != torch.int64:
                    self.numel = max(self.numel, leaf.untyped_storage().nbytes())
            return out

    model = load(tiny_llama).model
    rows = [Example(list(range(3, 43)), list(range(3, 43)))] * 50  # 2,000 tokens in documents of 40
    (pack,) = make_packs(rows, 10_000, packing=True)
    with Largest() as largest, torch.no_grad():
        loss_sum(model, pack, find_loss_path(model))
    tokens = pack.tokens
    assert largest.numel < tokens * tokens  # bytes: not even a mask of one byte a pair
