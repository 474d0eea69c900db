"""Three layers over one input, like q, k and v, with what they give together and what each gives alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from adapted_layers import SCALING
from random_tensors import normal
from torch import Tensor

from qlora_kernels.adapter import Adapter, Projection, StackedA
from qlora_kernels.lora_linear import nf4_linear
from qlora_kernels.nf4 import quantize_nf4

I = 45  # noqa: E741
WIDTHS, RANKS = (22, 7, 13), (3, 2, 4)  # of grouped heads, and of adapters of their own
Function = Callable[[Tensor, Sequence[Projection]], tuple[Tensor, ...]]


def layers(
    adapted: str = "qkv",
    biased: str = "q",
    scalings: Sequence[float] = (SCALING,) * 3,
    dropouts: Sequence[float] = (0.0,) * 3,
) -> list[Projection]:
    """Three layers over I features, in fp64: of q, k and v, those named are adapted and biased, and all that trains."""
    found = []
    for place, name in enumerate("qkv"):
        O, R = WIDTHS[place], RANKS[place]  # noqa: E741
        weight = quantize_nf4(normal(O, I, seed=place) / I**0.5)
        bias = normal(O, seed=10 + place, dtype=torch.float64).requires_grad_() if name in biased else None
        A = (normal(R, I, seed=20 + place, dtype=torch.float64) / I**0.5).requires_grad_()
        B = normal(O, R, seed=30 + place, dtype=torch.float64).requires_grad_()
        seed = torch.tensor(place + 5) if dropouts[place] else None
        adapter = Adapter(A, B, scalings[place], dropouts[place], seed) if name in adapted else None
        found.append(Projection(weight, bias, adapter))
    return found


def apart(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    return tuple(nf4_linear(x, *projection) for projection in projections)


def parameters_of(projections: Sequence[Projection]) -> list[Tensor]:
    of_adapters = [t for p in projections if p.adapter is not None for t in (p.adapter.lora_A, p.adapter.lora_B)]
    return [p.bias for p in projections if p.bias is not None] + of_adapters


def outputs_and_gradients(function: Function, x: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    """Outputs, then the gradients of x and of every parameter that trains, for random gradients of the outputs."""
    outputs = function(x, projections)
    wanted = [tensor for tensor in (x, *parameters_of(projections)) if tensor.requires_grad]
    grads = [normal(*output.shape, seed=40 + place, dtype=x.dtype) for place, output in enumerate(outputs)]
    pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
    return [
        *(output.detach() for output in outputs),
        *torch.autograd.grad([output for output, _ in pairs], wanted, [grad for _, grad in pairs]),
    ]


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def in_one_matrix(projections: Sequence[Projection], cast: torch.dtype = torch.float64) -> list[Projection]:
    """The same layers, with their adapters' A's below each other, and places for all gradients, filled with ones."""
    adapters = [p.adapter for p in projections if p.adapter is not None]
    A = torch.cat([adapter.lora_A.detach() for adapter in adapters])
    stacked = StackedA(len(adapters), A.to(cast), torch.ones_like(A))
    parts = iter(
        zip(
            A.split([len(a.lora_A) for a in adapters]),
            stacked.grad.split([len(a.lora_A) for a in adapters]),
            strict=True,
        )
    )
    found = []
    for projection in projections:
        adapter = projection.adapter
        if adapter is not None:
            part, grad = next(parts)
            B = adapter.lora_B.detach()
            casts = part.to(cast), B.to(cast), B.to(cast).T
            grads = grad, torch.ones_like(B).T
            lora_A = part.requires_grad_()
            adapter = replace(adapter, lora_A=lora_A, casts=casts, grads=grads, stacked=stacked)
        found.append(projection._replace(adapter=adapter))
    return found


def added_gradients(projections: Sequence[Projection]) -> list[Tensor]:
    """What backward added to the ones, in the order of `parameters_of` without biases."""
    pairs = [p.adapter.grads for p in projections if p.adapter is not None and p.adapter.grads is not None]
    return [tensor for A, B in pairs for tensor in (A - 1.0, B.T - 1.0)]
