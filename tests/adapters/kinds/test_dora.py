"""Promises of DoRA: the paper's function, norms once a step, PEFT's files, and a merge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds_of_adapters import dense, differ_by, four_bit, logits_of
from tiny_runs import final_adapter, quiet
from torch import Tensor, nn

from qlora_kernels.nf4 import dequantize_nf4
from qlora_trainer.adapters.inject import adapter_state_dict, add_adapters, load_adapter_state, lora_layers
from qlora_trainer.adapters.kinds import dora
from qlora_trainer.adapters.kinds.dora import DoRALinear
from qlora_trainer.adapters.kinds.lora_file import LoraFileConfig
from qlora_trainer.adapters.peft_format import read_adapter
from qlora_trainer.adapters.trainable import trainable_parameters
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.load import make_config
from qlora_trainer.config.schema import AdapterConfig, RunConfig
from qlora_trainer.merging.merge_run import merge_run
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.planning.memory_plan import plan_memory
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.runs.trained import open_trained
from qlora_trainer.training.step import accumulate_gradients
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]
ROOT = Path(__file__).parents[3]
DORA: dict[str, Any] = {"kind": "dora", "rank": 4, "alpha": 8}


def randomize(model: Any, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trainable_parameters(model):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.mul_(1 + 0.2 * noise) if "magnitude" in name else parameter.data.copy_(0.1 * noise)


def by_formula(layer: DoRALinear, x: Tensor, weight: Tensor) -> Tensor:
    """The paper's formula on whole matrices, its norm a constant for the gradient."""
    adapted = weight + layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
    factors = layer.lora_magnitude_vector / torch.linalg.vector_norm(adapted, dim=1).detach()
    bias = layer.base.get_parameter("bias") if getattr(layer.base, "bias", None) is not None else 0.0
    return factors * (x @ adapted.T) + bias


def test_a_layer_of_768_by_768_trains_13_056_numbers_where_lora_trains_12_288() -> None:
    for kind, count in (("lora", 12_288), ("dora", 13_056)):
        model = nn.Sequential(nn.Linear(768, 768))
        add_adapters(model, AdapterConfig(kind=kind, rank=8))
        assert sum(p.numel() for _, p in trainable_parameters(model)) == count


def test_before_the_first_step_a_layer_gives_the_bases_output_bit_for_bit() -> None:
    torch.manual_seed(0)
    for base in (nn.Linear(128, 64), four_bit(nn.Linear(128, 64))):
        model = nn.Sequential(base)
        x = torch.randn(5, 128)
        expected = base(x)
        add_adapters(model, AdapterConfig(**DORA))
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("is_4bit", [False, True])
def test_output_and_gradients_are_those_of_the_papers_formula(is_4bit: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(128, 64)
    model = nn.Sequential(four_bit(linear) if is_4bit else linear)
    add_adapters(model, AdapterConfig(**DORA))
    randomize(model)
    layer = lora_layers(model)["0"]
    assert isinstance(layer, DoRALinear)
    base = layer.base
    weight = (
        dequantize_nf4(base.nf4_weight, torch.float32)
        if isinstance(base, NF4Linear)
        else base.get_parameter("weight").detach()
    )
    x, grad = torch.randn(7, 128, requires_grad=True), torch.randn(7, 64)
    inputs = [x, *(p for _, p in trainable_parameters(model))]
    found = torch.autograd.grad(model(x), inputs, grad)
    expected = torch.autograd.grad(by_formula(layer, x, weight), inputs, grad)
    torch.testing.assert_close(model(x), by_formula(layer, x, weight), rtol=1e-5, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    without_norm = layer.lora_magnitude_vector * (
        x @ (weight + layer.scaling * layer.lora_B.weight @ layer.lora_A.weight).T
    )
    assert not torch.allclose(model(x), without_norm, atol=1e-2), "the norm must matter"


def test_we_read_peft_and_peft_reads_us_with_equal_logits(
    tiny_config: Config, tiny_llama: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM")
    theirs = get_peft_model(dense(tiny_llama), settings)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
        if "magnitude" in name:
            parameter.data.mul_(1.1)
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs")
    assert adapter.differences(AdapterConfig(**DORA)) == {}
    assert adapter.differences(AdapterConfig(rank=4, alpha=8)) == {"adapter.kind": ("dora", "lora")}
    ours = dense(tiny_llama)
    add_adapters(ours, AdapterConfig(**DORA))
    load_adapter_state(ours, adapter.tensors)
    expected = logits_of(theirs.eval())
    assert differ_by(logits_of(ours), expected) < 1e-5
    assert differ_by(logits_of(dense(tiny_llama)), expected) > 1e-2

    run = start_run(tiny_config(adapter=DORA))
    randomize(run.base.model)
    (tmp_path / "ours").mkdir()
    run.write_adapter(tmp_path / "ours")
    again = dense(tiny_llama)
    add_adapters(again, AdapterConfig(**DORA))
    load_adapter_state(again, adapter_state_dict(run.base.model))
    loaded = PeftModel.from_pretrained(dense(tiny_llama), tmp_path / "ours").eval()
    expected = logits_of(again)
    assert differ_by(logits_of(loaded), expected) < 1e-5


def test_a_step_computes_the_norms_of_a_layer_once(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start_run(tiny_config(adapter=DORA, training={"activation_checkpointing": "full"}))
    packs = run.state.loader.next()
    calls: list[int] = []
    real = dora.dora_norms

    def counting(*arguments: Any) -> Tensor:
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(dora, "dora_norms", counting)
    accumulate_gradients(run.state, [*packs, *packs])
    assert len(calls) == len(run.adapted)
    accumulate_gradients(run.state, packs)
    assert len(calls) == 2 * len(run.adapted), "a step has norms of its own"


def test_norms_follow_the_adapter_in_evaluation_and_after_a_step(tiny_config: Config) -> None:
    run = start_run(tiny_config(adapter=DORA))
    model = run.base.model.eval()
    before = logits_of(model)
    randomize(model)
    changed = adapter_state_dict(model)
    load_adapter_state(model, {name: tensor * 0.5 for name, tensor in changed.items()})
    halved = logits_of(model)
    load_adapter_state(model, changed)
    assert not torch.equal(halved, before)
    fresh = start_run(tiny_config("fresh", adapter=DORA)).base.model.eval()
    load_adapter_state(fresh, changed)
    assert torch.equal(logits_of(model), logits_of(fresh))
    run.train(quiet)
    trained = adapter_state_dict(run.base.model)
    load_adapter_state(fresh, trained)
    assert torch.equal(logits_of(run.base.model.eval()), logits_of(fresh))


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_counts_as_planned_and_merges(
    tiny_config: Config, tiny_llama: Path, tmp_path: Path
) -> None:
    config = tiny_config(adapter=DORA, training={"max_steps": 4, "save_every": 2})
    whole = start_run(config)
    real = sum(p.numel() for group in whole.state.groups for p in group.parameters.values())
    assert plan_memory(ModelDirectory.open(tiny_llama), config).adapter_parameters == real
    assert whole.train(quiet)
    parts = start_run(config.replace({"training.output_dir": str(tmp_path / "parts")}))
    parts.train(quiet, stop_after=2)
    resumed = resume_run(parts.directory)
    assert resumed.train(quiet)
    first, second = final_adapter(whole.directory), final_adapter(resumed.directory)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    magnitudes = [name for name in first if name.endswith("lora_magnitude_vector")]
    assert len(magnitudes) == len(whole.adapted)

    done = merge_run(whole.directory, tmp_path / "merged", base="dequantized", dtype=torch.float32)
    assert done.report.verification is not None
    merged = dense(tmp_path / "merged")
    trained = open_trained(whole.directory, compute_dtype="float32").base.model
    expected = logits_of(trained)
    assert differ_by(logits_of(merged), expected) < 1e-5


def test_a_merge_into_16_bits_is_verified_beyond_its_rounding(tiny_config: Config, tmp_path: Path) -> None:
    run = start_run(tiny_config(adapter=DORA, training={"max_steps": 4}))
    assert run.train(quiet)
    done = merge_run(run.directory, tmp_path / "merged", base="dequantized", dtype=torch.float16)
    assert done.report.verification is not None
    assert done.report.verification.beyond_rounding.kl < 1e-9


def test_a_file_without_its_magnitudes_is_refused_and_so_are_magnitudes_without_dora() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    add_adapters(model, AdapterConfig(**DORA))
    tensors = adapter_state_dict(model)
    name = "base_model.model.0.lora_magnitude_vector"
    config = LoraFileConfig(r=4, lora_alpha=8.0, target_modules=["0"], use_dora=True)
    config.check_tensors(tensors, "it")
    without = {key: tensor for key, tensor in tensors.items() if key != name}
    with pytest.raises(AdapterError, match=rf"says use_dora, and lacks {name}"):
        config.check_tensors(without, "it")
    with pytest.raises(AdapterError, match=r"has shape \(5,\), not \(6,\)"):
        config.check_tensors({**tensors, name: torch.ones(5)}, "it")
    with pytest.raises(AdapterError, match="no part of such an adapter"):
        config.model_copy(update={"use_dora": False}).check_tensors(tensors, "it")


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "most"), [("full", 1.1), ("none", 1.15)])
def test_dora_is_planned_with_hardly_more_memory_than_lora(policy: str, most: float) -> None:
    """Four layers of Llama-3.1-8B's shape, 2,048 tokens, on a card."""
    directory = ModelDirectory.open(ROOT / "benchmarks" / "models" / "llama-3.1-8b")
    totals = {}
    for kind in ("lora", "dora"):
        config = make_config(
            {
                "model": {"name": str(directory.path), "compute_dtype": "bfloat16"},
                "adapter": {"kind": kind, "rank": 16},
                "data": {"train": "rows.jsonl", "max_length": 2048},
                "training": {"activation_checkpointing": policy, "micro_batch_tokens": 2048},
            }
        )
        totals[kind] = plan_memory(directory, config, layers=4).total
    assert totals["lora"] < totals["dora"] < most * totals["lora"]


def test_a_16_bit_layer_whose_bias_trains_is_adapted_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8)).bfloat16()
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    expected = model(x)
    add_adapters(model, AdapterConfig(**DORA, bias="lora_only"))
    found = model(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    found.float().sum().backward()
    assert all(parameter.grad is not None for _, parameter in trainable_parameters(model))


def test_norms_are_those_of_the_weight_that_the_base_has_now() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(128, 64), nn.Linear(128, 64)
    model = nn.Sequential(four_bit(first))
    add_adapters(model, AdapterConfig(**DORA))
    layer = lora_layers(model)["0"]
    assert isinstance(layer, DoRALinear)
    before = layer.norms()
    layer.base = four_bit(second)
    weight = dequantize_nf4(layer.base.nf4_weight, torch.float32)
    torch.testing.assert_close(layer.norms(), torch.linalg.vector_norm(weight, dim=1), rtol=1e-5, atol=1e-5)
    assert not torch.equal(layer.norms(), before)
