"""Measure the merge of a large base on a small machine: time, private memory and bytes, against a copy and peft.

    python -m benchmarks.merge_7b [--size 7.4B] [--directory DIR] [--shard-size 2GB] [--skip STEP ...] [--faults]
                                  [--json]

A Llama-shaped checkpoint of random weights is made (llama_checkpoint.py), a copy of it by `qlora quantize`, and a
random rank-16 adapter on all linear layers, all of it a tensor at a time. Then, each in a process of its own, one after
the other:

- copy: the plain base's shards, read and written to another directory and flushed to the disk, file by file; the merged
  model in fp16 has as many bytes;
- arithmetic: what a merge computes, to quantize or read, dequantize, fold and cast, with the pages of the source in
  memory and nothing written;
- ours: the merge into fp16 from the plain base, and from the prequantized copy, files read back from the disk;
- logits: of eight rows of 64 tokens, of base + adapter and of the merged model, both streamed, compared; and what
  rounding alone costs, with the bound that this gives;
- with --faults, the same for a scale 5 % off, one layer's adapter missing, and one row of a weight 5 % off: what is
  beyond rounding must then be beyond the bound;
- peer: transformers loads the base in 16 bits on the CPU, peft merges and unloads, save_pretrained writes shards, which
  are flushed. It folds into the original weights, another function than the one trained, and reads nothing back.

The goal is a time of ours of at most twice that of the copy, and the arithmetic's. The source is dropped from the page
cache before each. Private memory is what no file backs, at its peak, imports and all. Where memory is short the peer is
left out, and it is said. Needs about three times the base's size on the disk; what is made of the base is kept in DIR,
by default a temporary directory, and found there again.
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
from typing import Any

import torch
from torch import Tensor

from benchmarks.llama_checkpoint import SIZES, LlamaShape, make_checkpoint
from benchmarks.private_memory import PrivatePeak
from benchmarks.processes import forget_pages, run_part
from qlora_trainer.adapters.inject import add_adapters, load_adapter_state, lora_layers
from qlora_trainer.adapters.kinds.lora_file import LoraFileConfig
from qlora_trainer.adapters.peft_format import read_adapter, write_adapter
from qlora_trainer.common.atomic import new_directory, write_text
from qlora_trainer.common.background import Background
from qlora_trainer.common.hashing import values_sha256
from qlora_trainer.common.machine import host_memory
from qlora_trainer.common.units import parse_bytes
from qlora_trainer.config.schema import AdapterConfig
from qlora_trainer.merging.fold import merge, merged_blocks
from qlora_trainer.merging.logits import compare_logits
from qlora_trainer.merging.merge_plan import MergeInputs, MergePlan, plan_merge
from qlora_trainer.merging.rounding import rounded_head, rounded_weights
from qlora_trainer.merging.streamed_model import load_streamed_model
from qlora_trainer.merging.trained_weights import trained_weights
from qlora_trainer.merging.verify import kl_bound, row_logits
from qlora_trainer.model.fingerprint import BaseFingerprint, config_identity, tensor_fingerprint
from qlora_trainer.model.forward import LossPath
from qlora_trainer.model.quantized_copy import quantize_checkpoint
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.nf4 import quantize_weight
from qlora_trainer.weights.tensors import TensorInfo

RANK, ALPHA = 16, 32.0
PLAIN, FOUR_BIT, ADAPTER, FINGERPRINT = "plain", "4bit", "adapter", "fingerprint.json"
SAMPLE = torch.arange(8 * 64).reshape(8, 64)  # token ids, below every size's vocabulary
LABELS = {
    "copy": "copy of the base",
    "arithmetic-plain": "arithmetic, plain base",
    "arithmetic-4bit": "arithmetic, 4-bit base",
    "ours-plain": "ours, plain base",
    "ours-4bit": "ours, 4-bit base",
    "logits": "logits compared",
    "logits-scale": "a scale 5 % off",
    "logits-adapter": "an adapter missing",
    "logits-row": "a row 5 % off",
    "peer": "peft, 16 bits",
}
FAULTS = {"logits-scale": "scale", "logits-adapter": "adapter", "logits-row": "row"}
CPU = torch.device("cpu")


def make_inputs(directory: Path, shape: LlamaShape, seed: int) -> None:
    """Make the base, its prequantized copy, the fingerprint of both, and an adapter, where they are not there yet."""
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / PLAIN).exists():
        make_checkpoint(directory / PLAIN, shape, seed)
    if not (directory / FOUR_BIT).exists():
        quantize_checkpoint(ModelDirectory.open(directory / PLAIN), directory / FOUR_BIT, device=CPU)
    if not (directory / FINGERPRINT).exists():
        write_text(directory / FINGERPRINT, json.dumps(make_fingerprint(directory / PLAIN).to_json()) + "\n")
    if not (directory / ADAPTER).exists():
        make_adapter(directory / PLAIN, directory / ADAPTER, seed)


def make_fingerprint(base: Path) -> BaseFingerprint:
    """Make the fingerprint as loading the base makes it, without a model."""
    tensors, dense = {}, {}
    for name, info in ModelDirectory.open(base).tensors.items():
        if _is_linear(info):
            weight = quantize_weight(info.read(), name)
            tensors[name.removesuffix(".weight")] = tensor_fingerprint(weight)
        else:
            dense[name] = values_sha256(info.read())
    config = json.loads((base / "config.json").read_text())
    return BaseFingerprint(config_identity(config), config["dtype"], tensors, dense)


def _is_linear(info: TensorInfo) -> bool:
    return "_proj." in info.name


def make_adapter(base: Path, output: Path, seed: int) -> None:
    """Make a random adapter that changes its weights by about a tenth of their size."""
    generator = torch.Generator().manual_seed(seed + 1)
    tensors = {}
    for info in ModelDirectory.open(base).tensors.values():
        if _is_linear(info):
            path = f"base_model.model.{info.name.removesuffix('.weight')}"
            rows, columns = info.shape
            for factor, shape in (("lora_A", (RANK, columns)), ("lora_B", (rows, RANK))):
                tensors[f"{path}.{factor}.weight"] = torch.empty(shape).normal_(0.0, 0.015, generator=generator)
    targets = sorted({name.split(".")[-3] for name in tensors})
    with new_directory(output) as work:
        write_adapter(work, tensors, LoraFileConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))


def merge_inputs(directory: Path, base: str) -> MergeInputs:
    fingerprint = BaseFingerprint.from_json(json.loads((directory / FINGERPRINT).read_text()))
    return MergeInputs(ModelDirectory.open(directory / base), fingerprint, read_adapter(directory / ADAPTER))


def run_step(step: str, directory: Path, max_shard_bytes: int) -> dict[str, Any]:
    """Run one step in this process: seconds, bytes written, and peak private memory."""
    kind, _, base = step.partition("-")
    base = base if base in (PLAIN, FOUR_BIT) else PLAIN
    output = directory / f"output-{step}"
    shutil.rmtree(output, ignore_errors=True)
    forget_pages([*(directory / base).iterdir(), *directory.glob("output-*/*")])
    measured: dict[str, Any] = {}
    started = time.perf_counter()
    with PrivatePeak() as memory:
        if kind == "copy":
            copy_files(directory / PLAIN, output)
        elif kind == "ours":
            merge(plan_merge(merge_inputs(directory, base), output), max_shard_bytes=max_shard_bytes)
        elif kind == "arithmetic":
            measured["seconds"] = arithmetic_seconds(plan_merge(merge_inputs(directory, base), output))
        elif kind == "logits":
            measured |= compare_streamed(directory, directory / "output-ours-plain", FAULTS.get(step, ""))
        else:
            merge_by_peft(directory, output, max_shard_bytes)
    measured = {"seconds": time.perf_counter() - started, "peak": memory.peak, "before": memory.before} | measured
    if output.exists():
        measured["bytes"] = sum(file.stat().st_size for file in output.glob("*.safetensors"))
        measured["files"] = len(list(output.glob("*.safetensors")))
    if kind != "ours" or base != PLAIN:  # whose output the logits are compared with
        shutil.rmtree(output, ignore_errors=True)
    return measured


def copy_files(source: Path, output: Path) -> None:
    output.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb") as read, (output / path.name).open("wb") as written:
            shutil.copyfileobj(read, written, 2**24)
            written.flush()
            os.fsync(written.fileno())


class _NoChecks(Background):
    """Drop what a merge checks besides: the arithmetic alone is measured."""

    def submit(self, function: Callable[..., object], *arguments: Any) -> None:
        """Do nothing."""


def arithmetic_seconds(plan: MergePlan) -> float:
    """Time the arithmetic of all tensors, each brought into memory before its time is taken."""
    total = 0.0
    for tensor in plan.tensors:
        tensor.source.read().view(torch.uint8).reshape(-1)[::4096].sum()
        started = time.perf_counter()
        for block in merged_blocks(tensor, "dequantized", CPU, _NoChecks()):
            block.to(torch.float16)
        total += time.perf_counter() - started
    return total


def compare_streamed(directory: Path, output: Path, fault: str = "") -> dict[str, float]:
    """Compute the KLs by which a merge from the plain base is verified, streamed as there.

    A fault is made in base + adapter, not in the files: it differs from the merged model as much.
    """
    inputs = merge_inputs(directory, PLAIN)
    model = load_streamed_model(inputs.base, CPU, trained_weights(inputs.base, inputs.fingerprint))
    add_adapters(model, AdapterConfig(rank=RANK, alpha=ALPHA * (1.05 if fault == "scale" else 1.0)))
    load_adapter_state(model.eval(), inputs.adapter.tensors)
    layer = list(lora_layers(model).values())[-1]
    if fault == "adapter":
        layer.lora_B.weight.data.zero_()
    elif fault == "row":
        layer.register_forward_hook(_spoil_a_row)
    reference = row_logits(model, SAMPLE.tolist(), LossPath())
    with rounded_weights(model, torch.float16):
        rounded = rounded_head(row_logits(model, SAMPLE.tolist(), LossPath()), torch.float16)
    merged = row_logits(load_streamed_model(ModelDirectory.open(output), CPU), SAMPLE.tolist(), LossPath())
    rounding = compare_logits(reference, rounded)
    return {
        "kl": compare_logits(reference, merged).kl,
        "rounding": rounding.kl,
        "beyond": compare_logits(rounded, merged).kl,
        "bound": kl_bound(rounding, is_routed=False),
    }


def _spoil_a_row(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    output[..., 3] *= 1.05
    return output


def merge_by_peft(directory: Path, output: Path, max_shard_bytes: int) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory / PLAIN, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, directory / ADAPTER).merge_and_unload()
    merged.to(torch.float16).save_pretrained(output, max_shard_size=max_shard_bytes)
    for path in output.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def measure(step: str, directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the step in a process of its own; say why it was left out, where memory is short."""
    base_bytes = sum(file.stat().st_size for file in (directory / PLAIN).glob("*.safetensors"))
    free = host_memory().available
    if step == "peer" and free < 1.2 * base_bytes + 10**9:
        reason = f"left out: it holds the base in 16 bits, {base_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        return {"left_out": reason}
    options = ("--directory", str(directory), "--shard-size", arguments.shard_size)
    return run_part("benchmarks.merge_7b", "--step", step, *options)


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Write what was measured, for people."""
    lines = [f"{'':26}{'seconds':>9}{'private peak':>14}{'written':>11}{'files':>7}{'goal':>8}{'of goal':>9}"]
    for step, found in results.items():
        if "left_out" in found:
            lines.append(f"{LABELS[step]:26} {found['left_out']}")
            continue
        written = f"{found['bytes'] / 1e9:.2f} GB" if "bytes" in found else ""
        line = f"{LABELS[step]:26}{found['seconds']:9.1f}{found['peak'] / 1e9:11.2f} GB{written:>11}"
        line += f"{found.get('files', ''):>7}"
        if goal := goal_seconds(step, results):
            line += f"{goal:8.1f}{found['seconds'] / goal:9.2f}"
        if "kl" in found:
            line += f"  KL {found['kl']:.1e}, rounding {found['rounding']:.1e}, beyond it {found['beyond']:.1e}"
            line += f" (bound {found['bound']:.1e})"
        lines.append(line)
    return lines


def goal_seconds(step: str, results: dict[str, dict[str, Any]]) -> float | None:
    """Compute the goal: twice the copy, and the arithmetic; None for what has no such goal."""
    kind, _, base = step.partition("-")
    parts = results.get("copy"), results.get(f"arithmetic-{base}")
    if kind != "ours" or None in parts:
        return None
    copy, arithmetic = (part["seconds"] for part in parts if part)
    return float(2.0 * copy + arithmetic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7.4B")
    parser.add_argument("--vocabulary", type=int, help="of the base; default: the size's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="keep what is made here; default: a temporary one")
    parser.add_argument("--shard-size", default="2GB")
    parser.add_argument("--skip", nargs="*", choices=LABELS, default=[])
    parser.add_argument("--faults", action="store_true", help="compare the logits of wrong merges too")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--step", choices=LABELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(run_step(arguments.step, arguments.directory, parse_bytes(arguments.shard_size))))
        return
    shape = SIZES[arguments.size]
    shape = dataclasses.replace(shape, vocabulary=arguments.vocabulary or shape.vocabulary)
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or Path(temporary)
        print(f"Making the base of {arguments.size} in {directory}", file=sys.stderr)
        make_inputs(directory, shape, arguments.seed)
        results = {}
        for step in LABELS:
            if step not in arguments.skip and (arguments.faults or step not in FAULTS):
                print(LABELS[step], file=sys.stderr)
                results[step] = measure(step, directory, arguments)
        shutil.rmtree(directory / "output-ours-plain", ignore_errors=True)
    print(json.dumps(results) if arguments.json else "\n".join(table(results)))


if __name__ == "__main__":
    main()
