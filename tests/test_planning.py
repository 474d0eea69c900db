"""The plan's promises: it is the step itself, it counts as real memory counts, and it says what fits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig

from qlora_trainer import forward, planning
from qlora_trainer.config import RunConfig, load_config, make_config
from qlora_trainer.errors import InsufficientMemoryError
from qlora_trainer.planning import empty_run, longest_pack, plan_memory, track_steps
from qlora_trainer.runs import start_run

Config = Callable[..., RunConfig]
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
SETTINGS: list[dict[str, dict[str, Any]]] = [
    {"training": {"activations": "keep"}},
    {"training": {"activations": "recompute"}},
    {"training": {"activations": "recompute", "micro_batch_tokens": 256}, "adapter": {"rank": 16}},
    {"training": {"activations": "keep"}, "data": {"max_length": 256}, "adapter": {"dropout": 0.1}},
    {"training": {"activations": "recompute"}, "data": {"max_length": 512}, "optimizer": {"name": "adamw"}},
    {"training": {"activations": "keep"}, "adapter": {"rank": 32}, "optimizer": {"name": "paged_adamw_8bit"}},
    {"training": {"activations": "keep"}, "adapter": {"targets": ["q_proj", "v_proj"], "bias": "all"}},
]


FAMILIES = ["llama_tied", "mistral", "gemma2", "gemma3", "qwen2", "phi3"]
COMPARED = [("llama", setting) for setting in SETTINGS] + [(family, SETTINGS[1]) for family in FAMILIES]


@pytest.mark.parametrize(("family", "changes"), COMPARED, ids=str)
def test_fake_and_real_steps_take_the_same_bytes(
    tiny_config: Config, tiny_models: Callable[[str], Path], family: str, changes: dict[str, Any]
) -> None:
    directory = tiny_models(family)
    config = tiny_config(**changes, model={"name": str(directory)})
    policy: Any = config.training.activations
    state, pack, fake = empty_run(directory, config, torch.float32, policy)
    with fake:
        planned, _ = track_steps(state, pack, on_cuda=False)

    real = start_run(config).state
    real_pack = longest_pack(directory, config, real.loader.packing)
    measured, _ = track_steps(real, real_pack, on_cuda=False)
    assert planned.peak == measured.peak
    assert [event.bytes for event in planned.trace] == [event.bytes for event in measured.trace]
