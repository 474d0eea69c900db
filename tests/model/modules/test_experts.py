"""Experts in NF4: the function of transformers' own experts over the dequantized weights, and little kept."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow, slow_but
from random_tensors import normal
from spying import noting, unchanged
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from qlora_kernels.experts import Expert, gated_experts
from qlora_kernels.nf4 import NF4Weight, dequantize_nf4, quantize_nf4
from qlora_kernels.torch_internals import FakeTensorMode
from qlora_trainer.adapters.inject import add_adapters, load_adapter_state
from qlora_trainer.adapters.peft_format import read_adapter
from qlora_trainer.adapters.targets import find_targets
from qlora_trainer.common.cache import user_cache
from qlora_trainer.common.errors import AdapterError, ModelError
from qlora_trainer.config.schema import ModelConfig, RunConfig
from qlora_trainer.merging.merge_run import merge_run
from qlora_trainer.model.load import load_base_model
from qlora_trainer.model.modules.experts import split_experts
from qlora_trainer.model.modules.nf4_linear import quantized_fraction
from qlora_trainer.model.quantized_copy import FUSED_EXPERTS, quantize_checkpoint
from qlora_trainer.runs.start import start_run
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.nf4 import empty_weight

EXPERTS, HIDDEN, WIDTH, SLOTS = 5, 64, 96, 2


def matrix(rows: int, columns: int, seed: int) -> NF4Weight:
    return quantize_nf4(normal(rows, columns, seed=seed) / columns**0.5)


def make_experts() -> list[Expert]:
    return [
        Expert(matrix(WIDTH, HIDDEN, 3 * e), matrix(WIDTH, HIDDEN, 3 * e + 1), matrix(HIDDEN, WIDTH, 3 * e + 2))
        for e in range(EXPERTS)
    ]


def routes(tokens: int, experts: Sequence[int] = range(EXPERTS)) -> tuple[Tensor, Tensor]:
    """(chosen, routing): every token goes to SLOTS different ones of these experts."""
    scores = normal(tokens, len(experts), seed=7).softmax(-1)
    routing, index = scores.topk(SLOTS, dim=-1)
    return torch.tensor(list(experts))[index], routing


def theirs(experts: Sequence[Expert], dtype: torch.dtype) -> MixtralExperts:
    """transformers' own module over the same weights, dense and fused."""
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS, hidden_act="silu")
    config._experts_implementation = "eager"
    module = MixtralExperts(config).to(dtype)
    with torch.no_grad():
        for index, expert in enumerate(experts):
            both = torch.cat([dequantize_nf4(expert.gate, dtype), dequantize_nf4(expert.up, dtype)])
            module.gate_up_proj[index].copy_(both)
            module.down_proj[index].copy_(dequantize_nf4(expert.down, dtype))
    return module


@pytest.mark.parametrize("chosen_experts", [range(EXPERTS), (1, 4)], ids=["all", "some_unused"])
def test_output_and_gradients_are_those_of_transformers_own_experts(chosen_experts: Sequence[int]) -> None:
    experts = make_experts()
    chosen, scores = routes(17, chosen_experts)
    found: list[Tensor] = []
    expected: list[Tensor] = []
    for results, function in (
        (found, lambda x, routing: gated_experts(x, chosen, routing, experts, F.silu)),
        (expected, lambda x, routing: theirs(experts, torch.float64)(x, chosen, routing)),
    ):
        x = normal(17, HIDDEN, seed=1, dtype=torch.float64).requires_grad_()
        routing = scores.double().requires_grad_()
        output = function(x, routing)
        output.backward(normal(17, HIDDEN, seed=2, dtype=torch.float64))
        assert x.grad is not None
        assert routing.grad is not None
        results += [output.detach(), x.grad, routing.grad]
    for ours, other in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_16_bits_it_errs_little_more_than_transformers_own_experts(dtype: torch.dtype) -> None:
    """The routing weights are fp32, as Mixtral's."""
    experts = make_experts()
    chosen, scores = routes(40)

    def results(function: Callable[..., Tensor], x_dtype: torch.dtype) -> list[Tensor]:
        x = normal(40, HIDDEN, seed=1).to(dtype).to(x_dtype).requires_grad_()
        routing = scores.to(torch.promote_types(x_dtype, torch.float32)).requires_grad_()
        output = function(x, routing)
        assert output.dtype == x_dtype
        gradients = torch.autograd.grad(output, (x, routing), normal(40, HIDDEN, seed=2).to(dtype).to(x_dtype))
        return [output.detach(), *gradients]

    exact = results(lambda x, routing: theirs(experts, torch.float64)(x, chosen, routing), torch.float64)
    own = results(lambda x, routing: theirs(experts, dtype)(x, chosen, routing), dtype)
    ours = results(lambda x, routing: gated_experts(x, chosen, routing, experts, F.silu), dtype)
    for found, expected, library in zip(ours, exact, own, strict=True):
        assert (found - expected).norm() <= 1.1 * (library - expected).norm()


def test_tokens_and_routes_are_all_that_is_kept() -> None:
    experts = make_experts()
    chosen, routing = routes(17)
    x = normal(17, HIDDEN, seed=1).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(noting(unchanged, kept.append), unchanged):
        gated_experts(x, chosen, routing, experts, F.silu)
    assert sorted(tuple(tensor.shape) for tensor in kept) == sorted([(17, HIDDEN), (17, SLOTS), (17 * SLOTS,)])


def test_recomputed_it_gives_the_same_gradients() -> None:
    experts = make_experts()
    chosen, routing = routes(17)
    gradients = []
    for recompute in (False, True):
        x = normal(17, HIDDEN, seed=1).requires_grad_()
        arguments = (x, chosen, routing, experts, F.silu)
        if recompute:
            output = torch.utils.checkpoint.checkpoint(gated_experts, *arguments, use_reentrant=False)
        else:
            output = gated_experts(*arguments)
        output.square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_on_fake_tensors_the_fullest_routing_is_taken() -> None:
    """So that a plan holds whatever the router does: K experts have every token."""
    with FakeTensorMode():
        experts = [
            Expert(empty_weight(WIDTH, HIDDEN), empty_weight(WIDTH, HIDDEN), empty_weight(HIDDEN, WIDTH))
            for _ in range(EXPERTS)
        ]
        x = torch.empty(17, HIDDEN, requires_grad=True)
        seen: list[int] = []

        def activation(gate: Tensor) -> Tensor:
            seen.append(len(gate))
            return F.silu(gate)

        output = gated_experts(x, torch.empty(17, SLOTS, dtype=torch.int64), torch.rand(17, SLOTS), experts, activation)
        assert seen == [17] * SLOTS
        output.sum().backward()
    assert output.shape == (17, HIDDEN)
    assert x.grad is not None
    assert set(seen) == {17}


def plain(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def with_split_experts(model: Any) -> Any:
    """The same model, its experts' matrices taken out of the fused parameters."""
    fused = {
        path: module for path, module in model.named_modules() if isinstance(module, MixtralExperts | Qwen3MoeExperts)
    }
    assert split_experts(model) == list(fused)
    for path, module in fused.items():
        split = model.get_submodule(path)
        for index in range(split.experts):
            matrices = (*module.gate_up_proj[index].chunk(2), module.down_proj[index])
            for layer, matrix in zip(split.projections(index), matrices, strict=True):
                layer.weight = nn.Parameter(matrix.detach().clone())
    return model


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_split_experts_have_the_checkpoints_names_and_answer_as_the_fused_ones(
    family: str, tiny_models: Callable[[str], Path]
) -> None:
    directory = tiny_models(family)
    model = with_split_experts(plain(directory))
    stored = {name.replace("block_sparse_moe", "mlp") for name in ModelDirectory.open(directory).tensors}
    assert model.state_dict().keys() == stored
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(directory)(ids).logits, rtol=1e-5, atol=1e-5)


def test_experts_that_compute_otherwise_stay_fused(tiny_models: Callable[[str], Path]) -> None:
    model = plain(tiny_models("mixtral"))
    other = model.model.layers[1].mlp.experts
    other.act_fn = Clamped()
    original = type(other).forward
    try:
        type(other).forward = lambda self, x, *routes: (
            original(self, x, *routes) * (1 + isinstance(self.act_fn, Clamped))
        )
        assert split_experts(model) == ["model.layers.0.mlp.experts"]
    finally:
        type(other).forward = original
    assert model.model.layers[1].mlp.experts is other
    assert quantized_fraction(model)[1][0].startswith("model.layers.1.mlp.experts")


class Clamped(nn.SiLU):
    """Marks experts that a test makes another function."""


def test_experts_are_no_targets(tiny_models: Callable[[str], Path]) -> None:
    model = plain(tiny_models("mixtral"))
    split_experts(model)
    assert {path.rsplit(".", 1)[-1] for path in find_targets(model, "all-linear")} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    with pytest.raises(AdapterError, match=r"names w1, .* Experts are not adapted\."):
        find_targets(model, ["q_proj", "w1"])
    with pytest.raises(AdapterError, match=r"target_modules=mlp matches no linear layer.* Experts are not adapted\."):
        find_targets(model, "mlp")


def test_experts_that_are_fused_on_disk_are_refused_with_their_share(
    tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    plain(tiny_models("mixtral")).save_pretrained(tmp_path / "fused", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in ModelDirectory.open(tmp_path / "fused").tensors
    with pytest.raises(ModelError, match=r"Only 11\.1% of this model's linear weights become 4-bit.*experts\.gate_up"):
        load_base_model(ModelDirectory.open(tmp_path / "fused"), ModelConfig(name="fused"), user_cache())


@pytest.mark.parametrize("family", slow_but(["mixtral", "qwen3_moe"], "mixtral"))
def test_a_mixture_kept_in_4_bits_is_the_same_base(
    family: str, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = tiny_models(family)
    report = quantize_checkpoint(ModelDirectory.open(directory), tmp_path / "nf4", device=torch.device("cpu"))
    assert report.warnings == [FUSED_EXPERTS]
    kept, base = (
        load_base_model(ModelDirectory.open(path), ModelConfig(name="base"), user_cache())
        for path in (tmp_path / "nf4", directory)
    )
    assert kept.quantized_fraction == base.quantized_fraction == 1.0
    assert kept.fingerprint.difference(base.fingerprint) is None
    assert kept.fingerprint.stored_as == base.fingerprint.stored_as
    assert any(".experts." in path for path in base.fingerprint.tensors)


@pytest.mark.slow
def test_a_mixture_is_merged_from_a_copy_in_4_bits(
    tiny_config: Callable[..., RunConfig], tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = tiny_models("mixtral")
    quantize_checkpoint(ModelDirectory.open(directory), tmp_path / "nf4", device=torch.device("cpu"))
    run = start_run(tiny_config(model={"name": str(directory)}, training={"max_steps": 1}))
    run.train(lambda metrics: None)
    merge_run(run.directory, tmp_path / "merged", base="dequantized", dtype=torch.float32)
    merge_run(
        run.directory, tmp_path / "from_copy", base="dequantized", dtype=torch.float32, model=str(tmp_path / "nf4")
    )
    merged, from_copy = (ModelDirectory.open(tmp_path / name).tensors for name in ("merged", "from_copy"))
    assert merged.keys() == from_copy.keys() == ModelDirectory.open(directory).tensors.keys()
    assert all(torch.equal(info.read(), from_copy[name].read()) for name, info in merged.items())


@pytest.mark.parametrize(("family", "targets"), [slow(("mixtral", "all-linear")), ("qwen3_moe", "attention")])
def test_peft_gives_our_logits_next_to_experts(
    family: str, targets: str, tiny_config: Callable[..., RunConfig], tiny_models: Callable[[str], Path]
) -> None:
    from peft import PeftModel

    directory = tiny_models(family)
    settings = {"rank": 4, "target_modules": targets}
    run = start_run(tiny_config(model={"name": str(directory)}, adapter=settings, training={"max_steps": 2}))
    run.train(lambda metrics: None)
    assert not any("PEFT" in warning for warning in run.warnings)
    ours = with_split_experts(plain(directory))
    add_adapters(ours, run.config.adapter)
    load_adapter_state(ours, read_adapter(run.directory / "adapter").tensors)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(plain(directory), run.directory / "adapter").eval()(input_ids=ids).logits
        assert (expected - plain(directory)(ids).logits).norm() > 1e-3 * expected.norm(), "the adapter must matter"
        torch.testing.assert_close(ours.eval()(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_what_peft_takes_for_experts_is_reported(
    tiny_config: Callable[..., RunConfig], tiny_models: Callable[[str], Path]
) -> None:
    """A layer without experts has an MLP whose projections are called as an expert's."""
    run = start_run(tiny_config(model={"name": str(tiny_models("qwen3_moe"))}))
    (reported,) = [warning for warning in run.warnings if "PEFT" in warning]
    assert "adapters on down_proj, gate_proj, up_proj for adapters on experts" in reported
