"""Compute linear layers over a frozen NF4 weight, with their LoRA adapters, as one autograd function that keeps little.

The weight gets no gradient, so backward needs no dequantized copy of it: it dequantizes the four-bit weight again, into
the same workspace, and multiplies, grad_x = grad_y @ W. What a plain `F.linear` would keep alive for each layer, the
16-bit weight, is what QLoRA exists to avoid. The adapter's gradients need x and the rank-sized x A^T, and nothing else
is kept: no cast of A or B, no input after dropout, no mask. The adapter's part is added to the base's output in place,
and so is its part of grad_x: neither is ever a second tensor of that size. Layers over one input are one function: the
input is a matrix of tokens once and kept once, and their parts of its gradient are added in place.

Tensors are saved for backward before the large product is made. So where a layer is recomputed (torch's checkpointing
stops once it has what backward needs) a layer's last product is not made again.

`add_lora` is the adapter's formula (Hu et al. 2021, arXiv:2106.09685) in plain torch; the functions compute the same.
Left out: gradients of gradients, autocast, and the end of a gated MLP (gated_linear.py).

Legend: N tokens, I in features, O out features, R rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.adapter import Adapter, Projection, Shown, Stack, stacks_of
from qlora_kernels.adapter_gradients import AdapterBackward
from qlora_kernels.made_again import Making, making_of
from qlora_kernels.nf4 import NF4Weight, dequantized_blocks
from qlora_kernels.nf4_matmul import MOST_FEW, multiply, multiply_few
from qlora_kernels.products import linear, product
from qlora_kernels.saved_tensors import fetch, keep, visible
from qlora_kernels.torch_internals import reshaped_without_view


def nf4_linear(
    x: Tensor,  # (..., I)
    weight: NF4Weight,  # (O, I)
    bias: Tensor | None,  # (O,)
    adapter: Adapter | None = None,
) -> Tensor:  # (..., O)
    """Compute x W^T + bias + scaling * dropout(x) A^T B^T in x's dtype.

    The weight is dequantized to that dtype, the others are cast. Gradients go to x, A, B and the bias, each in its own
    dtype. For backward x itself is saved, so that layers with the same input keep it once, and x A^T (N, R); of these
    only what the gradients asked for need. Dropout's mask is a function of the seed and the number of elements:
    backward makes it again. Works under checkpointing, where x is recomputed, and on fake tensors.

    Args:
        x: the input.
        weight: frozen.
        bias: of the layer, or None.
        adapter: LoRA on the layer, or None.

    Returns:
        The output.
    """
    return nf4_linears(x, (Projection(weight, bias, adapter),))[0]


def nf4_linears(
    x: Tensor,  # (..., I)
    projections: Sequence[Projection],
) -> tuple[Tensor, ...]:  # (..., O) of each
    """Compute `nf4_linear` of several layers over one input, which is saved once.

    Args:
        x: the input.
        projections: the layers.

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
        tokens, is_trained = as_tokens(x), any(ctx.needs_input_grad)
        stacks = stacks_of(projections, x.dtype)
        low_ranks = [low_rank_of(tokens, stack) for stack in stacks]
        if is_trained:
            kept = (making.source if making else x) if shown.trains_A else None
            keep(ctx, kept, *shown.needed_for_B(stacks, low_ranks))
        # Not as saved tensors: hooks that offload or recompute those must leave weights and adapters alone.
        ctx.projections, ctx.shown, ctx.make = projections, shown, making.make if making else None
        parts: list[Tensor | None] = [None] * len(projections)
        for stack, of_stack in zip(stacks, low_ranks, strict=True):
            for (place, _), part in zip(stack.members, stack.split(of_stack, 1), strict=True):
                parts[place] = part
        outputs = []
        for projection, low_rank in zip(projections, parts, strict=True):
            outputs.append(shaped_as(output_of(tokens, projection, low_rank, is_inference=not is_trained), x))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # (..., O) each
        projections, shown, needs_x = ctx.projections, ctx.shown, ctx.needs_input_grad[3]
        x, *low_ranks = fetch(ctx)
        tokens_grads = [as_tokens(grad) for grad in grads]
        adapters = AdapterBackward(tokens_grads, projections, needs_x=needs_x)
        grads_B = adapters.grads_B(low_ranks)
        del low_ranks
        if x is not None and ctx.make:
            x = ctx.make(x)
        grads_A = adapters.grads_A(None if x is None else as_tokens(x), shown.trains_A)
        del x
        grad_x = shaped_as(input_gradient(tokens_grads, projections, adapters), grads[0]) if needs_x else None
        return None, None, None, grad_x, *shown.gradients(tokens_grads, grads_A, grads_B)


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
) -> Tensor:  # (N, O), a new tensor, contiguous
    """Compute a layer's output, the adapter's part added in place.

    Args:
        tokens: (N, I), the layer's input.
        projection: the layer.
        low_rank: (N, R), the adapter's part of what `low_rank_of` gives; None without an adapter.
        is_inference: take the product for few tokens where there are few.

    Returns:
        The output.
    """
    weight, bias, adapter = projection
    multiplied = multiply_few if is_inference and tokens.shape[0] <= MOST_FEW else multiply
    output = multiplied(tokens, weight, None if bias is None else bias.to(tokens.dtype))
    if adapter is not None and low_rank is not None:
        output.addmm_(low_rank, adapter.transposed_B_in(tokens.dtype), alpha=adapter.factor)
    return output


def input_gradient(
    grads: Sequence[Tensor],  # (N, O) each
    projections: Sequence[Projection],
    adapters: AdapterBackward | None = None,
) -> Tensor:  # (N, I)
    """Compute the gradient of the input of layers: the sum of grad W, and the adapters' part.

    Args:
        grads: of each layer's output.
        projections: the layers.
        adapters: None without any; their `grads_A` was called.

    Returns:
        The gradient, a new tensor.
    """
    grad_x = None if adapters is None else adapters.with_dropout()
    for grad, projection in zip(grads, projections, strict=True):
        for rows, values in dequantized_blocks(projection.weight, grad.dtype):
            part = grad if values.shape[0] == grad.shape[1] else grad[:, rows]
            grad_x = product(part, values) if grad_x is None else grad_x.addmm_(part, values)
    assert grad_x is not None
    if adapters is not None:
        adapters.add_without_dropout(grad_x)
    return grad_x
