"""Measure on a GPU: tokens a second and peak memory of ours and its peers, and our kernels against the card's best.

    python -m benchmarks.gpu [MODEL ROWS] [--steps N] [--batch-size N] [--rank R] [--without NAME ...] [--dry-run]

With a model and rows: ours at its defaults; peft + bitsandbytes as their documentation shows them, under bf16 autocast;
and Unsloth where it is installed. Each in a process of its own, on the same rows in the same steps. Ours and
peft + bitsandbytes start from the same adapter; their losses are shown side by side, and no equality is asked of bf16.
Useful tokens leave padding out; the first step, which warms up, is left out. Peak memory is what torch reserved from
the first step on; what an optimizer pages is not in it, for anyone.

Always: each kernel on a layer's tensors of a 7B, and what it replaces, in bytes a second of the card's own copying,
and the projection over a 4-bit weight in FLOP/s of the card's own bf16 product. The kernels' bytes are counted
(benchmarks.kernels). The time is the card's alone, by CUDA events: the card sleeps until all calls are launched, since
launching one from Python takes longer than a fast kernel; and calls take copies of their inputs in turn, as many as no
cache holds, since a weight that was just read is read again from the cache.

`--dry-run` needs no GPU: the same tables on fake tensors, memory as planned, times as computed for an RTX 4090. The
other trainers have not been compared on a GPU yet; docs/benchmarks.md says what has run there.
"""

import argparse
import functools
import importlib.util
import json
import math
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import kernels
from benchmarks.contenders import MAX_LENGTH, ON_GPU, Job, Result
from benchmarks.cpu_training import child_environment, measure, rate
from benchmarks.kernels import Work
from qlora_kernels.lora_linear import nf4_linear
from qlora_kernels.nf4 import NF4Weight
from qlora_kernels.torch_internals import FakeTensorMode, leaves, sleep_on_device

ROUNDS, WARM_UP = 10, 3  # the first compile and warm up
MOST_COPIES = 32  # the launches of a round must fit the queue of a card, about a thousand
SLEEPS = [2_000_000 * 4**i for i in range(5)]  # clock cycles, a millisecond and more: the shortest that hides launching
Calls = Sequence[Callable[[], Any]]
ASSUMED = kernels.CARDS["RTX 4090"]  # of a dry run


@dataclass(frozen=True)
class Roofs:
    """Hold what a card does at best."""

    name: str
    bandwidth: float  # bytes a second
    flops: float  # a second, bf16


@dataclass(frozen=True)
class Line:
    """Hold one line of the kernels' table."""

    name: str
    seconds: float
    bytes: int = 0
    flops: int = 0

    def share(self, roofs: Roofs) -> float:
        """Compute the share of what the card does at best."""
        return max(self.bytes / roofs.bandwidth, self.flops / roofs.flops) / self.seconds


def seconds_of(work: Work, device: str) -> float:
    """Time a computation on random tensors, or its backward, none of them in the card's cache: the median."""
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in work.inputs)
    copies = [
        [_random(shape, dtype, device) for shape, dtype in work.inputs]
        for _ in range(copies_beyond(card_cache(), size))
    ]
    for tensors in copies:
        for tensor in tensors[: work.gradients]:
            tensor.requires_grad_()

    def forward(tensors: list[Tensor]) -> None:
        with torch.no_grad():
            work.function(*tensors)

    def prepared() -> Calls:
        if not work.gradients:
            return [functools.partial(forward, tensors) for tensors in copies]
        calls = []
        for tensors in copies:
            outputs = [tensor for tensor in leaves(work.function(*tensors)) if tensor.requires_grad]
            grads = [torch.ones_like(output) for output in outputs]
            for tensor in tensors:
                tensor.grad = None
            calls.append(functools.partial(torch.autograd.backward, outputs, grads))
        return calls

    return median_seconds(prepared)


def card_cache() -> int:
    """Return the bytes of the card's largest cache."""
    return torch.cuda.get_device_properties("cuda").L2_cache_size


def copies_beyond(cache: int, size: int) -> int:
    """Count copies of inputs of `size` bytes, so many that between two uses of one the others fill the cache twice."""
    return min(1 + math.ceil(2 * cache / size), MOST_COPIES)


def median_seconds(prepared: Callable[[], Calls]) -> float:
    """Take the median over rounds of the card's time for a call; calls are made anew, so backward can be one."""
    for _ in range(WARM_UP):
        for call in prepared():
            call()
    return statistics.median(_seconds_a_call(prepared) for _ in range(ROUNDS))


def _seconds_a_call(prepared: Callable[[], Calls]) -> float:
    """Divide the card's time for a round's calls by their number. It sleeps while the processor launches them."""
    for cycles in SLEEPS:
        calls = prepared()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        sleep_on_device(cycles)
        begin.record()
        for call in calls:
            call()
        end.record()
        is_hidden = not begin.query()  # the card has not come to the first call yet
        end.synchronize()
        if is_hidden:
            break
    else:
        warnings.warn(
            "The card was not kept waiting while calls were launched: launching is in the time.", stacklevel=2
        )
    return begin.elapsed_time(end) / 1e3 / len(calls)


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    if dtype == torch.uint8:
        return torch.randint(256, shape, dtype=dtype, device=device)
    return torch.randn(shape, dtype=dtype, device=device)


def works() -> dict[str, tuple[Work, int, int]]:
    """List computations by name, with the bytes that each moves and its arithmetic. One of the two is the bound."""
    found = {}
    for name, operation in kernels.operations().items():
        for which, work in {"ours": operation.ours, **operation.others}.items():
            found[f"{name}: {which}"] = work, work.moved().bytes, 0
    tokens, wide = kernels.TOKENS, kernels.INTERMEDIATE
    shape = (kernels.HIDDEN, wide)
    weight = kernels.nf4_inputs(*shape)

    def projection(x: Tensor, *tables: Tensor) -> Tensor:
        return nf4_linear(x, NF4Weight(*tables, shape=shape), None)  # type: ignore[arg-type, misc]

    flops = 2 * tokens * wide * kernels.HIDDEN
    found["a projection over NF4"] = Work(projection, [((tokens, wide), torch.bfloat16), *weight]), 0, flops
    dense = Work(F.linear, [((tokens, wide), torch.bfloat16), (shape, torch.bfloat16)])
    found["the same over 16 bits"] = dense, 0, flops
    return found


def roofs_here() -> Roofs:
    """Measure the card's own copying and its own product of large matrices."""
    copy = Work(torch.clone, [((2**28,), torch.bfloat16)])
    side = 8192
    product = Work(torch.matmul, [((side, side), torch.bfloat16)] * 2)
    return Roofs(
        name=torch.cuda.get_device_name(),
        bandwidth=2 * 2 * 2**28 / seconds_of(copy, "cuda"),
        flops=2 * side**3 / seconds_of(product, "cuda"),
    )


def kernel_lines(is_dry: bool) -> tuple[Roofs, list[Line]]:
    if not is_dry:
        roofs = roofs_here()
        return roofs, [
            Line(name, seconds_of(work, "cuda"), moved, flops) for name, (work, moved, flops) in works().items()
        ]
    roofs = Roofs("RTX 4090, computed", ASSUMED.bandwidth, ASSUMED.flops)
    lines = []
    for name, (work, moved, flops) in works().items():
        with FakeTensorMode():  # every function is run, and no number
            work.function(*(torch.empty(shape, dtype=dtype) for shape, dtype in work.inputs))
        lines.append(Line(name, max(moved / roofs.bandwidth, flops / roofs.flops), moved, flops))
    return roofs, lines


def print_kernels(roofs: Roofs, lines: list[Line]) -> None:
    print(f"{roofs.name}: {roofs.bandwidth / 1e9:,.0f} GB/s, {roofs.flops / 1e12:.0f} bf16 TFLOP/s\n")
    print(f"{'kernel':52}{'microseconds':>14}{'GB/s':>10}{'TFLOP/s':>10}{'of the card':>13}")
    for line in lines:
        moved = f"{line.bytes / line.seconds / 1e9:,.0f}" if line.bytes else ""
        flops = f"{line.flops / line.seconds / 1e12:.0f}" if line.flops else ""
        print(f"{line.name:52}{line.seconds * 1e6:>14,.0f}{moved:>10}{flops:>10}{line.share(roofs):>13.0%}")


def contenders(without: list[str]) -> list[str]:
    """Choose whom to measure."""
    names = [name for name in ON_GPU if name not in without]
    if "Unsloth" in names and importlib.util.find_spec("unsloth") is None:
        print("Unsloth is left out: it is not installed here.")
        names.remove("Unsloth")
    return names


def train(job: Job, names: list[str]) -> dict[str, Result | None]:
    """Run each contender; None where it failed, which `measure` has reported."""
    environment = child_environment(torch.get_num_threads(), "default")
    results: dict[str, Result | None] = {}
    for name in names:
        results[name] = measure(name, job, sys.executable, environment)
        if name == "ours" and results[name] is None:
            break  # the others read what it writes
    return results


def print_training(results: Mapping[str, Result | None]) -> None:
    print(f"{'':20}{'useful tokens/s':>17}{'with padding':>14}{'peak GiB':>10}   losses")
    for name, result in results.items():
        if result is None:
            print(f"{name:20}failed")
            continue
        useful, computed = rate(result.tokens, result.seconds), rate(result.computed_tokens, result.seconds)
        losses = " ".join(f"{loss:.3f}" for loss in result.losses)
        print(f"{name:20}{useful:>17,.0f}{computed:>14,.0f}{result.peak_bytes / 2**30:>10.2f}   {losses}")
        print(f"{'':20}{result.settings}")


def planned(model: Path, rank: int) -> dict[str, int]:
    """Plan the bytes that a step of one row of MAX_LENGTH tokens reserves."""
    from benchmarks.peer_memory import plan_peer
    from qlora_trainer.config.load import make_config
    from qlora_trainer.planning.memory_plan import plan_memory
    from qlora_trainer.weights.model_directory import ModelDirectory

    raw: dict[str, Any] = {
        "model": {"name": str(model)},
        "adapter": {"rank": rank},
        "data": {"train": "rows.jsonl", "max_length": MAX_LENGTH},
        "training": {"activation_checkpointing": "full"},
    }
    ours = plan_memory(ModelDirectory.open(model), make_config(raw))
    peer = plan_peer(model, MAX_LENGTH, rank, prepared=True)
    return {"ours": ours.reserved, "hand-written loop": peer.reserved}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="directory of safetensors")
    parser.add_argument("rows", nargs="?", type=Path, help="a file of rows that the trainer reads")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps, the first of them to warm up")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of a step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--without", nargs="*", default=[], choices=[name for name in ON_GPU if name != "ours"])
    parser.add_argument("--dry-run", action="store_true", help="on fake tensors, without a GPU")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first step is left out")
    if not options.dry_run and not torch.cuda.is_available():
        print("There is no CUDA device here. --dry-run walks through all of this on fake tensors.", file=sys.stderr)
        return 2
    if options.dry_run:
        print("Dry run: nothing below was measured.\n")
    print_kernels(*kernel_lines(options.dry_run))
    if options.model is None:
        return 0
    names = contenders(options.without)
    if options.dry_run:
        reserved = planned(options.model, options.rank)
        print(f"\nGiB reserved by a step of a row of {MAX_LENGTH:,} tokens, planned")
        for name in names:
            print(f"{name:20}{reserved[name] / 2**30:8.2f}" if name in reserved else f"{name:20}  no plan")
        return 0
    if options.rows is None:
        parser.error("a model needs rows to train on")
    with tempfile.TemporaryDirectory() as work:
        job = Job(
            str(options.model),
            str(options.rows.resolve()),
            options.steps,
            options.batch_size,
            options.rank,
            work,
            device="cuda",
        )
        results = train(job, names)
    print(f"\n{options.steps} steps of {options.batch_size} rows, rank {options.rank} on all linear layers")
    print_training(results)
    print(json.dumps({name: vars(result) for name, result in results.items() if result}), file=sys.stderr)
    return 1 if None in results.values() else 0


if __name__ == "__main__":
    sys.exit(main())
