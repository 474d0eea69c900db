"""Compute what our kernels take of a card, what they move, and what a step of a 7B can be at best.

    python -m benchmarks.kernels [matrix|bytes|roofline]

The matrix: every kernel compiled for seven architectures; registers a thread, shared memory a block, bytes spilled. The
bytes: what each operation between the matrix products reads and writes, ours and the library's code, counted on fake
tensors (bytes_moved.py). The roofline: the time that arithmetic and memory need at least, on cards' published figures;
where a kernel reaches less, or the processor does not keep up with launching, it is more. `benchmarks.gpu` measures.
Left out of the roofline: residual sums, the adapters' casts, the loss but for its products, and the optimizer.

The 7B has Llama-2-7B's shape: hidden 4,096, intermediate 11,008, 32 layers of 32 heads, a vocabulary of 32,000.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.bytes_moved import Moved, moved
from qlora_kernels.gated import gated_gradients, gated_product
from qlora_kernels.linear_cross_entropy import FEWEST_ON_A_CARD
from qlora_kernels.nf4 import NF4Weight, dequantize_nf4
from qlora_kernels.nf4_matmul import multiply, multiply_few
from qlora_kernels.rms_norm import rms_norm
from qlora_kernels.rotary import rotate
from qlora_kernels.softmax_loss import softmax_loss_
from qlora_trainer.planning.speed.cards import TABLE, CardFigures
from qlora_trainer.weights.nf4 import load_bitsandbytes

TOKENS, RANK = 2048, 16
HIDDEN, INTERMEDIATE, LAYERS, HEADS, VOCABULARY = 4096, 11008, 32, 32, 32_000
BASE = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
ADAPTERS = LAYERS * RANK * (4 * 2 * HIDDEN + 3 * (HIDDEN + INTERMEDIATE))
BF16, FP32, UINT8 = torch.bfloat16, torch.float32, torch.uint8
Inputs = list[tuple[tuple[int, ...], torch.dtype]]
DEQUANTIZING, FEW_TOKENS = "NF4 -> bf16, 4,096 x 11,008", "the same times one token"


CARDS = {card.name: card for card in TABLE if card.name.startswith("RTX")}


@dataclass(frozen=True)
class Work:
    """Hold a computation: a function of tensors, or the backward that gives the first so many of them a gradient."""

    function: Callable[..., Any]
    inputs: Inputs
    gradients: int = 0

    def moved(self) -> Moved:
        return moved(self.function, *self.inputs, gradients=self.gradients)


@dataclass(frozen=True)
class Operation:
    """Hold ours, what others do for it, and how often a layer does it, forward or backward, between the products."""

    ours: Work
    others: dict[str, Work]
    a_layer: int = 0


@dataclass(frozen=True)
class Row:
    """Hold what an operation moves."""

    ours: Moved
    others: dict[str, Moved]
    a_layer: int = 0


def nf4_inputs(out_features: int, in_features: int) -> Inputs:
    elements = out_features * in_features
    blocks = elements // 64
    return [((elements // 2,), UINT8), ((blocks,), UINT8), ((-(-blocks // 256),), FP32), ((256,), FP32), ((), FP32)]


def theirs(*tables: Tensor, out_features: int = HIDDEN, in_features: int = INTERMEDIATE) -> Tensor:
    """Dequantize by bitsandbytes."""
    packed, absmax, nested_absmax, nested_code, offset = tables
    nested = load_bitsandbytes().functional.QuantState(nested_absmax, code=nested_code, blocksize=256, dtype=FP32)
    shape = torch.Size((out_features, in_features))
    state = load_bitsandbytes().functional.QuantState(
        absmax, shape, torch.empty(16), 64, "nf4", dtype=BF16, offset=offset, state2=nested
    )
    return load_bitsandbytes().functional.dequantize_4bit(packed.view(-1, 1), state)


def ours(*tables: Tensor) -> NF4Weight:
    return NF4Weight(*tables, shape=(HIDDEN, INTERMEDIATE))  # type: ignore[arg-type, misc]


def library_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Make transformers' LlamaRMSNorm."""
    wide = x.to(FP32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * wide.to(x.dtype)


def library_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate heads by transformers' apply_rotary_pos_emb."""

    def rotate_half(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def our_gated_backward(grad: Tensor, gate: Tensor, up: Tensor) -> Any:
    """Compute the gradients, with the product made again for the adapter's gradient, which autograd kept."""
    return gated_product(gate, up, "silu"), gated_gradients(grad, gate, up, "silu")


def our_loss(logits: Tensor) -> Tensor:
    """Compute the loss; the logits become their gradient."""
    return softmax_loss_(logits, torch.zeros(len(logits), 1, dtype=torch.int64, device=logits.device))


def library_loss(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the loss as transformers does, and the gradient of the logits."""
    wide = logits.to(FP32, copy=True).requires_grad_()
    targets = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    with torch.enable_grad():
        loss = F.cross_entropy(wide, targets, reduction="sum")
    return loss, torch.autograd.grad(loss, wide)[0].to(logits.dtype)


def operations() -> dict[str, Operation]:
    """List every operation, on a layer's tensors for TOKENS tokens; few tokens are one."""
    weight, few = nf4_inputs(HIDDEN, INTERMEDIATE), [((1, INTERMEDIATE), BF16)]
    norm: Inputs = [((TOKENS, HIDDEN), BF16), ((HIDDEN,), BF16)]
    mlp: Inputs = [((TOKENS, INTERMEDIATE), BF16)] * 2
    logits: Inputs = [((FEWEST_ON_A_CARD, VOCABULARY), BF16)]
    head = HIDDEN // HEADS
    attention: Inputs = [((1, HEADS, TOKENS, head), BF16)] * 2 + [((1, TOKENS, head), BF16)] * 2

    def our_norm(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, 1e-5, "scale_after_cast")

    def our_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def library_gated(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    return {
        DEQUANTIZING: Operation(
            Work(lambda *tables: dequantize_nf4(ours(*tables), BF16), weight), {"bitsandbytes": Work(theirs, weight)}
        ),
        FEW_TOKENS: Operation(
            Work(lambda x, *tables: multiply_few(x, ours(*tables), None), few + weight),
            {"dequantized first": Work(lambda x, *tables: multiply(x, ours(*tables), None), few + weight)},
        ),
        "RMSNorm": Operation(Work(our_norm, norm), {"library": Work(library_norm, norm)}, a_layer=2),
        "RMSNorm, backward": Operation(
            Work(our_norm, norm, gradients=1), {"library": Work(library_norm, norm, gradients=1)}, a_layer=2
        ),
        "SwiGLU": Operation(
            Work(lambda gate, up: gated_product(gate, up, "silu"), mlp),
            {"library": Work(library_gated, mlp)},
            a_layer=1,
        ),
        "SwiGLU, backward": Operation(
            Work(our_gated_backward, [mlp[0], *mlp]), {"library": Work(library_gated, mlp, gradients=2)}, a_layer=1
        ),
        "rotary embedding of q and k": Operation(
            Work(our_rotary, attention), {"library": Work(library_rotary, attention)}, a_layer=1
        ),
        "rotary embedding, backward": Operation(
            Work(our_rotary, attention, gradients=2),
            {"library": Work(library_rotary, attention, gradients=2)},
            a_layer=1,
        ),
        f"loss and gradient of {FEWEST_ON_A_CARD} tokens": Operation(
            Work(our_loss, logits), {"library": Work(library_loss, logits)}
        ),
    }


def table() -> dict[str, Row]:
    return {
        name: Row(one.ours.moved(), {other: work.moved() for other, work in one.others.items()}, one.a_layer)
        for name, one in operations().items()
    }


@dataclass(frozen=True)
class Roofline:
    """Hold seconds of a step of TOKENS tokens with recomputation, at least; ours and what it replaces."""

    products: float
    attention: float
    dequantizing: tuple[float, float]  # ours, bitsandbytes
    between: tuple[float, float]  # ours, the library's

    def step(self, which: int) -> float:
        return self.products + self.attention + self.dequantizing[which] + self.between[which]


def roofline(card: CardFigures, rows: dict[str, Row]) -> Roofline:
    # Forward, forward again, and the gradient of the input; of the adapters' weights too. The head: forward, gradient.
    products = 6 * BASE * TOKENS + 8 * ADAPTERS * TOKENS + 4 * VOCABULARY * HIDDEN * TOKENS
    # Causal: half of two products over pairs of tokens; five in backward (Dao et al. 2022, arXiv:2205.14135).
    attention = LAYERS * (2 + 2 + 5) * TOKENS**2 * HIDDEN
    weight = rows[DEQUANTIZING]
    a_weight = [m.bytes / (HIDDEN * INTERMEDIATE) for m in (weight.ours, weight.others["bitsandbytes"])]
    between = [0.0, 0.0]
    for name, row in rows.items():
        times = LAYERS * row.a_layer * (1 if name.endswith("backward") else 2)
        if times:
            between[0] += times * row.ours.bytes
            between[1] += times * row.others["library"].bytes
    return Roofline(
        products=products / card.flops,
        attention=attention / card.flops,
        dequantizing=(3 * BASE * a_weight[0] / card.bandwidth, 3 * BASE * a_weight[1] / card.bandwidth),
        between=(between[0] / card.bandwidth, between[1] / card.bandwidth),
    )


def print_matrix() -> None:
    from benchmarks.ahead_of_time import SHARED_MEMORY, cases, compile_ahead

    print("Registers a thread / shared KiB a block / bytes spilled, by architecture (compiled, not run)\n")
    print(f"{'kernel':42}" + "".join(f"{f'sm_{architecture}':>15}" for architecture in SHARED_MEMORY))
    for name, case in cases().items():
        made = [compile_ahead(case, card) if card >= case.oldest else None for card in SHARED_MEMORY]
        cells = (f"{one.registers}/{one.shared / 1024:.1f}/{one.spills}" if one else "not used" for one in made)
        print(f"{name:42}" + "".join(f"{cell:>15}" for cell in cells))


def print_bytes(rows: dict[str, Row]) -> None:
    print(f"MiB moved and passes (kernels) on the tensors of a 7B's layer, {TOKENS} tokens (computed)\n")
    print(f"{'operation':32}{'ours':>18}{'next to it':>18}   what that is")
    for name, row in rows.items():
        for other, theirs in row.others.items():
            cells = [f"{m.bytes / 2**20:.1f} in {m.passes}" for m in (row.ours, theirs)]
            print(f"{name:32}{cells[0]:>18}{cells[1]:>18}   {other}, {theirs.bytes / row.ours.bytes:.2f} times ours")


def print_roofline(rows: dict[str, Row]) -> None:
    print(f"A step of a 7B, {TOKENS} tokens, layers recomputed, rank {RANK}: at least so many milliseconds")
    print("(computed from published bandwidth and tensor arithmetic; ours | bitsandbytes and the library's code)\n")
    columns = ("products", "attention", "dequantizing", "between products", "step", "tokens/s", "one row, tokens/s")
    widths = (10, 11, 16, 18, 16, 16, 19)
    print(f"{'card':16}" + "".join(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True)))
    weight = rows[FEW_TOKENS].ours.bytes / (HIDDEN * INTERMEDIATE)
    for name, card in CARDS.items():
        found = roofline(card, rows)
        steps = [found.step(which) for which in (0, 1)]
        generation = card.bandwidth / (BASE * weight + 2 * VOCABULARY * HIDDEN)  # the head in 16 bits
        cells = (
            f"{found.products * 1e3:.0f}",
            f"{found.attention * 1e3:.0f}",
            _pair(found.dequantizing, 1e3),
            _pair(found.between, 1e3),
            _pair((steps[0], steps[1]), 1e3),
            _pair((TOKENS / steps[0], TOKENS / steps[1])),
            f"{generation:.0f}",
        )
        print(f"{name:16}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))


def _pair(values: tuple[float, float], factor: float = 1.0) -> str:
    return f"{values[0] * factor:.0f} | {values[1] * factor:.0f}"


PARTS: dict[str, Callable[[], None]] = {
    "matrix": print_matrix,
    "bytes": lambda: print_bytes(table()),
    "roofline": lambda: print_roofline(table()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=sorted(PARTS))
    part = parser.parse_args().part
    for index, name in enumerate([part] if part else PARTS):
        if index:
            print()
        PARTS[name]()


if __name__ == "__main__":
    main()
