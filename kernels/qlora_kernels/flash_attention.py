"""Attend over packed documents by torch's flash attention, as one node of autograd, on heads as a model lays them out.

torch's function for packed documents (torch.nn.attention.varlen) takes (T, H, D) and is an operation written in Python
around the kernel. Here the kernel is called directly, with the same arguments, on views that autograd does not see: in
a layer of a model that is seven nodes fewer. Results, and what is kept for backward, are the same. Left out: where the
operations are not known (torch_features.py), and which heads go together (varlen_attention.py).

Legend: Hq query heads, Hkv key heads, T tokens of all documents, D head size, N documents.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.saved_tensors import fetch, keep, visible
from qlora_kernels.torch_internals import flash_attention_operations, reshaped_without_view


def flash_attention(
    query: Tensor,  # (1, Hq, T, D) of 16 bits, on a CUDA card or planned for one
    key: Tensor,  # (1, Hkv, T, D)
    value: Tensor,  # (1, Hkv, T, D)
    bounds: Tensor,  # (N+1,) int32, on the device of the query
    longest: int,
    scale: float,
    window: int | None,
) -> Tensor:  # (1, T, Hq, D)
    """Compute causal attention within each document, as `varlen_attention` defines it.

    Args:
        query: of all documents.
        key: of all documents.
        value: of all documents.
        bounds: the documents' bounds.
        longest: tokens of the longest document.
        scale: what products of queries and keys are multiplied by.
        window: token i sees tokens j with i - window < j <= i; None: all before it.

    Returns:
        The output, heads after tokens.
    """
    return _FlashAttention.apply(*visible(query, key, value), bounds, longest, scale, window)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: Tensor,
        longest: int,
        scale: float,
        window: int | None,
    ) -> Tensor:
        heads = [tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value)]  # (T, H, D)
        # Tokens to the left, the query's own not counted, and to the right.
        left = -1 if window is None else window - 1
        sides = {"scale": scale, "window_size_left": left, "window_size_right": 0}
        forward, _ = flash_attention_operations()
        documents = (bounds, bounds, longest, longest, 0.0, window is None)  # without dropout
        output, normalizers, random, *_ = forward(*heads, *documents, False, **sides)
        if any(ctx.needs_input_grad):
            keep(ctx, *heads, output, normalizers, bounds, random)
            ctx.documents, ctx.sides = documents[2:], sides
        return reshaped_without_view(output, [1, *output.shape])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # grad: (1, T, Hq, D)
        *kept, bounds, random = fetch(ctx)
        _, backward = flash_attention_operations()
        unused = grad.new_empty(0)
        gradients = backward(grad.squeeze(0), *kept, bounds, bounds, *ctx.documents, random, unused, **ctx.sides)
        return *(gradient.transpose(0, 1).unsqueeze(0) for gradient in gradients), None, None, None, None
