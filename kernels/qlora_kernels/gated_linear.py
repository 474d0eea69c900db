"""Compute the end of a gated MLP over a frozen NF4 weight, keeping gate and up instead of their product.

The layer's input is a product, activation(gate) * up. It is made again in backward: two tensors of the MLP's width are
kept instead of the four that plain autograd keeps. A vector may scale the product as the layer's input (IA3), in
place.

Legend: N tokens, I in features, O out features, R rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.adapter import Adapter, OutputScale, Projection, Shown, stacks_of
from qlora_kernels.adapter_gradients import AdapterBackward
from qlora_kernels.gated import Activation, gated_gradients, gated_product
from qlora_kernels.lora_linear import as_tokens, input_gradient, low_rank_of, output_of, shaped_as, with_scale
from qlora_kernels.nf4 import NF4Weight
from qlora_kernels.saved_tensors import fetch, keep, visible
from qlora_kernels.scale_gradients import OutputScaleBackward, scaled, summed_products


def gated_nf4_linear(
    gate: Tensor,  # (..., I)
    up: Tensor,  # (..., I)
    activation: Activation,
    weight: NF4Weight,  # (O, I)
    bias: Tensor | None,  # (O,)
    adapter: Adapter | None = None,
    output_scale: OutputScale | None = None,
    input_scale: Tensor | None = None,  # (I,)
) -> Tensor:  # (..., O)
    """Compute `nf4_linear(activation(gate) * up, ...)`.

    Args:
        gate: what is activated.
        up: what it is multiplied with.
        activation: a name or a function.
        weight: frozen.
        bias: of the layer, or None.
        adapter: LoRA on the layer, or None.
        output_scale: of the layer, or None.
        input_scale: of the layer, of any float dtype, or None.

    Returns:
        The output, in gate's dtype.
    """
    projection = Projection(weight, bias, adapter, output_scale, input_scale)
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
        if projection.input_scale is not None:
            product = scaled(product, projection.input_scale, product)
        stacks, is_kept = stacks_of((projection,), product.dtype), bool(shown.kept)
        low_ranks = [low_rank_of(product, stack) for stack in stacks]
        if is_trained and not is_kept:
            keep(ctx, gate, up, *shown.needed_low_ranks(stacks, low_ranks))
        ctx.projection, ctx.activation, ctx.shown = projection, activation, shown
        low_rank = low_ranks[0] if low_ranks else None
        output = output_of(product, projection, low_rank, is_inference=not is_trained, is_kept=is_kept)
        if is_kept:
            keep(ctx, gate, up, *shown.needed_low_ranks(stacks, low_ranks), output)
            output = with_scale(output, projection)
        return shaped_as(output, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # grad: (..., O)
        _, _, _, needs_gate, needs_up, *_ = ctx.needs_input_grad
        shown, projections, input_scale = ctx.shown, (ctx.projection,), ctx.projection.input_scale
        needs_factors = needs_gate or needs_up
        needs_input_grad = needs_factors or shown.trains_input_scale
        gate, up, *low_ranks = fetch(ctx)
        assert gate is not None
        assert up is not None
        grads = (as_tokens(grad),)
        scales = None
        if shown.has_output_scale:
            scales = OutputScaleBackward(grads, projections, shown.remade, shown.kept, low_ranks)
        adapters = AdapterBackward(grads, projections, needs_x=needs_input_grad, scales=scales)
        found = {"B": adapters.grads_B(low_ranks)}
        del low_ranks
        needs_product = shown.trains_A or shown.remade
        product = as_tokens(gated_product(gate, up, ctx.activation)) if needs_product else None
        if product is not None and input_scale is not None:
            product = scaled(product, input_scale, product)
        found["A"] = adapters.grads_A(product, shown.trains_A)
        if scales is not None:
            scales.tokens, found["output_scale"] = product if shown.remade else None, scales.found
        del product
        grad_gate = grad_up = None
        if needs_input_grad:
            grad_product = input_gradient(grads, projections, adapters, scales)
            if shown.trains_input_scale:  # once more, as kept until here it would be one tensor of its size more
                product = as_tokens(gated_product(gate, up, ctx.activation))
                found["input_scale"] = {0: summed_products(product, grad_product)}
                del product
            if input_scale is not None:
                grad_product = scaled(grad_product, input_scale, grad_product)
            if needs_factors:
                grad_gate, grad_up = gated_gradients(shaped_as(grad_product, gate), gate, up, ctx.activation)
        elif scales is not None:
            scales.remake_all()
        return None, None, None, grad_gate, grad_up, *shown.gradients(grads, found)
