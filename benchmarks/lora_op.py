"""Measure what a decoder layer's projections keep for backward, and their time: our op against plain autograd.

    python -m benchmarks.lora_op [--tokens N] [--rank R] [--dropout P] [--dtype float32|bfloat16] [--repeats N]

The projections are those of a Llama decoder layer, in the shapes of SmolLM2-135M or with `--shape llama-8b` of
Llama-3.1-8B: q, k and v share an input, gate and up another. The plain composition is the formula in autograd over the
same frozen NF4 layer, with torch's dropout. Both run in this process on the CPU, in turns; the time is the median of
forward and backward together, its ratio the median over turns. Saved bytes count each storage once and leave
parameters out; peak bytes are the most that torch's profiler sees alive at once while the groups of projections with
the same input run forward and backward one after the other.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from qlora_kernels.lora_linear import add_lora
from qlora_trainer.adapters.layers import LoRALinear
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.weights.nf4 import quantize_weight

SHAPES = {"smollm2-135m": (576, 192, 1536), "llama-8b": (4096, 1024, 14336)}  # hidden, key and value, intermediate
Apply = Callable[[LoRALinear, Tensor], Tensor]


def plain(layer: LoRALinear, x: Tensor) -> Tensor:
    """Compute the formula as autograd sees it, operation by operation."""
    return add_lora(layer.base(x), F.dropout(x, layer.dropout), layer.lora_A.weight, layer.lora_B.weight, layer.scaling)


def ours(layer: LoRALinear, x: Tensor) -> Tensor:
    return layer(x)


def projections(shape: str, rank: int, dropout: float) -> list[list[LoRALinear]]:
    """List the layer's projections, those that share an input together."""
    hidden, key_value, intermediate = SHAPES[shape]
    sizes = [
        [(hidden, hidden), (hidden, key_value), (hidden, key_value)],
        [(hidden, hidden)],
        [(hidden, intermediate), (hidden, intermediate)],
        [(intermediate, hidden)],
    ]
    return [[projection(*size, rank, dropout) for size in group] for group in sizes]


def projection(in_features: int, out_features: int, rank: int, dropout: float) -> LoRALinear:
    base = NF4Linear(quantize_weight(torch.randn(out_features, in_features) / in_features**0.5), None)
    layer = LoRALinear(base, rank, alpha=2.0 * rank, dropout=dropout)
    nn.init.normal_(layer.lora_A.weight, std=in_features**-0.5)
    nn.init.normal_(layer.lora_B.weight, std=0.1)
    return layer


def run(groups: list[list[LoRALinear]], inputs: list[Tensor], apply: Apply) -> None:
    """Run forward and backward of every projection, one group at a time."""
    for group, x in zip(groups, inputs, strict=True):
        outputs = [apply(layer, x) for layer in group]
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


def saved_bytes(groups: list[list[LoRALinear]], inputs: list[Tensor], apply: Apply) -> int:
    """Count the bytes of the distinct storages that autograd keeps for the backward of all projections."""
    parameters = {p.untyped_storage().data_ptr() for group in groups for layer in group for p in layer.parameters()}
    kept: dict[int, Tensor] = {}  # tensors, so that no storage is freed and its address used again

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = [apply(layer, x) for group, x in zip(groups, inputs, strict=True) for layer in group]
    assert all(output.grad_fn is not None for output in outputs)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in parameters)


def peak_bytes(groups: list[list[LoRALinear]], inputs: list[Tensor], apply: Apply) -> int:
    """Count the most bytes alive at once beyond what was there before, gradients of parameters and inputs included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(groups, inputs, apply)
    alive = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()

    torch.manual_seed(0)
    groups = projections(options.shape, options.rank, options.dropout)
    dtype = getattr(torch, options.dtype)
    inputs = [
        torch.randn(options.tokens, group[0].lora_A.in_features, dtype=dtype, requires_grad=True) for group in groups
    ]
    contenders: dict[str, Apply] = {"plain": plain, "ours": ours}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.repeats + 1):
        for name, apply in contenders.items():
            started = time.perf_counter()
            run(groups, inputs, apply)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first warms up
    pairs = zip(seconds["ours"][1:], seconds["plain"][1:], strict=True)
    ratios = {"plain": 1.0, "ours": statistics.median(one / other for one, other in pairs)}
    print(
        f"{options.shape}, {options.tokens} tokens, rank {options.rank}, dropout {options.dropout}, {options.dtype}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)"
    )
    for name, apply in contenders.items():
        saved, peak = saved_bytes(groups, inputs, apply), peak_bytes(groups, inputs, apply)
        print(
            f"{name:5}  saved {saved / 2**20:8.2f} MiB a layer   peak {peak / 2**20:8.2f} MiB   "
            f"{medians[name] * 1e3:8.1f} ms   {ratios[name]:.2f} of plain"
        )


if __name__ == "__main__":
    main()
