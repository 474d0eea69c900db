"""Measure what a training step costs with a kind of adapter next to LoRA's, in turns.

    python -m benchmarks.kinds_in_turns [--kinds KIND ...] [--policies POLICY ...] [--hidden N] [--tokens N] [--turns N]

Two decoder layers of Llama-3.1-8B's shape (hidden size 4096, or the same proportions at --hidden), their base in NF4,
adapters of rank 16 on all linear layers, fp32 on the CPU. A step is the gradient of one row of --tokens tokens, and
the update. The kinds take turns within each policy of activation checkpointing; times are the processor's over all
threads, which other work on the machine changes little: medians, and medians of each turn's ratio to LoRA's.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.llama_checkpoint import make_checkpoint
from benchmarks.mixed_adapters import VOCABULARY, shape_of
from qlora_trainer.adapters.inject import add_adapters
from qlora_trainer.config.load import make_config
from qlora_trainer.data.batching.packing import make_packs
from qlora_trainer.data.types import Example
from qlora_trainer.model.load import load_base_model
from qlora_trainer.training.memory.activations import choose_policy
from qlora_trainer.training.state import build_state
from qlora_trainer.training.step import train_step
from qlora_trainer.weights.model_directory import ModelDirectory

LORA = "lora"


def step_of(directory: Path, kind: str, policy: str, tokens: int) -> Callable[[], Any]:
    """Load the base with adapters of a kind, and return what takes a step."""
    config = make_config(
        {
            "model": {"name": str(directory), "device": "cpu", "compute_dtype": "float32"},
            "adapter": {"kind": kind},
            "data": {"train": "rows.jsonl", "max_length": tokens},
            "training": {
                "activation_checkpointing": policy,
                "micro_batch_tokens": tokens,
                "global_batch_size": 1,
                "max_steps": 1000,
            },
        }
    )
    base = load_base_model(ModelDirectory.open(directory), config.model, directory.parent / "cache")
    add_adapters(base.model, config.adapter, config.training.seed)
    ids = torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [Example(ids, ids)]
    kept = choose_policy(config.training, base.device)
    state = build_state(base.model, config, rows, base.compute_dtype, kept)
    packs = make_packs(rows, tokens, packing=True)
    state.model.train()
    return lambda: train_step(state, packs)


def in_turns(steps: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Take steps in turns; returns the processor's seconds of each turn but the first."""
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(turns + 1):
        for kind, step in steps.items():
            began = time.process_time()
            step()
            seconds[kind].append(time.process_time() - began)
    return {kind: taken[1:] for kind, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["dora"], help="next to lora")
    parser.add_argument("--policies", nargs="+", default=["full", "none"])
    parser.add_argument("--hidden", type=int, default=4096, help="a multiple of 512")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        directory = make_checkpoint(Path(work) / "model", shape_of(options.hidden))
        print(
            f"2 decoder layers of hidden size {options.hidden}, {options.tokens} tokens a step, fp32, "
            f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)"
        )
        for policy in options.policies:
            steps = {kind: step_of(directory, kind, policy, options.tokens) for kind in (LORA, *options.kinds)}
            seconds = in_turns(steps, options.turns)
            for kind, taken in seconds.items():
                ratio = statistics.median(one / other for one, other in zip(taken, seconds[LORA], strict=True))
                print(f"{policy:8}{kind:12}{statistics.median(taken):8.2f} s{ratio:8.2f} of LoRA", flush=True)


if __name__ == "__main__":
    main()
