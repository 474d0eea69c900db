"""Every listed family goes the whole way: load, train, stop, resume, merge; plain transformers gives the same logits.

Tiny random models of the real config classes, whose structure is what differs between families: biases, tied weights,
soft-capping, scalings, fused projections, experts. What a family's layers keep for backward is test_patches.py's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from merge_runs import merge_to
from safetensors.torch import load_file
from tiny_runs import quiet
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qlora_trainer.adapters.peft_format import read_adapter
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.merging.logits import WholeLogits, compare_logits
from qlora_trainer.merging.merge_plan import MergeInputs
from qlora_trainer.merging.merge_run import merge_run
from qlora_trainer.planning.memory_plan import plan_memory
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]
Models = Callable[[str], Path]

DENSE = [
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3", "phi3", "olmo2", "granite", "cohere"),
    *("starcoder2", "gpt_neox", "gpt2", "falcon", "falcon_grouped"),
]
EXPERTS = ["mixtral", "qwen3_moe"]
FUSED = {"gpt2": {"c_attn": ["query", "value"]}, "phi3": {"qkv_proj": ["query", "value"], "gate_up_proj": ["up"]}}
QUICK = ["llama", "phi3", "qwen3_moe"]  # a dense family, a fused one and one of experts
ROWS = [list(range(3, 45)), [9, 8, 7, 6, 5], list(range(120, 60, -2))]


def config_of(tiny_config: Config, directory: Path, output: str = "run", **adapter: Any) -> RunConfig:
    return tiny_config(
        output,
        model={"name": str(directory)},
        adapter={"rank": 4, "alpha": 8, "dropout": 0.1, **adapter},
        training={"max_steps": 3, "evaluate_every": 3, "save_every": 3},
    )


def linear_layers(directory: Path) -> set[str]:
    """The paths of every linear layer but the LM head, in transformers' own model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    head = model.get_output_embeddings()
    return {path for path, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}


@pytest.mark.parametrize(
    ("family", "fused_parts"),
    slow_but([*((family, {}) for family in DENSE + EXPERTS), *FUSED.items()], *((family, {}) for family in QUICK)),
    ids=[*DENSE, *EXPERTS, *(f"{family}_in_parts" for family in FUSED)],
)
def test_a_family_trains_resumes_and_merges_into_the_same_logits_in_plain_transformers(
    family: str, fused_parts: dict[str, list[str]], tiny_config: Config, tiny_models: Models, tmp_path: Path
) -> None:
    directory = tiny_models(family)
    whole = start_run(config_of(tiny_config, directory, "whole", fused_parts=fused_parts))
    assert whole.base.quantized_fraction == 1.0
    assert set(whole.adapted) == linear_layers(directory)
    assert whole.train(quiet)

    parts = start_run(config_of(tiny_config, directory, "parts", fused_parts=fused_parts))
    parts.train(quiet, stop_after=1)
    assert resume_run(parts.directory).train(quiet)
    of_whole, of_parts = (load_file(run.directory / "adapter" / "adapter_model.safetensors") for run in (whole, parts))
    assert of_whole.keys() == of_parts.keys()
    assert all(torch.equal(tensor, of_parts[name]) for name, tensor in of_whole.items())

    done = merge_run(parts.directory, tmp_path / "float16", base="dequantized")
    assert done.report.verification is not None
    assert done.report.verification.beyond_rounding.kl < 1e-10, "as exact for experts as for others"
    bound = 1e-2 if family in EXPERTS else 1e-5
    inputs = MergeInputs(whole.base.directory, whole.base.fingerprint, read_adapter(whole.directory / "adapter"))
    merge_to(inputs, tmp_path / "float32", dtype=torch.float32)

    trained, base = logits_of(whole.base.model.eval()), logits_of(plain_model(directory))
    assert compare_logits(trained, base).relative_error > 1e-2, "training and NF4 must matter"
    assert compare_logits(trained, logits_of(plain_model(tmp_path / "float32"))).relative_error < 1e-5
    assert compare_logits(trained, logits_of(plain_model(tmp_path / "float16"))).kl <= bound
    assert ModelDirectory.open(tmp_path / "float16").tensors.keys() == ModelDirectory.open(directory).tensors.keys()


@torch.no_grad()
def logits_of(model: Any) -> WholeLogits:
    return WholeLogits.of_rows([model(input_ids=torch.tensor([row]), use_cache=False).logits for row in ROWS])


def plain_model(directory: Path) -> Any:
    """What any user of transformers gets, in fp32, nothing missing and nothing left over."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("family", slow_but(DENSE + EXPERTS, "falcon_grouped", "gemma2", "qwen3_moe"))
def test_the_plan_of_a_family_counts_what_a_run_has(family: str, tiny_config: Config, tiny_models: Models) -> None:
    config = config_of(tiny_config, tiny_models(family))
    plan = plan_memory(ModelDirectory.open(tiny_models(family)), config)
    numbers = sum(info.numel for info in ModelDirectory.open(tiny_models(family)).tensors.values())
    assert plan.base_parameters == numbers
    assert plan.adapter_parameters > 0
    assert plan.total > plan.components["base in NF4"] > 0
