"""The linear layer over a frozen NF4 weight, as an autograd function that keeps no activation.

The weight gets no gradient, so backward needs neither the input nor a dequantised copy: it dequantises the four-bit
weight again and multiplies, grad_x = grad_y @ W. What a plain `F.linear` would keep alive for each layer, the 16-bit
weight, is what QLoRA exists to avoid. The LoRA branch itself is ordinary autograd and lives with the adapters.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.nf4 import NF4Weight, dequantize_nf4


def nf4_linear(
    x: Tensor,  # (..., I)
    weight: NF4Weight,  # (O, I)
    bias: Tensor | None,  # (O,)
) -> Tensor:  # (..., O)
    """x @ W.T + bias in x's dtype: the weight is dequantised to it, the bias cast to it.

    Gradients go to x, and to the bias where it requires one (summed in the bias' dtype). Works under checkpointing.
    """
    return _NF4Linear.apply(x, weight, bias)


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
        # Handles to the stored weight, not saved tensors: hooks that offload or recompute saved tensors pass them by.
        ctx.weight = weight
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, dequantize_nf4(weight, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:  # grad: (..., O)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dequantize_nf4(ctx.weight, grad.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=ctx.bias_dtype)
        return grad_x, None, grad_bias
