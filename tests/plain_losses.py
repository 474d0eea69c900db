"""What the chunked loss is compared with: the loss of whole logits in plain torch, and heads held in 4 or 8 bits."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora_kernels.int8 import Int8Weight, dequantize_int8
from qlora_kernels.nf4 import NF4Weight, dequantize_nf4


class Quantized:
    """HeadRows over a weight of 4 or 8 bits, which notes how many elements it made at once."""

    def __init__(self, weight: NF4Weight | Int8Weight) -> None:
        self.weight, self.shape, self.made = weight, weight.shape, [0]

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        self.made.append((stop - start) * self.shape[1])
        if isinstance(self.weight, NF4Weight):
            return dequantize_nf4(self.weight, dtype, rows=slice(start, stop))
        return dequantize_int8(self.weight, dtype, rows=slice(start, stop))

    def whole(self, dtype: torch.dtype) -> Tensor:
        return Quantized(self.weight).rows(0, self.shape[0], dtype)


def plain_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Products in the dtype of the hidden states, all else in fp32, or in fp64."""
    logits = (hidden @ head.T).to(torch.promote_types(hidden.dtype, torch.float32))
    logits = (logits if bias is None else logits + bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, reduction="sum")


def value_and_gradient(
    loss: Any, hidden: Tensor, *arguments: Any, incoming: float = 3.0, **options: Any
) -> tuple[Tensor, Tensor]:
    """The value of a loss, and the gradient of the hidden states for an incoming gradient of the value."""
    leaf = hidden.detach().clone().requires_grad_()
    value = loss(leaf, *arguments, **options)
    (incoming * value).backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad
