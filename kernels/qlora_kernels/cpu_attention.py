"""Attend to documents laid end to end by torch's fused kernel on a CPU, and keep their output once.

The kernel takes one document. Through autograd each call keeps an output of its own, and what is made of the outputs,
one tensor of all documents, is kept a second time by the layer that comes next. Here the outputs are written into that
tensor, and backward reads them there; it writes each document's gradients into its part of those of all. The kernel is
the one that `F.scaled_dot_product_attention` takes, so all values are its values, to the last bit.

Left out: which documents the kernel can take (varlen_attention.py).

Legend: Hq query heads, Hkv key heads, T tokens of all documents, D head size.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.saved_tensors import fetch, keep, visible
from qlora_kernels.torch_internals import cpu_flash_attention, cpu_flash_attention_backward, takes_cpu_flash_attention


def takes_documents(
    query: Tensor,  # (1, Hq, T, D)
    key: Tensor,  # (1, Hkv, T, D)
    value: Tensor,  # (1, Hkv, T, D)
) -> bool:
    """Return True if torch would take the kernel for these tensors.

    Args:
        query: of all documents.
        key: of all documents.
        value: of all documents.

    Returns:
        True if `attend_to_documents` can be called.
    """
    return (
        query.device.type == "cpu"
        and all(tensor.stride(3) == 1 for tensor in (query, key, value))
        and takes_cpu_flash_attention(query.shape[1], key.shape[1], query.shape[3], value.shape[3], query.dtype)
    )


def attend_to_documents(
    query: Tensor,  # (1, Hq, T, D)
    key: Tensor,  # (1, Hkv, T, D)
    value: Tensor,  # (1, Hkv, T, D)
    lengths: Sequence[int],
    scale: float,
) -> Tensor:  # (1, T, Hq, D)
    """Compute softmax(scale * q @ k.T) @ v within each document, causal.

    Args:
        query: of all documents.
        key: of all documents.
        value: of all documents.
        lengths: tokens of each document, in order.
        scale: what products of queries and keys are multiplied by.

    Returns:
        The output, heads after tokens, contiguous.
    """
    return _Documents.apply(*visible(query, key, value), lengths, scale)


class _Documents(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float
    ) -> Tensor:  # (1, T, Hq, D)
        output, normalizers = _by_document(cpu_flash_attention(), (query, key, value), lengths, scale)
        output = output.transpose(1, 2)
        if any(ctx.needs_input_grad[:3]):
            keep(ctx, query, key, value, output, normalizers)
        ctx.lengths, ctx.scale = lengths, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # grad: (1, T, Hq, D)
        query, key, value, output, normalizers = fetch(ctx)
        assert output is not None
        tensors = grad.transpose(1, 2), query, key, value, output.transpose(1, 2), normalizers
        return (*_by_document(cpu_flash_attention_backward(), tensors, ctx.lengths, ctx.scale), None, None)


def _by_document(
    operation: Callable[..., Sequence[Tensor]], tensors: Sequence[Any], lengths: Sequence[int], scale: float
) -> Sequence[Tensor]:
    """Run an operation on each document's part of tensors (1, any, T, ...); return the results of all, heads last."""
    if len(lengths) == 1:
        return operation(*tensors, 0.0, True, scale=scale)
    whole: list[Tensor] = []
    for start, length in zip(accumulate(lengths, initial=0), lengths, strict=False):
        results = operation(*(tensor.narrow(2, start, length) for tensor in tensors), 0.0, True, scale=scale)
        if not whole:
            shapes = [(1, sum(lengths), result.shape[1], *result.shape[3:]) for result in results]
            whole = [result.new_empty(shape).transpose(1, 2) for result, shape in zip(results, shapes, strict=True)]
        for result, all_results in zip(results, whole, strict=True):
            all_results.narrow(2, start, length).copy_(result)
        del results, result  # or they would still be there when the next document's are made
    return whole
