"""An adapted NF4 layer, fused and by the plain formula, with its inputs: what they give and what they save."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from random_tensors import normal
from spying import noting, unchanged
from torch import Tensor

from qlora_kernels.adapter import Adapter
from qlora_kernels.dropout import keep_mask
from qlora_kernels.lora_linear import add_lora, nf4_linear
from qlora_kernels.nf4 import NF4Weight, dequantize_nf4

# x (..., I), bias (O,), lora_A (R, I), lora_B (O, R).
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
SCALING = 1.7
SEED = torch.tensor(11)


def adapter_inputs(
    *lead: int,
    dtype: torch.dtype = torch.float64,
    parameters: torch.dtype | None = None,
    trained: str = "x bias A B",
    sizes: tuple[int, int, int] = (7, 45, 3),  # O, I, R
) -> Inputs:
    """x of `dtype`; bias, A and B of dtype `parameters` or x's; those named in `trained` require gradients."""
    kind = parameters or dtype
    O, I, R = sizes  # noqa: E741
    tensors = {
        "x": normal(*lead, I, dtype=dtype),
        "bias": normal(O, seed=1, dtype=kind),
        "A": normal(R, I, seed=3, dtype=kind) / I**0.5,
        "B": normal(O, R, seed=4, dtype=kind),
    }
    x, bias, A, B = (tensor.requires_grad_(name in trained.split()) for name, tensor in tensors.items())
    return x, bias, A, B


def fused(weight: NF4Weight, dropout: float = 0.0) -> Callable[..., Tensor]:
    seed = SEED if dropout else None
    return lambda x, bias, A, B: nf4_linear(x, weight, bias, Adapter(A, B, SCALING, dropout, seed))


def mask_like(x: Tensor, dropout: float) -> Tensor:
    return keep_mask(x.reshape(-1, x.shape[-1]), x.shape[-1], dropout, SEED).view(x.shape)


def plain(weight: NF4Weight, dropout: float = 0.0) -> Callable[..., Tensor]:
    """The formula in plain torch; dropout by an explicit mask."""

    def formula(x: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        base = F.linear(x, dequantize_nf4(weight, x.dtype), bias.to(x.dtype))
        mask = mask_like(x, dropout)
        return add_lora(base, x * mask / (1.0 - dropout), A, B, SCALING)

    return formula


def output_and_gradients(function: Callable[..., Tensor], inputs: Inputs) -> list[Tensor]:
    """Output, then the gradients of x, bias, A and B for a random gradient of the output."""
    output = function(*inputs)
    trained = [tensor for tensor in inputs if tensor.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, trained, normal(*output.shape, seed=2, dtype=output.dtype))]


def saved_by(function: Callable[..., Tensor], inputs: Inputs) -> list[Tensor]:
    """What autograd saves for backward; asserts that the node itself holds parameters and a seed, and no activation."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(noting(unchanged, kept.append), unchanged):
        output = function(*inputs)
    assert output.grad_fn is not None
    held = [value for value in vars(output.grad_fn).values() if isinstance(value, Tensor)]
    assert all(any(value is parameter for parameter in (*inputs[1:], SEED)) for value in held)
    return kept
