"""Every layer of every listed family keeps little for backward; what only looks like one that can stays as it is."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cards import a_card_is_here
from marks import slow_but
from spying import noting
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora_trainer.adapters.inject import add_adapters
from qlora_trainer.common.cache import user_cache
from qlora_trainer.config.schema import AdapterConfig, ModelConfig, RunConfig
from qlora_trainer.model.device import kernel_warnings
from qlora_trainer.model.load import load_base_model
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.runs.report.summary import summarize
from qlora_trainer.runs.start import start_run
from qlora_trainer.training import patches as patched_modules
from qlora_trainer.training.patches import GatedMLP, gated_mlp, patch_model, rms_norm_form
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.nf4 import quantize_weight

LISTED = [
    *("llama", "llama_tied", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3", "phi3", "olmo2", "granite"),
    *("mixtral", "qwen3_moe"),
]


@pytest.mark.parametrize("dtype", slow_but(["float32", "bfloat16"], "float32"))
@pytest.mark.parametrize("family", slow_but(LISTED, "gemma3", "llama", "phi3"))
def test_every_layer_of_every_listed_family_is_patched_and_gives_the_same_logits(
    tiny_models: Callable[[str], Path], family: str, dtype: str
) -> None:
    directory = tiny_models(family)
    model = load_base_model(
        ModelDirectory.open(directory), ModelConfig(name=str(directory), compute_dtype=dtype), user_cache()
    ).model
    add_adapters(model, AdapterConfig(rank=4))
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        before = model(ids).logits
        report = patch_model(model)
        assert torch.equal(model(ids).logits, before)
    layers = model.config.num_hidden_layers
    for replaced, count in (report.projections, report.mlps, report.norms):
        assert replaced == count >= layers
    assert report.mlps[1] == layers
    assert patch_model(model) == report, "twice is as once"


@pytest.mark.parametrize(
    ("family", "mlps", "norms"),
    [
        ("gpt2", (0, 2), (5, 5)),  # MLPs without a gate; torch's own layer norms keep no more than ours would
        ("starcoder2", (0, 2), (5, 5)),
        ("gpt_neox", (0, 2), (5, 5)),
        ("falcon", (0, 2), (3, 3)),
        ("cohere", (2, 2), (0, 3)),  # a layer norm of its own, without a bias
    ],
)
def test_what_has_no_patched_form_is_counted_and_left_alone(
    family: str, mlps: tuple[int, int], norms: tuple[int, int], tiny_models: Callable[[str], Path]
) -> None:
    directory = tiny_models(family)
    model = load_base_model(ModelDirectory.open(directory), ModelConfig(name=str(directory)), user_cache()).model
    add_adapters(model, AdapterConfig(rank=4))
    report = patch_model(model)
    assert report.projections[0] == report.projections[1] > 0
    assert (report.mlps, report.norms) == (mlps, norms)
    assert f"{mlps[0]} of {mlps[1]} MLPs" in str(report)


def test_a_run_says_how_many_modules_keep_little(tiny_config: Callable[..., RunConfig]) -> None:
    summary = dict(summarize(start_run(tiny_config())))
    assert "14 of 14 projections, 2 of 2 MLPs, 5 of 5 norms" in summary["activation checkpointing"]


def test_a_run_says_which_attention_and_kernels_it_takes(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QLORA_KERNELS", raising=False)
    padded = start_run(tiny_config("padded", data={"packing": False}))
    assert dict(summarize(padded))["attention"] == "transformers' own, over padded rows"
    run = start_run(tiny_config())
    assert dict(summarize(run))["attention"] == "one document after another, with a window by blocks of queries"
    assert re.match(r"\d+ fast", dict(summarize(run))["kernels"])
    monkeypatch.setenv("QLORA_KERNELS", "reference")
    assert re.search("^0 fast, plain torch for .*dequantize_nf4", dict(summarize(run))["kernels"])
    assert any(line.endswith(": QLORA_KERNELS=reference.") for line in kernel_warnings("cpu")), (
        "a warning has the reason"
    )
    a_card_is_here(monkeypatch, (7, 5))
    monkeypatch.delenv("QLORA_KERNELS")
    run.base.device = torch.device("cuda")
    run.base.compute_dtype = torch.float16
    assert "and this one has 7.5" in dict(summarize(run))["attention"]


def nf4(out_features: int, in_features: int, seed: int) -> NF4Linear:
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))
    return NF4Linear(quantize_weight(weight), None)


class MLP(nn.Module):
    """What a library might call so; `swap` and `scale` make it another function."""

    def __init__(self, swap: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        self.one, self.two, self.three = nf4(128, 64, 0), nf4(128, 64, 1), nf4(64, 128, 2)
        self.activation = nn.SiLU()
        self.swap, self.scale = swap, scale

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.one(x), self.two(x)
        gate, up = (up, gate) if self.swap else (gate, up)
        return self.three(self.activation(gate) * up) * self.scale


@pytest.mark.parametrize("swap", [False, True])
def test_which_projection_is_the_gate_is_found_by_trying(swap: bool) -> None:
    mlp, x = MLP(swap), torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    found = gated_mlp(mlp)
    assert isinstance(found, GatedMLP)
    assert torch.equal(found(x), mlp(x))


def test_an_mlp_that_computes_something_else_stays_as_it_is() -> None:
    assert gated_mlp(MLP(scale=1.001)) is None


class ClampedMLP(MLP):
    """Clips what it multiplies, as DeepSeek-V4's does: only large values tell."""

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.activation(self.one(x).clamp(max=7)) * self.two(x).clamp(-7, 7))


def test_an_mlp_that_clips_large_values_stays_as_it_is() -> None:
    assert gated_mlp(ClampedMLP()) is None


@pytest.mark.parametrize(
    ("name", "known_as"),
    [("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_10", None), ("quick_gelu", None)],
)
def test_an_activation_is_known_by_its_numbers(name: str, known_as: str | None) -> None:
    """transformers' gelu_10 is GELU up to 10, and clipped there."""
    mlp = MLP()
    mlp.activation = ACT2FN[name]
    found = gated_mlp(mlp)
    assert found is not None
    assert found.activation == (known_as or mlp.activation)
    x = 100 * torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(found(x), mlp(x))


def test_an_mlp_whose_down_projection_is_not_4bit_stays_as_it_is() -> None:
    mlp = MLP()
    mlp.three = nn.Linear(128, 64)  # type: ignore[assignment]
    assert gated_mlp(mlp) is None


class OtherNorm(LlamaRMSNorm):
    """Looks like the library's, and is not: it takes the mean away."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


def test_a_norm_is_known_by_its_numbers_and_not_by_its_name() -> None:
    ours, other = LlamaRMSNorm(64, eps=1e-5).requires_grad_(False), OtherNorm(64, eps=1e-5).requires_grad_(False)
    assert rms_norm_form(ours) == (1e-5, "scale_after_cast")
    assert rms_norm_form(other) is None
    trained = LlamaRMSNorm(64).requires_grad_(True)
    assert rms_norm_form(trained) is None, "the memory-efficient form gives the weight no gradient"


def test_a_gated_mlp_in_tiles_has_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patched_modules, "FEWEST_TILE_TOKENS", 1)
    mlp = gated_mlp(MLP())
    assert mlp is not None
    x = torch.randn(2, 11, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    expected = torch.autograd.grad(F.silu(mlp(x)).sum(), x)[0]
    mlp.tiles = 4
    found = torch.autograd.grad(F.silu(mlp(x)).sum(), x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # products of other sizes round otherwise


def test_a_tile_of_a_long_context_has_a_bounded_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patched_modules, "FEWEST_TILE_TOKENS", 1)
    monkeypatch.setattr(patched_modules, "MOST_TILE_TOKENS", 5)
    monkeypatch.setattr(patched_modules, "MOST_TILES", 6)
    mlp = gated_mlp(MLP())
    assert mlp is not None
    sizes: list[int] = []
    monkeypatch.setattr(mlp, "run", noting(mlp.run, lambda x: sizes.append(len(x))))
    for tokens, tiles, expected in ((23, 2, [5, 5, 5, 5, 3]), (8, 2, [4, 4]), (23, 1, [23]), (36, 2, [6] * 6)):
        sizes.clear()
        mlp.tiles = tiles
        mlp(torch.randn(tokens, 64))
        assert sizes == expected


def test_a_norm_that_takes_a_gate_too_stays_as_it_is() -> None:
    class GatedNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
            return super().forward(hidden_states if gate is None else hidden_states * gate)

    assert rms_norm_form(GatedNorm(64).requires_grad_(False)) is None
