"""Full fine-tuning next to a run: every weight counted once, by component, in plans, before training, in the report."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from json_docs import documented
from transformers import AutoModelForCausalLM, FuyuConfig

from qlora_trainer.common.units import gib
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.model.modules.lm_head import quantize_head
from qlora_trainer.planning.memory_plan import plan_memory
from qlora_trainer.planning.other_ways import (
    FULL,
    LORA,
    MIXED,
    base_parameters,
    estimate_in_words,
    full_parts,
    parts_of,
    side_by_side,
)
from qlora_trainer.planning.step_memory import ADAPTERS, GRADIENTS, WORKSPACE
from qlora_trainer.runs.report.summary import next_to_full
from qlora_trainer.runs.start import start_run
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]
PLAIN_CPU = {"model": {"device": "cpu"}, "training": {"activation_checkpointing": "full"}}


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_every_weight_of_the_base_is_counted_once(
    tiny_config: Config, tiny_models: Callable[[str], Path], family: str
) -> None:
    """As transformers counts the model in 16 bits, of which ours has layers in 4 bits and adapters."""
    directory = tiny_models(family)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).num_parameters()
    run = start_run(tiny_config(model={"name": str(directory), "device": "cpu", "lm_head": "4bit"}))
    assert base_parameters(run.base.model) == theirs


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_quantized_head_is_counted_as_transformers_ties_it(is_tied: bool) -> None:
    """By the key of the whole config, whatever the part for text says."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 64}
    text = {**sizes, "tie_word_embeddings": not is_tied}
    config = FuyuConfig(**sizes, tie_word_embeddings=is_tied, text_config=text)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    counted = model.num_parameters()
    quantize_head(model, "8bit")
    assert base_parameters(model) == counted


def test_the_common_estimate_of_a_7b_is_56_gb() -> None:
    assert sum(full_parts(7 * 10**9).values()) == 56 * 10**9
    assert full_parts(7) == {"weights": 14, "gradients": 14, "adam_states": 28, "rest": 0}
    said = estimate_in_words(7_248_023_552)  # Mistral-7B-v0.3
    assert said.startswith(
        "56 GB by the common estimate, 8 bytes for each of 7B; 58.0 GB by exact count (7,248,023,552 "
    )
    assert "8 bytes for each of 135M; 1.1 GB" in estimate_in_words(134_515_008)


def test_a_plan_has_other_ways_by_component(tiny_config: Config, tiny_llama: Path) -> None:
    plan = plan_memory(ModelDirectory.open(tiny_llama), tiny_config(**PLAIN_CPU))
    ours = parts_of(plan.components)
    assert sum(ours.values()) == plan.total
    assert plan.elsewhere.keys() == {LORA, FULL, MIXED}
    weights = plan.base_parameters
    rest = ours["rest"] - plan.components[WORKSPACE]
    assert plan.elsewhere[FULL] == full_parts(weights, rest)
    assert plan.elsewhere[MIXED] == {
        "weights": 6 * weights,
        "gradients": 2 * weights,
        "adam_states": 8 * weights,
        "rest": rest,
    }
    lora = plan.elsewhere[LORA]
    assert lora["weights"] == 2 * weights + plan.components[ADAPTERS]
    assert (lora["gradients"], lora["adam_states"]) == (plan.components[GRADIENTS], ours["adam_states"])
    assert {*ours} == {*lora} == documented("qlora plan", "a way")


def test_a_run_without_a_plan_counts_what_it_holds(tiny_config: Config) -> None:
    run = start_run(tiny_config(**PLAIN_CPU))
    assert run.plan is None
    ways = next_to_full(run)
    (group,) = run.state.groups
    assert ways["this run"]["weights"] == run.base.bytes + group.data.nbytes
    assert ways["this run"]["adam_states"] == run.state.optimizer.state_bytes == 2 * ways["this run"]["gradients"]
    names = [name for name, *_ in side_by_side(ways)]
    assert names == ["", "weights", "gradients", "Adam's two states", "total"]


def test_train_shows_full_fine_tuning_next_to_the_run(
    qlora: Callable[..., tuple[int, str, str]], config_file: Path, tmp_path: Path
) -> None:
    code, _, reported = qlora("train", config_file, "training.max_steps=1", "evaluation.samples=0")
    assert code == 0, reported
    printed = " ".join(reported.replace("│", " ").replace("┃", " ").split())
    assert "Memory next to full fine-tuning" in printed
    assert not re.search(r"\d GB", printed), "one unit, GiB"
    assert f"gradients {gib(0)}" in printed
    assert "<dt>full fine-tuning</dt>" in (tmp_path / "run" / "report.html").read_text()
