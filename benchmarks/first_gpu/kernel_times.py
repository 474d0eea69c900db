"""Time our kernels: the table of benchmarks.gpu, and the product of few tokens, ours and bitsandbytes'.

Timing is benchmarks.gpu's: launching hidden, and weights that no cache holds.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu
from benchmarks.first_gpu.device import Device
from benchmarks.first_gpu.kit import Kit
from qlora_kernels.nf4_matmul import multiply, multiply_few
from qlora_trainer.weights.nf4 import load_bitsandbytes, quantize_weight

SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))  # an 8B's weights, (O, I)
TOKENS = (1, 4, 16)


def measure_kernels(kit: Kit, device: Device) -> None:
    """Measure the table, and few tokens. A dry run computes the table for a card, and measures nothing."""
    roofs, lines = gpu.kernel_lines(kit.is_dry)
    gpu.print_kernels(roofs, lines)
    kit.result("roofs", bandwidth=roofs.bandwidth, flops=roofs.flops)
    for line in lines:
        kit.result("kernel", kernel=line.name, seconds=line.seconds, share=line.share(roofs))
    text = "; ".join(f"{line.name} {line.seconds * 1e6:.0f} us {line.share(roofs):.0%}" for line in lines)
    kit.verdict(f"kernels ({roofs.name}, {roofs.bandwidth / 1e9:,.0f} GB/s, {roofs.flops / 1e12:.0f} TFLOP/s): {text}")
    for shape in SHAPES if device.is_cuda else ():
        _measure_few(kit, *shape)


def _measure_few(kit: Kit, out_features: int, in_features: int) -> None:
    packed = out_features * in_features // 2
    workspace = torch.empty(out_features * in_features, dtype=torch.bfloat16, device="cuda")
    ours, theirs = [], []
    for _ in range(gpu.copies_beyond(gpu.card_cache(), packed)):
        dense = torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) * 0.02
        ours.append(dataclasses.replace(quantize_weight(dense), workspace=workspace))
        quantize = load_bitsandbytes().functional.quantize_4bit
        theirs.append(quantize(dense, blocksize=64, compress_statistics=True, quant_type="nf4"))
    for tokens in TOKENS:
        x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
        ways: dict[str, list[Callable[[], Tensor]]] = {
            "ours": [functools.partial(multiply_few, x, weight, None) for weight in ours],
            "bitsandbytes": [functools.partial(_theirs, x, *weight) for weight in theirs],
            "dequantized first": [functools.partial(multiply, x, weight, None) for weight in ours],
        }
        with torch.no_grad():
            seconds = {name: gpu.median_seconds(lambda calls=calls: calls) for name, calls in ways.items()}  # type: ignore[misc]
            first = {name: calls[0]().float() for name, calls in ways.items()}
        wanted = first.pop("dequantized first")
        errors = {name: float((found - wanted).norm() / wanted.norm()) for name, found in first.items()}
        kit.result("few", shape=[out_features, in_features], tokens=tokens, seconds=seconds, relative_errors=errors)
        text = ", ".join(f"{name} {found * 1e6:.0f} us" for name, found in seconds.items())
        apart = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
        kit.verdict(f"few tokens {out_features}x{in_features} x{tokens}: {text}; against dequantized first: {apart}")


def _theirs(x: Tensor, packed: Tensor, state: Any) -> Tensor:
    return load_bitsandbytes().matmul_4bit(x, packed.t(), quant_state=state)
