"""Packed documents never meet, in architectures beyond those that tests/tiny_models.py loads as trained bases.

Here models are dense, and every parameter's gradient is compared. test_forward.py does the same with NF4 bases and
their adapters for the other families.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_losses import examples, loss_and_gradient
from tiny_models import SHAPE, load
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig, MistralConfig

from qlora_trainer.data.batching.packing import make_packs
from qlora_trainer.data.types import Example
from qlora_trainer.model.forward import examine_forward, logits
from qlora_trainer.model.modules.packed_attention import attends_apart, packed_attention, packed_documents

WINDOW = {"sliding_window": 6}
WIDE_WINDOW = {**WINDOW, "head_dim": 16}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}

PACKED: dict[str, dict[str, Any]] = {
    "olmo2": {},
    "olmo3": WINDOW,
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": {**WINDOW, "logit_scale": 0.25},
    "starcoder2": {**WINDOW, "attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "gpt_neox": {},
    "mixtral": {**WINDOW, **EXPERTS, "num_local_experts": 4},
    "qwen3_moe": {**EXPERTS, "num_experts": 4},
    "qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1, "head_dim": 16},
    "phi3": WINDOW,
}
PADDED: dict[str, dict[str, Any]] = {"falcon": {}, "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2}}
WITH_A_WINDOW: dict[str, dict[str, Any]] = {
    **{kind: settings for kind, settings in PACKED.items() if "sliding_window" in settings},
    **dict.fromkeys(("mistral", "ministral3", "exaone4", "cwm"), WINDOW),
    **dict.fromkeys(("ministral", "gemma2", "gemma3_text", "vaultgemma"), WIDE_WINDOW),
    "qwen3_moe": {**PACKED["qwen3_moe"], **WINDOW, "use_sliding_window": True, "max_window_layers": 0},
    "smollm3": {**WINDOW, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
}


def tiny_model(kind: str, settings: dict[str, Any], **options: Any) -> Any:
    """Random weights, large enough that tokens and positions matter."""
    config = AutoConfig.for_model(kind, **{**SHAPE, "vocab_size": 64, **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, **options).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.12)
    return model


def loss_and_gradients(model: Any, packing: bool, limit: int) -> tuple[float, Tensor]:
    """Of every parameter but the head's and the embedding's: the memory-efficient loss gives a head no gradient."""
    model.requires_grad_(True)
    for module in (model.get_output_embeddings(), model.get_input_embeddings()):
        module.requires_grad_(False)
    return loss_and_gradient(model, examples(64), packing, limit)


def assert_same(ours: tuple[float, Tensor], theirs: tuple[float, Tensor]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert float((ours[1] - theirs[1]).norm() / theirs[1].norm()) < 1e-5


@pytest.mark.parametrize("kind", PACKED)
def test_packing_gives_the_loss_and_gradients_of_one_document_at_a_time(kind: str) -> None:
    model = tiny_model(kind, PACKED[kind]).train()
    assert examine_forward(model).can_pack
    alone = loss_and_gradients(model, packing=False, limit=1)
    assert_same(loss_and_gradients(model, packing=True, limit=1000), alone)
    assert_same(loss_and_gradients(model, packing=False, limit=1000), alone)


@pytest.mark.parametrize("kind", PADDED)
def test_what_cannot_be_packed_is_padded_without_changing_loss_or_gradients(kind: str) -> None:
    model = tiny_model(kind, PADDED[kind]).train()
    plan = examine_forward(model)
    assert not plan.can_pack
    assert sum("padded on the right" in warning for warning in plan.warnings) == 1
    assert_same(loss_and_gradients(model, packing=False, limit=1000), loss_and_gradients(model, packing=False, limit=1))


LEAKING: dict[str, dict[str, Any]] = {  # states that pass from one document to the next
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "head_dim": 16},
    "recurrent_gemma": {"lru_width": 64, "head_dim": 16, "block_types": ["recurrent", "attention"]},
    "jamba": {"num_experts": 1},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", LEAKING)
def test_what_leaks_is_seen_in_any_dtype_however_little_it_is(kind: str, dtype: torch.dtype) -> None:
    model = tiny_model(kind, LEAKING[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(0.17)  # the usual size of initial weights, with which a leak is a percent or less
    assert not attends_apart(model.to(dtype).eval(), 64)


@pytest.mark.parametrize("kind", ["cohere2", "mixtral", "qwen3"])
def test_what_packs_in_fp32_packs_in_bf16(kind: str) -> None:
    assert attends_apart(tiny_model(kind, PACKED[kind]).bfloat16().eval(), 64)


@pytest.mark.parametrize(("noise", "passes"), [(0.0, 2), (1e-4, 3)])
def test_a_pass_is_repeated_only_where_two_differ_which_a_device_may_do_by_itself(noise: float, passes: int) -> None:
    model = tiny_model("qwen3", PACKED["qwen3"]).eval()
    packed: list[bool] = []

    def note(module: Any, arguments: Any, options: dict[str, Any], output: Any) -> Any:
        packed.append("document_bounds" in options)
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden + noise * torch.randn_like(hidden)
        return output

    model.base_model.register_forward_hook(note, with_kwargs=True)
    assert attends_apart(model, 64)
    assert sum(packed) == passes


@pytest.mark.parametrize("kind", [*PACKED, "falcon"])
def test_changing_one_document_changes_no_logit_of_another(kind: str) -> None:
    packing = kind in PACKED
    model = tiny_model(kind, PACKED.get(kind, {})).eval()
    first, second = examples(64)[0], examples(64)[2]
    other = Example([token % 50 + 3 for token in first.input_ids[::-1]], first.labels)
    with torch.no_grad():
        before, after = (logits(model, make_packs([row, second], 1000, packing)[0]) for row in (first, other))
    parts = [(0, slice(len(first.input_ids))), (0, slice(len(first.input_ids), None))] if packing else [(0,), (1,)]
    assert not torch.equal(before[parts[0]], after[parts[0]])
    assert torch.equal(before[parts[1]], after[parts[1]])


@pytest.mark.parametrize("kind", WITH_A_WINDOW)
def test_a_window_reaches_as_far_as_transformers_own_mask(kind: str) -> None:
    """Compared with eager attention, whose mask transformers makes; a window of one token more or less is far off."""
    model = tiny_model(kind, WITH_A_WINDOW[kind], attn_implementation="eager").eval()
    assert attends_apart(model, 64)
    ids, positions = torch.randint(3, 64, (1, 40)), torch.arange(40)[None]
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    windows: list[int] = []

    def hidden(change: int) -> Tensor:
        def attend(*tensors: Any, sliding_window: int | None = None, **settings: Any) -> Any:
            if sliding_window is not None:
                windows.append(sliding_window)
                sliding_window += change
            return packed_attention(*tensors, sliding_window=sliding_window, **settings)

        with packed_documents(model, attend):
            return model.base_model(**inputs, document_bounds=[0, 40]).last_hidden_state

    with torch.no_grad():
        eager = model.base_model(**inputs).last_hidden_state
        errors = {change: float((hidden(change) - eager).norm() / eager.norm()) for change in (-1, 0, 1)}
    assert set(windows) == {6}
    assert errors[0] < 2e-6
    assert min(errors[-1], errors[1]) > 1e-3


def windowed_model(window: int, handed: int | None) -> Any:
    """A Mistral whose mask has the window, and whose layers hand `handed` to the attention function."""
    torch.manual_seed(0)
    config = MistralConfig(**SHAPE, vocab_size=64, sliding_window=window)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.12)
    for layer in model.model.layers:
        layer.self_attn.config = copy.copy(config)
        layer.self_attn.config.sliding_window = handed
    return model


@pytest.mark.parametrize(
    ("window", "handed", "expected"),
    [(6, 6, True), (6, None, False), (100, 100, True), (100, 200, False), (4096, 4096, True), (4096, None, False)],
)
def test_a_window_that_packing_would_lose_is_found_out(window: int, handed: int | None, expected: bool) -> None:
    assert attends_apart(windowed_model(window, handed), 64) is expected


def test_chunked_attention_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer hands its chunk to the attention function, so a packed forward would lose it."""
    model = windowed_model(4096, 4096)
    monkeypatch.setattr(model.config, "sliding_window", None)
    monkeypatch.setattr(model.config, "attention_chunk_size", 8192, raising=False)
    for layer in model.model.layers:
        layer.self_attn.config.sliding_window = None
    assert not attends_apart(model, 64)


def test_layer_types_say_whether_a_window_is_used() -> None:
    """A config may name a window that none of its layers has."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **SHAPE, vocab_size=64, head_dim=16, sliding_window=4096, layer_types=["full_attention"] * 2
    )
    assert attends_apart(AutoModelForCausalLM.from_config(config), 64)


def test_the_models_own_attention_comes_back(tiny_llama: Path) -> None:
    model = load(tiny_llama).model
    before = model.config._attn_implementation
    with packed_documents(model):
        assert model.config._attn_implementation != before
    assert model.config._attn_implementation == before
