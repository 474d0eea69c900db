"""Compute the end of a gated MLP over a frozen NF4 weight, keeping gate and up instead of their product.

The layer's input is a product, activation(gate) * up. It is made again in backward: two tensors of the MLP's width are
kept instead of the four that plain autograd keeps.

Legend: N tokens, I in features, O out features, R rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.adapter import Adapter, Projection, Shown, stacks_of
from qlora_kernels.adapter_gradients import AdapterBackward
from qlora_kernels.gated import Activation, gated_gradients, gated_product
from qlora_kernels.lora_linear import as_tokens, input_gradient, low_rank_of, output_of, shaped_as
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
    projection = Projection(weight, bias, adapter)
    shown = Shown((projection,), is_called_back=gate.requires_grad or up.requires_grad)
    return _GatedNF4Linear.apply(projection, activation, shown, *visible(gate, up, *shown.tensors))


class _GatedNF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        projection: Projection,
        activation: Activation,
        shown: Shown,
        gate: Tensor,
        up: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        product, is_trained = as_tokens(gated_product(gate, up, activation)), any(ctx.needs_input_grad)
        stacks = stacks_of((projection,), product.dtype)
        low_ranks = [low_rank_of(product, stack) for stack in stacks]
        if is_trained:
            keep(ctx, gate, up, *shown.needed_for_B(stacks, low_ranks))
        ctx.projection, ctx.activation, ctx.shown = projection, activation, shown
        low_rank = low_ranks[0] if low_ranks else None
        return shaped_as(output_of(product, projection, low_rank, is_inference=not is_trained), gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # grad: (..., O)
        _, _, _, needs_gate, needs_up, *_ = ctx.needs_input_grad
        needs_input, shown, projections = needs_gate or needs_up, ctx.shown, (ctx.projection,)
        gate, up, *low_ranks = fetch(ctx)
        assert gate is not None
        assert up is not None
        grads = (as_tokens(grad),)
        adapters = AdapterBackward(grads, projections, needs_x=needs_input)
        grads_B = adapters.grads_B(low_ranks)
        del low_ranks
        product = as_tokens(gated_product(gate, up, ctx.activation)) if shown.trains_A else None
        grads_A = adapters.grads_A(product, shown.trains_A)
        del product
        grad_gate = grad_up = None
        if needs_input:
            grad_product = shaped_as(input_gradient(grads, projections, adapters), gate)
            grad_gate, grad_up = gated_gradients(grad_product, gate, up, ctx.activation)
        return None, None, None, grad_gate, grad_up, *shown.gradients(grads, grads_A, grads_B)
