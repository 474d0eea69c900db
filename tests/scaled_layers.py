"""A layer with scales of its output and its input, by the kernels and by the plain formula, alone and after a gate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from adapted_layers import SCALING, SEED, mask_like
from random_tensors import normal
from torch import Tensor

from qlora_kernels.adapter import Adapter, OutputScale, Projection
from qlora_kernels.gated_linear import gated_nf4_linear
from qlora_kernels.lora_linear import add_lora, nf4_linear
from qlora_kernels.nf4 import NF4Weight, dequantize_nf4

Tensors = dict[str, Tensor]  # by name: x, or gate and up (..., I), bias (O,), A (R, I), B (O, R), c (O,), l (I,)


@dataclass(frozen=True)
class Layer:
    """What a layer has. A name of `names` is a parameter of it."""

    names: str  # such as "bias A B c l"
    dropout: float = 0.0
    keeps_output: bool = False
    is_gated: bool = False

    def tensors(
        self,
        *lead: int,
        dtype: torch.dtype = torch.float64,
        parameters: torch.dtype | None = None,
        sizes: tuple[int, int, int] = (7, 45, 3),  # O, I, R
        trained: Sequence[str] | None = None,
    ) -> Tensors:
        """The layer's inputs and parameters, those in `trained` requiring gradients, by default all."""
        O, I, R = sizes  # noqa: E741
        kind = parameters or dtype
        every = {
            "x": normal(*lead, I, dtype=dtype),
            "gate": normal(*lead, I, dtype=dtype),
            "up": normal(*lead, I, seed=9, dtype=dtype),
            "bias": normal(O, seed=1, dtype=kind),
            "A": normal(R, I, seed=3, dtype=kind) / I**0.5,
            "B": normal(O, R, seed=4, dtype=kind),
            "c": normal(O, seed=5, dtype=kind),
            "l": normal(I, seed=6, dtype=kind),
        }
        names = [*(("gate", "up") if self.is_gated else ("x",)), *self.names.split()]
        return {name: every[name].requires_grad_(trained is None or name in trained) for name in names}

    def projection(self, weight: NF4Weight, given: Tensors) -> Projection:
        A, B, c = (given.get(name) for name in "ABc")
        adapter = None
        if A is not None and B is not None:
            adapter = Adapter(A, B, SCALING, self.dropout, SEED if self.dropout else None)
        scale = None if c is None else OutputScale(c, self.keeps_output)
        return Projection(weight, given.get("bias"), adapter, scale, given.get("l"))

    def fused(self, weight: NF4Weight) -> Callable[[Tensors], Tensor]:
        def function(given: Tensors) -> Tensor:
            projection = self.projection(weight, given)
            if self.is_gated:
                return gated_nf4_linear(given["gate"], given["up"], "silu", *projection)
            return nf4_linear(given["x"], *projection)

        return function

    def plain(self, weight: NF4Weight, dense: Tensor | None = None) -> Callable[[Tensors], Tensor]:
        """The formula in plain torch, each product with a scale rounded once."""

        def formula(given: Tensors) -> Tensor:
            x = F.silu(given["gate"]) * given["up"] if self.is_gated else given["x"]
            dtype = x.dtype
            if "l" in given:
                x = (x * given["l"]).to(dtype)
            y = F.linear(x, dequantize_nf4(weight, dtype) if dense is None else dense)
            if "A" in given:
                dropped = x * mask_like(x, self.dropout) / (1.0 - self.dropout)
                y = add_lora(y, dropped, given["A"], given["B"], SCALING)
            if "c" in given:
                y = (y * given["c"]).to(dtype)
            return y + given["bias"].to(dtype) if "bias" in given else y

        return formula


def results(function: Callable[[Tensors], Tensor], given: Tensors) -> list[Tensor]:
    """Output, then the gradients of those that require one, in order, for a random gradient of the output."""
    output = function(given)
    trained = [tensor for tensor in given.values() if tensor.requires_grad]
    grad = normal(*output.shape, seed=2, dtype=output.dtype)
    return [output.detach(), *(torch.autograd.grad(output, trained, grad) if trained else ())]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
