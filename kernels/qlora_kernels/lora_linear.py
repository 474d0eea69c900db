"""Compute linear layers over a frozen NF4 weight, with their LoRA adapters, as autograd functions that keep little.

The weight gets no gradient, so backward needs no dequantized copy of it: it dequantizes the four-bit weight again, into
the same workspace, and multiplies, grad_x = grad_y @ W. What a plain `F.linear` would keep alive for each layer, the
16-bit weight, is what QLoRA exists to avoid. The adapter's gradients need x and the rank-sized x A^T, and nothing else
is kept: no cast of A or B, no input after dropout, no mask. The adapter's part is added to the base's output in place,
and so is its part of grad_x: neither is ever a second tensor of that size.

Tensors are saved for backward before the large product is made. So where a layer is recomputed (torch's checkpointing
stops once it has what backward needs) a layer's last product is not made again.

`add_lora` is the adapter's formula (Hu et al. 2021, arXiv:2106.09685) in plain torch; the functions compute the same.
Left out: gradients of gradients, autocast, and the end of a gated MLP (gated_linear.py).

Legend: N tokens, I in features, O out features, R rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.adapter import Adapter, shown_to_autograd, trains_B
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
    A, B = shown_to_autograd(adapter)
    return _NF4Linear.apply(*visible(x, bias, A, B), weight, adapter)


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


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        weight: NF4Weight,
        adapter: Adapter | None,
    ) -> Tensor:
        _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        needs_B = trains_B(adapter, needs_A, needs_B)
        tokens = as_tokens(x)
        low_rank = None if adapter is None else low_rank_of(tokens, adapter)
        if needs_A or needs_B:
            keep(ctx, x if needs_A else None, low_rank if needs_B else None)
        # Not as saved tensors: hooks that offload or recompute those must leave weight and adapter alone.
        ctx.weight, ctx.adapter = weight, adapter
        ctx.bias_dtype = None if bias is None else bias.dtype
        output = output_of(tokens, weight, bias, adapter, low_rank, is_inference=not any(ctx.needs_input_grad))
        return shaped_as(output, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # grad: (..., O)
        needs_x, needs_bias, needs_A, needs_B, *_ = ctx.needs_input_grad
        needs_B = trains_B(ctx.adapter, needs_A, needs_B)
        x, low_rank = fetch(ctx) if needs_A or needs_B else (None, None)
        tokens_grad = as_tokens(grad)
        adapter = AdapterBackward(tokens_grad, ctx.adapter) if ctx.adapter is not None else None
        grad_B = adapter.grad_B(low_rank) if adapter and needs_B and low_rank is not None else None
        del low_rank
        grad_A = adapter.grad_A(as_tokens(x)) if adapter and needs_A and x is not None else None
        del x
        grad_x = input_gradient(tokens_grad, ctx.weight, adapter) if needs_x else None
        grad_bias = tokens_grad.sum(0, dtype=ctx.bias_dtype) if needs_bias else None
        return None if grad_x is None else shaped_as(grad_x, grad), grad_bias, grad_A, grad_B, None, None


class AdapterBackward:
    """Compute the adapter's gradients from one output gradient, in the order in which memory is least.

    Args:
        tokens_grad: (N, O), of the layer's output.
        adapter: as given to forward.
    """

    def __init__(self, tokens_grad: Tensor, adapter: Adapter) -> None:
        self.adapter = adapter
        self.tokens_grad = tokens_grad
        self.A = adapter.A_in(tokens_grad.dtype)
        self.low_rank_grad = product(tokens_grad, adapter.B_in(tokens_grad.dtype))  # (N, R), not yet scaled
        self.mask = adapter.keep_mask(tokens_grad)

    def grad_B(self, low_rank: Tensor) -> Tensor | None:
        """Compute the gradient of B.

        Args:
            low_rank: x A^T (N, R), as forward had it.

        Returns:
            (O, R), in the dtype of B; None where it was added to the adapter's `grads`.
        """
        return self._scaled(product(low_rank.T, self.tokens_grad).T, 1, self.adapter.lora_B.dtype)

    def grad_A(self, tokens: Tensor) -> Tensor | None:
        """Compute the gradient of A.

        Args:
            tokens: (N, I), the layer's input.

        Returns:
            (R, I), in the dtype of A; None where it was added to the adapter's `grads`.
        """
        dropped = tokens if self.mask is None else self.mask * tokens
        return self._scaled(product(self.low_rank_grad.T, dropped), 0, self.adapter.lora_A.dtype)

    def _scaled(self, found: Tensor, place: int, dtype: torch.dtype) -> Tensor | None:
        """Scale a gradient, and add it where the adapter keeps its own."""
        if self.adapter.grads is None:
            return found.to(dtype).mul_(self.adapter.factor)
        self.adapter.grads[place].add_(found, alpha=self.adapter.factor)
        return None


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


def low_rank_of(tokens: Tensor, adapter: Adapter) -> Tensor:  # (N, R)
    """Compute dropout(x) A^T, not scaled.

    Args:
        tokens: (N, I), the layer's input.
        adapter: on the layer.

    Returns:
        The product.
    """
    mask = adapter.keep_mask(tokens)
    return linear(tokens if mask is None else mask.mul_(tokens), adapter.A_in(tokens.dtype))


def output_of(
    tokens: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    adapter: Adapter | None,
    low_rank: Tensor | None,
    *,
    is_inference: bool,
) -> Tensor:  # (N, O), a new tensor, contiguous
    """Compute a layer's output, the adapter's part added in place.

    Args:
        tokens: (N, I), the layer's input.
        weight: (O, I).
        bias: (O,), or None.
        adapter: on the layer, or None.
        low_rank: (N, R), as `low_rank_of` gives it; None without an adapter.
        is_inference: take the product for few tokens where there are few.

    Returns:
        The output.
    """
    multiplied = multiply_few if is_inference and len(tokens) <= MOST_FEW else multiply
    output = multiplied(tokens, weight, None if bias is None else bias.to(tokens.dtype))
    if adapter is not None and low_rank is not None:
        output.addmm_(low_rank, adapter.transposed_B_in(tokens.dtype), alpha=adapter.factor)
    return output


def input_gradient(
    tokens_grad: Tensor,  # (N, O)
    weight: NF4Weight,  # (O, I)
    adapter: AdapterBackward | None = None,
) -> Tensor:  # (N, I)
    """Compute the gradient of a layer's input: grad W, and the adapter's part.

    Args:
        tokens_grad: of the output.
        weight: frozen.
        adapter: None without an adapter; its mask is used up.

    Returns:
        The gradient.
    """
    grad_x = None
    if adapter is not None and adapter.mask is not None:  # first, so that the mask goes before the weight comes
        grad_x = (
            (adapter.low_rank_grad @ adapter.adapter.A_in(tokens_grad.dtype))
            .mul_(adapter.mask)
            .mul_(adapter.adapter.factor)
        )
        adapter.mask = None
    for rows, values in dequantized_blocks(weight, tokens_grad.dtype):
        part = tokens_grad if len(values) == weight.shape[0] else tokens_grad[:, rows]
        grad_x = product(part, values) if grad_x is None else grad_x.addmm_(part, values)
    assert grad_x is not None
    if adapter is not None and not adapter.adapter.dropout:
        grad_x.addmm_(adapter.low_rank_grad, adapter.A, alpha=adapter.adapter.factor)
    return grad_x
