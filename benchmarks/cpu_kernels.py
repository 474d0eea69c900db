"""Measure what computes on a CPU against what it replaces: NF4 in elements a second, dense products in FLOP/s.

    python -m benchmarks.cpu_kernels [--rows 4096] [--columns 14336] [--tokens 1024] [--repeats 7]

NF4 of a bf16 weight, quantized, and dequantized to fp32: our compiled code, the plain torch that is its contract, and
bitsandbytes on a CPU, each into new memory; ours also into memory that is there, as training does it. Ours must give
the bits of both, or the command fails. Then fp32 products of tokens with a weight: by the library that we take here and
by torch's own, with their errors against fp64. Times are medians; threads are torch's.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kernels import nf4_reference, products
from qlora_kernels.nf4 import NF4Weight, dequantize_nf4, dequantized_blocks, quantize_nf4
from qlora_trainer.runs.resume_rules import cpu_name
from qlora_trainer.weights.nf4 import load_bitsandbytes

SHAPES = [(576, 1536), (4096, 4096), (4096, 11008), (4096, 16), (16, 4096)]  # in and out features


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Return the median time; the first call warms up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def plain_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    packed, maxima = (
        torch.empty(weight.numel() // 2, dtype=torch.uint8),
        torch.empty(weight.numel() // nf4_reference.BLOCK_SIZE),
    )
    nf4_reference.quantize_torch(weight.view(-1), packed, maxima)
    return packed, maxima


def our_values(weight: NF4Weight, out: Tensor) -> Tensor:
    ((_, values),) = dequantized_blocks(dataclasses.replace(weight, workspace=out.view(-1)), out.dtype)
    return values


def plain_values(weight: NF4Weight, out: Tensor) -> Tensor:
    tables = (weight.packed, weight.absmax, weight.nested_absmax, weight.nested_code, weight.offset)
    nf4_reference.dequantize_torch(*tables, 0, weight.block_size, weight.nested_block_size, out)
    return out


def measure_nf4(rows: int, columns: int, repeats: int) -> bool:
    """Print a line a contender; returns whether all bits agree."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed, state = load_bitsandbytes().functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    state.dtype = torch.float32  # what it gives back
    ours, out = quantize_nf4(weight), torch.empty(rows, columns)
    quantizing: dict[str, Callable[[], Any]] = {
        "ours": lambda: quantize_nf4(weight),
        "plain torch, codes alone": lambda: plain_codes(weight),
        "bitsandbytes": lambda: load_bitsandbytes().functional.quantize_4bit(
            weight, compress_statistics=True, quant_type="nf4"
        ),
    }
    dequantizing: dict[str, Callable[[], Any]] = {
        "ours": lambda: dequantize_nf4(ours, torch.float32),
        "plain torch": lambda: plain_values(ours, torch.empty(rows, columns)),
        "bitsandbytes": lambda: load_bitsandbytes().functional.dequantize_4bit(packed, state),
        "ours, in its workspace": lambda: our_values(ours, out),
    }
    for direction, contenders in (("quantized", quantizing), ("dequantized to fp32", dequantizing)):
        print(f"NF4, {rows} x {columns}, {direction}: G elements a second")
        rates = {name: weight.numel() / seconds(function, repeats) / 1e9 for name, function in contenders.items()}
        for name, rate in rates.items():
            print(f"  {name:26}{rate:8.3f}{rate / rates['ours']:8.3f} times ours")
    return (
        torch.equal(ours.packed, packed.view(-1))
        and torch.equal(ours.packed, plain_codes(weight)[0])
        and torch.equal(ours.absmax, state.absmax)
        and torch.equal(ours.nested_absmax, state.state2.absmax)
        and torch.equal(dequantize_nf4(ours, torch.float32), plain_values(ours, out))
        and torch.equal(plain_values(ours, out), load_bitsandbytes().functional.dequantize_4bit(packed, state))
    )


def measure_products(tokens: int, repeats: int) -> None:
    taken = products.fastest_on_cpu()
    name = "oneDNN" if taken is products.by_onednn else "torch's own product, as below"
    print(f"fp32 products of {tokens} tokens; taken here: {name}")
    print(f"  {'features':16}{'taken, GFLOP/s':>16}{'F.linear':>12}{'times':>8}{'errors, to fp64':>24}")
    for in_features, out_features in SHAPES:
        x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(1))
        weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(2))
        exact = x.double() @ weight.double().T
        functions = [lambda x=x, w=weight: taken(x, w, None), lambda x=x, w=weight: F.linear(x, w)]
        rates = [2 * tokens * weight.numel() / seconds(function, repeats) / 1e9 for function in functions]
        errors = [float((function().double() - exact).norm() / exact.norm()) for function in functions]
        print(
            f"  {f'{in_features} -> {out_features}':16}{rates[0]:16.0f}{rates[1]:12.0f}{rates[0] / rates[1]:8.2f}"
            f"{f'{errors[0]:.1e} {errors[1]:.1e}':>24}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=14336)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    agree = measure_nf4(options.rows, options.columns, options.repeats)
    print("  all bits agree\n" if agree else "  BITS DIFFER\n")
    measure_products(options.tokens, options.repeats)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
