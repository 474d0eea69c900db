"""Compute a bottleneck adapter, h + U f(D h + b_D) + b_U (Houlsby et al. 2019, arXiv:1902.00751), keeping little.

Backward needs h and the R numbers of each token in front of the activation, and makes the activated ones again. Nothing
else of the width of h is kept: no cast of D or U, and not what is added. The tensors are saved before the large product
is made, so a layer that is run again in backward and ends here does not make it again.

Left out: gradients of gradients, and autocast.

Legend: N tokens, H hidden size, R bottleneck size.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.lora_linear import as_tokens, shaped_as
from qlora_kernels.products import linear, product
from qlora_kernels.saved_tensors import fetch, keep, visible

BottleneckActivation = Literal["relu", "gelu", "silu"]


def add_bottleneck(
    h: Tensor,  # (..., H)
    down: Tensor,  # D (R, H)
    down_bias: Tensor,  # (R,)
    up: Tensor,  # U (H, R)
    up_bias: Tensor,  # (H,)
    activation: BottleneckActivation,
) -> Tensor:  # (..., H)
    """Compute h + U f(D h + b_D) + b_U in h's dtype; the parameters are cast to it where they are multiplied.

    What is added is rounded by itself, and then the sum. Gradients go to h and the parameters, each in its own dtype.
    Works under checkpointing, where h is made again, and on fake tensors.

    Args:
        h: output of a part of the model.
        down: of any floating dtype.
        down_bias: of any floating dtype.
        up: of any floating dtype.
        up_bias: of any floating dtype.
        activation: f, of each number; gelu is the exact one.

    Returns:
        A new tensor.
    """
    return _Bottleneck.apply(activation, *visible(h, down, down_bias, up, up_bias))


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        activation: BottleneckActivation,
        h: Tensor,
        down: Tensor,
        down_bias: Tensor,
        up: Tensor,
        up_bias: Tensor,
    ) -> Tensor:
        tokens, dtype = as_tokens(h), h.dtype
        narrow = linear(tokens, down.to(dtype), down_bias.to(dtype))
        if any(ctx.needs_input_grad):
            keep(ctx, h, narrow)
        # Not as saved tensors: hooks that offload or recompute those must leave parameters alone.
        ctx.activation, ctx.parameters = activation, (down, down_bias, up, up_bias)
        added = linear(_activate(narrow, activation), up.to(dtype), up_bias.to(dtype))
        return shaped_as(added.add_(tokens), h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # (..., H)
        down, down_bias, up, up_bias = ctx.parameters
        needs_h, *needs = ctx.needs_input_grad[1:]
        h, narrow = fetch(ctx)
        assert h is not None
        assert narrow is not None
        of_tokens, dtype = as_tokens(grad), grad.dtype
        grad_up = product(_activate(narrow, ctx.activation).T, of_tokens).T.to(up.dtype) if needs[2] else None
        grad_up_bias = of_tokens.sum(0, dtype=up_bias.dtype) if needs[3] else None
        grad_narrow = _through(product(of_tokens, up.to(dtype)), narrow, ctx.activation)  # (N, R)
        grad_down = product(grad_narrow.T, as_tokens(h)).to(down.dtype) if needs[0] else None
        del h
        grad_down_bias = grad_narrow.sum(0, dtype=down_bias.dtype) if needs[1] else None
        # A new tensor: the gradient belongs to the sum after the adapter too.
        grad_h = shaped_as(product(grad_narrow, down.to(dtype)).add_(of_tokens), grad) if needs_h else None
        return None, grad_h, grad_down, grad_down_bias, grad_up, grad_up_bias


def _activate(narrow: Tensor, activation: BottleneckActivation) -> Tensor:
    if activation == "relu":
        return F.relu(narrow)
    return F.gelu(narrow) if activation == "gelu" else F.silu(narrow)


def _through(grad: Tensor, narrow: Tensor, activation: BottleneckActivation) -> Tensor:
    """Return the gradient of the activation's input from that of its output, as torch's own autograd computes it."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, narrow, 0)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, narrow)
    return torch.ops.aten.silu_backward(grad, narrow)
