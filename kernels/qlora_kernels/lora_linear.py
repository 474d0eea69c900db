"""Compute linear layers over a frozen NF4 weight, with their LoRA adapters, as one autograd function that keeps little.

The weight gets no gradient, so backward needs no dequantized copy of it: it dequantizes the four-bit weight again, into
the same workspace, and multiplies, grad_x = grad_y @ W. What a plain `F.linear` would keep alive for each layer, the
16-bit weight, is what QLoRA exists to avoid. The adapter's gradients need x and the rank-sized x A^T, and nothing else
is kept: no cast of A or B, no input after dropout, no mask. The adapter's part is added to the base's output in place,
and so is its part of grad_x: neither is ever a second tensor of that size. Layers over one input are one function: the
input is a matrix of tokens once and kept once, and their parts of its gradient are added in place.

Tensors are saved for backward before the large product is made. So where a layer is recomputed (torch's checkpointing
stops once it has what backward needs) a layer's last product is not made again.

A vector may scale a layer's output or its input (`Projection`): IA3 has such and no LoRA, DoRA has both. Those that
train are shown to autograd, whatever makes them; scale_gradients.py has their gradients.

`add_lora` is the adapter's formula (Hu et al. 2021, arXiv:2106.09685) in plain torch; the functions compute the same.
Left out: gradients of gradients, autocast, and the end of a gated MLP (gated_linear.py).

Legend: N tokens, I in features, O out features, R rank, S ranks of a stack together.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.adapter import Adapter, OutputScale, Projection, Shown, Stack, stacks_of
from qlora_kernels.adapter_gradients import AdapterBackward
from qlora_kernels.made_again import Making, making_of
from qlora_kernels.nf4 import NF4Weight, dequantized_blocks
from qlora_kernels.nf4_matmul import MOST_FEW, multiply, multiply_few
from qlora_kernels.products import linear, product
from qlora_kernels.saved_tensors import fetch, keep, visible
from qlora_kernels.scale_gradients import OutputScaleBackward, scaled, summed_products
from qlora_kernels.torch_internals import reshaped_without_view


def nf4_linear(
    x: Tensor,  # (..., I)
    weight: NF4Weight,  # (O, I)
    bias: Tensor | None,  # (O,)
    adapter: Adapter | None = None,
    output_scale: OutputScale | None = None,
    input_scale: Tensor | None = None,  # (I,)
) -> Tensor:  # (..., O)
    """Compute c * (z W^T + scaling * dropout(z) A^T B^T) + bias of z = l * x in x's dtype, without scales c = l = 1.

    The weight is dequantized to that dtype, A, B and the bias are cast, and products with a scale are rounded to it
    once. Gradients go to x, A, B, the bias and the scales, each in its own dtype. For backward x itself is saved, so
    that layers with the same input keep it once, and x A^T (N, R); of these only what the gradients asked for need. An
    output scale that trains has its layer's output before it (N, O) kept, or computed again. Dropout's mask is a
    function of the seed and the number of elements: backward makes it again. Works under checkpointing, where x is
    recomputed, and on fake tensors.

    Args:
        x: the input.
        weight: frozen.
        bias: of the layer, or None.
        adapter: LoRA on the layer, or None.
        output_scale: c, or None.
        input_scale: l, of any float dtype, or None.

    Returns:
        The output.
    """
    return nf4_linears(x, (Projection(weight, bias, adapter, output_scale, input_scale),))[0]


def nf4_linears(
    x: Tensor,  # (..., I)
    projections: Sequence[Projection],
) -> tuple[Tensor, ...]:  # (..., O) of each
    """Compute `nf4_linear` of several layers over one input, which is saved once.

    Args:
        x: the input.
        projections: the layers; one with an input scale is alone.

    Returns:
        Their outputs.
    """
    shown = Shown(projections, is_called_back=x.requires_grad)
    return _NF4Linears.apply(projections, shown, making_of(x), *visible(x, *shown.tensors))


def add_lora(
    base_output: Tensor,  # (..., O)
    x: Tensor,  # (..., I), after dropout
    lora_A: Tensor,  # (R, I)
    lora_B: Tensor,  # (O, R)
    scaling: float,
) -> Tensor:  # (..., O)
    """Compute base_output + scaling * x A^T B^T, multiplied in x's dtype: an adapter on any linear layer.

    Args:
        base_output: of the layer without its adapter.
        x: the layer's input, after dropout.
        lora_A: of any floating dtype.
        lora_B: of any floating dtype.
        scaling: of the adapter.

    Returns:
        The output.
    """
    low_rank = F.linear(x, lora_A.to(x.dtype))  # (..., R)
    return base_output + F.linear(low_rank * scaling, lora_B.to(x.dtype))


class _NF4Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projections: Sequence[Projection], shown: Shown, making: Making | None, x: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        tokens, is_trained, kept = as_tokens(x), any(ctx.needs_input_grad), shown.kept
        input_scale = projections[0].input_scale
        if input_scale is not None:
            tokens = scaled(tokens, input_scale)
        stacks = stacks_of(projections, x.dtype)
        low_ranks = [low_rank_of(tokens, stack) for stack in stacks]
        input_kept = (making.source if making else x) if shown.needs_input else None
        if is_trained and not kept:
            keep(ctx, input_kept, *shown.needed_low_ranks(stacks, low_ranks))
        # Not as saved tensors: hooks that offload or recompute those must leave weights and adapters alone.
        ctx.projections, ctx.shown, ctx.make = projections, shown, making.make if making else None
        parts: list[Tensor | None] = [None] * len(projections)
        for stack, of_stack in zip(stacks, low_ranks, strict=True):
            for (place, _), part in zip(stack.members, stack.split(of_stack, 1), strict=True):
                parts[place] = part
        outputs = []
        for place, (projection, low_rank) in enumerate(zip(projections, parts, strict=True)):
            assert projection.input_scale is None or len(projections) == 1, "layers over one scaled input"
            is_kept = place in kept
            output = output_of(tokens, projection, low_rank, is_inference=not is_trained, is_kept=is_kept)
            outputs.append(output if is_kept else shaped_as(output, x))
        if kept:
            of_scales = [outputs[place] for place in kept]
            keep(ctx, input_kept, *shown.needed_low_ranks(stacks, low_ranks), *of_scales)
            for place in kept:
                outputs[place] = shaped_as(with_scale(outputs[place], projections[place]), x)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # (..., O) each
        projections, shown, needs_x = ctx.projections, ctx.shown, ctx.needs_input_grad[3]
        input_scale, needs_input_grad = projections[0].input_scale, needs_x or shown.trains_input_scale
        x, *low_ranks = fetch(ctx)
        tokens_grads = [as_tokens(grad) for grad in grads]
        scales = None
        if shown.has_output_scale:
            scales = OutputScaleBackward(tokens_grads, projections, shown.remade, shown.kept, low_ranks)
        adapters = AdapterBackward(tokens_grads, projections, needs_x=needs_input_grad, scales=scales)
        found = {"B": adapters.grads_B(low_ranks)}
        del low_ranks
        if x is not None and ctx.make:
            x = ctx.make(x)
        tokens = inputs = None if x is None else as_tokens(x)
        del x
        if inputs is not None and input_scale is not None:
            inputs = scaled(inputs, input_scale)
        found["A"] = adapters.grads_A(inputs, shown.trains_A)
        if scales is not None:
            scales.tokens, found["output_scale"] = inputs if shown.remade else None, scales.found
        del inputs
        if not shown.trains_input_scale:
            tokens = None
        grad_x = None
        if needs_input_grad:
            grad_inputs = input_gradient(tokens_grads, projections, adapters, scales)
            if tokens is not None:
                found["input_scale"] = {0: summed_products(tokens, grad_inputs)}
            if input_scale is not None:
                grad_inputs = scaled(grad_inputs, input_scale, grad_inputs)
            grad_x = shaped_as(grad_inputs, grads[0]) if needs_x else None
        elif scales is not None:
            scales.remake_all()
        return None, None, None, grad_x, *shown.gradients(tokens_grads, found)


def as_tokens(x: Tensor) -> Tensor:  # (N, W)
    """Return what has a vector for each token as a matrix of tokens.

    Args:
        x: (..., W).

    Returns:
        The matrix; x itself where it is one.
    """
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def shaped_as(matrix: Tensor, like: Tensor) -> Tensor:  # (..., W)
    """Return a matrix of tokens with the dimensions that the tokens have in another tensor.

    Args:
        matrix: (N, W), contiguous.
        like: (..., any), of N tokens.

    Returns:
        The tensor, with the matrix's memory; no view, as autograd forbids models (Falcon) to add into a view of one
        that was made inside a function.
    """
    return matrix if like.dim() == 2 else reshaped_without_view(matrix, [*like.shape[:-1], matrix.shape[1]])


def low_rank_of(tokens: Tensor, stack: Stack) -> Tensor:  # (N, S)
    """Compute dropout(x) A^T, not scaled.

    Args:
        tokens: (N, I), the layers' input.
        stack: on the layers.

    Returns:
        The product.
    """
    mask = stack.first.keep_mask(tokens) if stack.first.dropout else None
    return linear(tokens if mask is None else mask.mul_(tokens), stack.A)


def output_of(
    tokens: Tensor,
    projection: Projection,
    low_rank: Tensor | None,
    *,
    is_inference: bool,
    is_kept: bool = False,
) -> Tensor:  # (N, O), a new tensor, contiguous
    """Compute a layer's output, the adapter's part added in place, and scaled there.

    Args:
        tokens: (N, I), the layer's input, scaled where it has an input scale.
        projection: the layer.
        low_rank: (N, R), the adapter's part of what `low_rank_of` gives; None without an adapter.
        is_inference: take the product for few tokens where there are few.
        is_kept: leave the output scale, which the layer has, and the bias to `with_scale`.

    Returns:
        The output.
    """
    weight, bias, adapter, output_scale, _ = projection
    multiplied = multiply_few if is_inference and tokens.shape[0] <= MOST_FEW else multiply
    output = multiplied(tokens, weight, None if bias is None or output_scale is not None else bias.to(tokens.dtype))
    if adapter is not None and low_rank is not None:
        output.addmm_(low_rank, adapter.transposed_B_in(tokens.dtype), alpha=adapter.factor)
    return output if output_scale is None or is_kept else with_scale(output, projection, output)


def with_scale(
    output: Tensor,  # (N, O)
    projection: Projection,
    out: Tensor | None = None,  # (N, O)
) -> Tensor:  # (N, O)
    """Compute output_scale * output + bias.

    Args:
        output: of the layer, before both.
        projection: the layer, with a scale.
        out: takes the result, and may be `output`; None: a new tensor does.

    Returns:
        The result.
    """
    assert projection.output_scale is not None
    output = scaled(output, projection.output_scale.values, out)
    if projection.bias is not None:
        output += projection.bias.to(output.dtype)
    return output


def input_gradient(
    grads: Sequence[Tensor],  # (N, O) each
    projections: Sequence[Projection],
    adapters: AdapterBackward | None = None,
    scales: OutputScaleBackward | None = None,
) -> Tensor:  # (N, I)
    """Compute the gradient of the input of layers, where it is scaled: the sum of grad W, and the adapters' part.

    Args:
        grads: of each layer's output.
        projections: the layers.
        adapters: None without any; their `grads_A` was called.
        scales: of the outputs, with their `tokens`, which go; None without any.

    Returns:
        The gradient, a new tensor.
    """
    grad_x = None if adapters is None else adapters.with_dropout()
    for place, (grad, projection) in enumerate(zip(grads, projections, strict=True)):
        for rows, values in dequantized_blocks(projection.weight, grad.dtype):
            part = grad if values.shape[0] == grad.shape[1] else grad[:, rows]
            if scales is not None:
                part = scales.before_scale(place, rows, values, part)
            grad_x = product(part, values) if grad_x is None else grad_x.addmm_(part, values)
    assert grad_x is not None
    if scales is not None:
        scales.tokens = None
    if adapters is not None:
        adapters.add_without_dropout(grad_x)
    return grad_x
