"""Measure the loading of a large base on a small machine: time and private memory, against transformers.

    python -m benchmarks.load_7b [--size 7.4B] [--directory DIR] [--step [plain] [kept]] [--starts NAME ...]
                                 [--skip NAME ...] [--json]

A Llama-shaped checkpoint of random weights is made (llama_checkpoint.py; 14.8 GB in bf16, eight shards). Then, each in
a process of its own, one after the other:

- ours: `load_base_model`, from the 16-bit shards to the frozen NF4 base with its fingerprint, in fp32 where it stays
  dense; and once more, when its files are known and not hashed again;
- peer: transformers' from_pretrained with bitsandbytes' NF4 and double quantization, which is left in bf16 where it
  stays dense and hashes nothing;
- quantize: `qlora quantize`, with what it writes read back from the disk;
- kept: `load_base_model` of what that wrote, mapped and hashed, and once more, when it is known; and the peer's loading
  of the same, for which it was not written;
- with --step: one optimizer step of 512 tokens, rank 16 on all linear layers, layers recomputed, model.embeddings=cpu
  (in the checkpoint's dtype, with the same results), on the base from the 16-bit shards (plain) or from what was kept;
- with --starts: `qlora quantize --init`, rank 16.

The source is dropped from the page cache before each, as far as the system does that. Libraries are imported before
time is taken; private memory is what no file backs, at its peak, imports and all. The goals: a sixth of the peer's
time, and a peak of the 4-bit model, its largest tensor and 1 GB. DIR keeps what is made, and is found there again; by
default it is a temporary directory. Needs 1.3 times the checkpoint on the disk.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.llama_checkpoint import SIZES, make_checkpoint
from benchmarks.private_memory import PrivatePeak
from benchmarks.processes import forget_pages, run_part
from qlora_trainer.adapters.inject import add_adapters
from qlora_trainer.common.process_memory import return_freed_memory
from qlora_trainer.config.load import make_config
from qlora_trainer.config.schema import AdapterConfig, ModelConfig, RunConfig
from qlora_trainer.data.batching.packing import make_packs
from qlora_trainer.data.types import Example
from qlora_trainer.model.load import Base, load_base_model
from qlora_trainer.model.quantized_copy import quantize_checkpoint
from qlora_trainer.runs.base_start import quantize_with_start
from qlora_trainer.training.memory.activations import choose_policy
from qlora_trainer.training.state import build_state
from qlora_trainer.training.step import train_step
from qlora_trainer.weights.model_directory import ModelDirectory

PLAIN, KEPT = "plain", "kept"
CACHE = "cache"  # of what is known of bases
LABELS = {
    "ours": "ours, 16-bit shards",
    "again": "ours, shards known",
    "peer": "transformers + bitsandbytes",
    "quantize": "qlora quantize",
    "ours-kept": "ours, kept in 4 bits",
    "again-kept": "ours, kept and known",
    "peer-kept": "transformers, kept in 4 bits",
    "step-plain": "a step of 512 tokens",
    "step-kept": "a step, base kept in 4 bits",
    "start-olora": "qlora quantize --init olora",
    "start-pissa": "qlora quantize --init pissa",
    "start-loftq": "qlora quantize --init loftq",
}
TOKENS, RANK = 512, 16
SPEEDUP, SPARE = 6, 10**9  # the goals
STEP_PEAK = 7 * 10**9


def measure_here(name: str, directory: Path) -> dict[str, Any]:
    """Measure one of LABELS in this process: seconds, peak private bytes, and what else there is to say."""
    kind, _, source = name.partition("-")
    forget_pages(directory.glob("*/*.safetensors"))
    with PrivatePeak() as memory:
        started = time.perf_counter()
        found = MEASURED[kind](directory, source or PLAIN)
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak": memory.peak, "before": memory.before} | found


def load_ours(directory: Path, source: str) -> dict[str, Any]:
    """Load a base of which nothing is known."""
    shutil.rmtree(directory / CACHE, ignore_errors=True)
    return load_again(directory, source)


def load_again(directory: Path, source: str) -> dict[str, Any]:
    """Load a base that was loaded just before."""
    base = open_base(directory / source)
    largest = max(info.nbytes for info in base.directory.tensors.values())
    return {"model": base.bytes, "goal_peak": base.bytes + largest + SPARE}


def load_peer(directory: Path, source: str) -> dict[str, Any]:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    options = {"quantization_config": quantization} if source == PLAIN else {}
    model = AutoModelForCausalLM.from_pretrained(
        directory / source, dtype=torch.bfloat16, device_map={"": "cpu"}, **options
    )
    return {"model": model.get_memory_footprint()}


def quantize(directory: Path, source: str) -> dict[str, Any]:
    shutil.rmtree(directory / KEPT, ignore_errors=True)
    report = quantize_checkpoint(ModelDirectory.open(directory / source), directory / KEPT, device=torch.device("cpu"))
    return {"written": report.bytes}


def quantize_start(directory: Path, source: str) -> dict[str, Any]:
    """Take a start out of the base; the goal is the memory that loading it may take."""
    output, model = directory / f"start-{source}", ModelDirectory.open(directory / PLAIN)
    shutil.rmtree(output, ignore_errors=True)
    settings = AdapterConfig.model_validate({"init": source, "rank": RANK, "alpha": 2 * RANK})
    report = quantize_with_start(model, output, settings, name=str(model.path), device=torch.device("cpu"))
    largest = max(info.nbytes for info in model.tensors.values())
    return {"written": report.bytes, "goal_peak": report.bytes + largest + SPARE}


def take_step(directory: Path, source: str) -> dict[str, Any]:
    """Load, train one step, and report the step alone; the peak is of all."""
    config = step_config(directory / source)
    base = open_base(directory / source, "cpu")
    return_freed_memory()  # as a run does with a large base
    started = time.perf_counter()
    add_adapters(base.model, config.adapter, config.training.seed)
    ids = torch.randint(0, base.model.config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    row = Example(ids, ids)
    state = build_state(base.model, config, [row], base.compute_dtype, choose_policy(config.training, base.device))
    base.model.train()
    metrics = train_step(state, make_packs([row], TOKENS, packing=True))
    return {"step_seconds": time.perf_counter() - started, "loss": metrics["loss"], "goal_peak": STEP_PEAK}


MEASURED: dict[str, Callable[[Path, str], dict[str, Any]]] = {
    "ours": load_ours,
    "again": load_again,
    "peer": load_peer,
    "quantize": quantize,
    "step": take_step,
    "start": quantize_start,
}


def open_base(directory: Path, embeddings: Literal["device", "cpu"] = "device") -> Base:
    def progress(label: str, done: int, total: int | None) -> None:
        if sys.stderr.isatty():
            print(f"\r{label}: {done / (total or 1):.0%}  ", end="", file=sys.stderr)

    settings = ModelConfig(name=str(directory), device="cpu", embeddings=embeddings)
    return load_base_model(ModelDirectory.open(directory), settings, directory.parent / CACHE, progress)


def step_config(directory: Path) -> RunConfig:
    return make_config(
        {
            "model": {"name": str(directory), "device": "cpu", "embeddings": "cpu"},
            "adapter": {"rank": RANK},
            "data": {"train": "rows.jsonl", "max_length": TOKENS},
            "training": {"global_batch_size": 1, "max_steps": 1, "activation_checkpointing": "full"},
        }
    )


def measure(name: str, directory: Path) -> dict[str, Any]:
    """Call `measure_here` in a process of its own."""
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # as `qlora` sets it: threads that wait do not spin
    return run_part("benchmarks.load_7b", "--run", name, "--directory", str(directory), environment=env)


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Write what was measured, for people."""
    lines = [f"{'':30}{'seconds':>9}{'private peak':>15}{'goal':>11}{'before':>11}  "]
    for name, found in results.items():
        goal = f"{found['goal_peak'] / 1e9:.2f} GB" if "goal_peak" in found else ""
        line = f"{LABELS[name]:30}{found['seconds']:9.1f}{found['peak'] / 1e9:12.2f} GB{goal:>11}"
        line += f"{found['before'] / 1e9:8.2f} GB"
        line += f"  model {found['model'] / 1e9:.2f} GB" if "model" in found else ""
        line += f"  written {found['written'] / 1e9:.2f} GB" if "written" in found else ""
        line += f"  the step {found['step_seconds']:.1f} s, loss {found['loss']:.3f}" if "loss" in found else ""
        lines.append(line)
    for ours, peer in (("ours", "peer"), ("ours-kept", "peer-kept"), ("again-kept", "peer-kept")):
        if ours in results and peer in results:
            ratio = results[peer]["seconds"] / results[ours]["seconds"]
            goal = f" (goal: {SPEEDUP})" if ours == "ours" else ""
            lines.append(f"{LABELS[ours]}: {ratio:.1f} times as fast as {LABELS[peer]}{goal}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7.4B")
    parser.add_argument("--vocabulary", type=int, help="of the base; default: the size's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="keep what is made here; default: a temporary one")
    parser.add_argument("--step", nargs="*", choices=(PLAIN, KEPT), help="take an optimizer step; plain by default")
    parser.add_argument("--starts", nargs="*", choices=("olora", "pissa", "loftq"), default=[], help="take these out")
    parser.add_argument("--skip", nargs="*", choices=LABELS, default=[])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--run", choices=LABELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(measure_here(arguments.run, arguments.directory)))
        return
    steps = [] if arguments.step is None else arguments.step or [PLAIN]
    asked = {*(f"step-{base}" for base in steps), *(f"start-{start}" for start in arguments.starts)}
    wanted = [name for name in LABELS if not name.startswith(("step-", "start-")) or name in asked]
    shape = SIZES[arguments.size]
    shape = dataclasses.replace(shape, vocabulary=arguments.vocabulary or shape.vocabulary)
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / PLAIN).exists():
            print(f"Making a checkpoint of {arguments.size} in {directory}", file=sys.stderr)
            make_checkpoint(directory / PLAIN, shape, arguments.seed)
        results = {}
        for name in wanted:
            if name not in arguments.skip:
                print(LABELS[name], file=sys.stderr)
                results[name] = measure(name, directory)
    print(json.dumps(results) if arguments.json else "\n".join(table(results)))


if __name__ == "__main__":
    main()
