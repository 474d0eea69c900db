"""Compare the memory plan with what really happens, on the CPU.

    python -m benchmarks.plan_against_real [--model DIRECTORY] [--json]

For each setting the second of two training steps on the longest micro-batch, three times over: planned on fake
tensors; counted by the same tracker on real tensors, of a base really loaded and quantized; and as torch's profiler
saw it, from the allocator's own events. Bytes are the peak of all that is alive. The profiler sees what is allocated
within the step, and is given the bytes that were alive before it. Exit 1 where the tracker's two counts differ at all,
or the profiler's from them by more than 1 %. Where they differ, it is probably by scratch that the CPU's
kernels of attention take for themselves; that was not traced.

The models are made here, with random weights: layers as in the families' large models, hidden sizes of 256 to 512.
Or give a directory with a real one. A plan for a card is the same plan, but for what pages and what CUDA's kernels use
inside; those no CPU can show.
"""

import argparse
import gc
import json
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_trainer.adapters.inject import add_adapters
from qlora_trainer.common.cache import user_cache
from qlora_trainer.config.load import make_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.batching.packing import Pack
from qlora_trainer.data.types import Example
from qlora_trainer.model.load import load_base_model
from qlora_trainer.planning.empty_run import empty_run, longest_pack
from qlora_trainer.planning.step_memory import persistent_tensors, track_steps
from qlora_trainer.training.memory.activations import choose_policy
from qlora_trainer.training.state import TrainState, build_state
from qlora_trainer.training.step import train_step
from qlora_trainer.weights.model_directory import ModelDirectory

LIMIT = 0.01  # of the profiler's difference
SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_wide": {
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_attention_heads": 8,
        "tie_word_embeddings": True,
    },
    "mistral": {"sliding_window": None, "head_dim": 64},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "gemma2": {"head_dim": 64, "sliding_window": 128, "query_pre_attn_scalar": 64},
    "phi3": {"sliding_window": None, "pad_token_id": 0},
}
Changes = dict[str, dict[str, Any]]
SETTINGS: list[tuple[str, Changes]] = [
    ("llama", {"training": {"activation_checkpointing": "none"}}),
    ("llama", {"training": {"activation_checkpointing": "full"}}),
    ("llama", {"training": {"activation_checkpointing": "full", "uncheckpointed_layers": 1}}),
    (
        "llama",
        {
            "training": {"activation_checkpointing": "offload", "offload_every_n_layers": 2},
            "data": {"max_length": 1024},
        },
    ),
    ("llama", {"training": {"activation_checkpointing": "tiled"}, "data": {"max_length": 2048}}),
    (
        "llama",
        {"training": {"activation_checkpointing": "none", "micro_batch_tokens": 1024}, "data": {"max_length": 256}},
    ),
    ("llama_wide", {"training": {"activation_checkpointing": "none"}, "adapter": {"dropout": 0.1}}),
    ("llama_wide", {"training": {"activation_checkpointing": "full"}, "optimizer": {"name": "adamw"}}),
    ("llama_wide", {"training": {"activation_checkpointing": "tiled"}, "adapter": {"rank": 64}}),
    ("llama_wide", {"data": {"max_length": 64}, "adapter": {"rank": 64}, "optimizer": {"name": "paged_adamw_8bit"}}),
    ("llama_wide", {"adapter": {"dtype": "bfloat16", "rank": 64}, "data": {"max_length": 64}}),
    ("qwen2", {"model": {"embeddings": "cpu", "lm_head": "4bit"}, "training": {"activation_checkpointing": "full"}}),
    ("mistral", {"training": {"activation_checkpointing": "offload"}, "optimizer": {"name": "paged_adamw_8bit"}}),
    (
        "qwen2",
        {"training": {"activation_checkpointing": "none"}, "adapter": {"target_modules": "attention", "bias": "all"}},
    ),
    ("qwen2", {"training": {"activation_checkpointing": "full"}, "data": {"packing": False}}),
    ("qwen3", {"training": {"activation_checkpointing": "full"}, "adapter": {"rank": 4, "target_modules": "mlp"}}),
    ("gemma2", {"training": {"activation_checkpointing": "full"}}),
    ("phi3", {"training": {"activation_checkpointing": "none"}, "model": {"compute_dtype": "bfloat16"}}),
]


@dataclass(frozen=True)
class Comparison:
    """Hold the peak bytes of one setting."""

    setting: str
    planned: int
    tracked: int
    profiled: int
    operation: str  # at which most is alive

    @property
    def error(self) -> float:
        """Compute the plan's error, as a share of what the profiler saw."""
        return self.planned / self.profiled - 1

    @property
    def holds(self) -> bool:
        return self.planned == self.tracked and abs(self.error) <= LIMIT


def compare(directory: Path, setting: str, changes: Changes) -> Comparison:
    """Plan the second step, take it under the tracker, and take it under the profiler."""
    config = config_for(directory, changes)
    dtype = getattr(torch, config.model.compute_dtype)
    state, pack, fake = empty_run(
        ModelDirectory.open(directory), config, dtype, choose_policy(config.training, torch.device("cpu"))
    )
    with fake:
        planned, _ = track_steps(state, pack)
    del state
    tracked, _ = track_steps(*real_run(directory, config))
    return Comparison(
        setting=setting,
        planned=planned.peak.bytes,
        tracked=tracked.peak.bytes,
        profiled=profiled_peak(*real_run(directory, config)),
        operation=planned.peak.operation,
    )


def config_for(directory: Path, changes: Changes) -> RunConfig:
    raw: dict[str, dict[str, Any]] = {
        "model": {"name": str(directory), "device": "cpu", "compute_dtype": "float32"},
        "adapter": {"rank": 16},
        "data": {"train": "rows.jsonl", "max_length": 512},
        "training": {"global_batch_size": 4},
    }
    return make_config({name: raw.get(name, {}) | changes.get(name, {}) for name in raw | changes})


def real_run(directory: Path, config: RunConfig) -> tuple[TrainState, Pack]:
    """Build a run before its first step, from the weights on disk, and its longest micro-batch."""
    model = ModelDirectory.open(directory)
    base = load_base_model(model, config.model, user_cache())
    torch.manual_seed(0)
    add_adapters(base.model, config.adapter, config.training.seed)
    rows = [Example([1], [1])] * config.training.global_batch_size
    policy = choose_policy(config.training, base.device)
    state = build_state(base.model, config, rows, base.compute_dtype, policy)
    state.total_steps = max(state.total_steps, 2)
    return state, longest_pack(model, config, state.loader.packing)


def profiled_peak(state: TrainState, pack: Pack) -> int:
    """Count the most bytes alive in the second step: those before it, and the allocator's events in it."""
    state.model.train()
    train_step(state, [pack])
    persistent = [tensor for tensors in persistent_tensors(state, on_cuda=False).values() for tensor in tensors]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*persistent, *tensors_of(pack)]}
    gc.collect()  # or what was left over before would be freed in the step
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_step(state, [pack])
    alive = most = sum(storages.values())
    for event in profiler.profiler.kineto_results.events():  # in the order of time
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


def tensors_of(pack: Pack) -> list[torch.Tensor]:
    return [pack.input_ids, pack.labels, pack.position_ids]


def make_model(directory: Path, family: str) -> Path:
    """Make a model of the family with random weights; nothing is made twice."""
    if not directory.exists():
        raw = {"model_type": family, **SHAPE, **FAMILIES[family]}
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw)).to(torch.bfloat16).save_pretrained(directory)
    return directory


def name_of(family: str, changes: Changes) -> str:
    said = {key: value for options in changes.values() for key, value in options.items()}
    return ", ".join(
        [family, *(str(v) if k in ("activation_checkpointing", "name") else f"{k}={v}" for k, v in said.items())]
    )


def print_table(results: list[Comparison]) -> None:
    print(f"{'peak bytes of a step':<64}{'planned':>14}{'tracker, real':>15}{'profiler':>14}{'plan - profiler':>24}")
    for result in results:
        error = f"{result.planned - result.profiled:+,} ({result.error:+.2%})"
        numbers = f"{result.planned:>14,}{result.tracked:>15,}{result.profiled:>14,}{error:>24}"
        print(f"{result.setting:<64}{numbers}{'' if result.holds else '  DIFFERS'}")
    worst = max(abs(result.error) for result in results)
    equal = sum(result.planned == result.tracked for result in results)
    print(f"tracker: equal in {equal} of {len(results)} settings; profiler: {worst:.2%} at most (limit {LIMIT:.0%})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model directory to take in all settings, instead of those made")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # of libraries, about their own future
    torch.set_num_threads(1)  # of several, each would take scratch of its own
    results = []
    with tempfile.TemporaryDirectory() as work:
        for family, changes in SETTINGS:
            directory = options.model or make_model(Path(work) / family, family)
            results.append(compare(directory, name_of(options.model or family, changes), changes))
            print(f"{len(results)} of {len(SETTINGS)} settings", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps([vars(result) | {"holds": result.holds} for result in results], indent=2))
    else:
        print_table(results)
    return 0 if all(result.holds for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
