"""Compute the end of a gated MLP over a frozen NF4 weight, keeping gate and up instead of their product.

The layer's input is a product, activation(gate) * up. It is made again in backward: two tensors of the MLP's width are
kept instead of the four that plain autograd keeps.

Legend: N tokens, I in features, O out features, R rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.adapter import Adapter, shown_to_autograd, trains_B
from qlora_kernels.gated import Activation, gated_gradients, gated_product
from qlora_kernels.lora_linear import AdapterBackward, as_tokens, input_gradient, low_rank_of, output_of, shaped_as
from qlora_kernels.nf4 import NF4Weight
from qlora_kernels.saved_tensors import fetch, keep, visible


def gated_nf4_linear(
    gate: Tensor,  # (..., I)
    up: Tensor,  # (..., I)
    activation: Activation,
    weight: NF4Weight,  # (O, I)
    bias: Tensor | None,  # (O,)
    adapter: Adapter | None = None,
) -> Tensor:  # (..., O)
    """Compute `nf4_linear(activation(gate) * up, ...)`.

    Args:
        gate: what is activated.
        up: what it is multiplied with.
        activation: a name or a function.
        weight: frozen.
        bias: of the layer, or None.
        adapter: LoRA on the layer, or None.

    Returns:
        The output, in gate's dtype.
    """
    A, B = shown_to_autograd(adapter)
    return _GatedNF4Linear.apply(*visible(gate, up, bias, A, B), activation, weight, adapter)


class _GatedNF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        bias: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        activation: Activation,
        weight: NF4Weight,
        adapter: Adapter | None,
    ) -> Tensor:
        product = as_tokens(gated_product(gate, up, activation))
        low_rank = None if adapter is None else low_rank_of(product, adapter)
        if any(ctx.needs_input_grad):
            needs_B = trains_B(adapter, *ctx.needs_input_grad[3:5])
            keep(ctx, gate, up, low_rank if needs_B else None)
        ctx.activation, ctx.weight, ctx.adapter = activation, weight, adapter
        ctx.bias_dtype = None if bias is None else bias.dtype
        output = output_of(product, weight, bias, adapter, low_rank, is_inference=not any(ctx.needs_input_grad))
        return shaped_as(output, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # grad: (..., O)
        needs_gate, needs_up, needs_bias, needs_A, needs_B, *_ = ctx.needs_input_grad
        needs_B = trains_B(ctx.adapter, needs_A, needs_B)
        gate, up, low_rank = fetch(ctx)
        assert gate is not None
        assert up is not None
        tokens_grad = as_tokens(grad)
        adapter = AdapterBackward(tokens_grad, ctx.adapter) if ctx.adapter is not None else None
        grad_B = adapter.grad_B(low_rank) if adapter and needs_B and low_rank is not None else None
        del low_rank
        grad_bias = tokens_grad.sum(0, dtype=ctx.bias_dtype) if needs_bias else None
        grad_A = adapter.grad_A(as_tokens(gated_product(gate, up, ctx.activation))) if adapter and needs_A else None
        grad_gate = grad_up = None
        if needs_gate or needs_up:
            grad_product = shaped_as(input_gradient(tokens_grad, ctx.weight, adapter), gate)
            grad_gate, grad_up = gated_gradients(grad_product, gate, up, ctx.activation)
        return grad_gate, grad_up, grad_bias, grad_A, grad_B, None, None, None
