"""The linear layer over a frozen NF4 weight, alone and with its LoRA adapter, as autograd functions that keep little.

The weight gets no gradient, so backward needs no dequantised copy of it: it dequantises the four-bit weight again and
multiplies, grad_x = grad_y @ W. What a plain `F.linear` would keep alive for each layer, the 16-bit weight, is what
QLoRA exists to avoid. The adapter's gradients need x and the rank-sized x A^T, and nothing else is kept: no cast of A
or B, no dropped-out input, no mask. The adapter's part is added into the base's output where it lies, and so is its
part of grad_x: neither is ever a second tensor of that size.

`add_lora` is the adapter's formula (Hu et al. 2021, arXiv:2106.09685) in plain torch; the function computes the same.

Left out: casting A and B once a step (they are cast at each use, and are rank-sized), gradients of gradients, and
autocast, which is not used here.

Legend: N tokens, I in features, O out features, R rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.nf4 import NF4Weight, dequantize_nf4


def nf4_linear(
    x: Tensor,  # (..., I)
    weight: NF4Weight,  # (O, I)
    bias: Tensor | None,  # (O,)
) -> Tensor:  # (..., O)
    """x @ W.T + bias in x's dtype: the weight is dequantised to it, the bias cast to it.

    Gradients go to x, and to the bias where it requires one (summed in the bias' dtype). Works under checkpointing.
    """
    return _NF4Linear.apply(x, weight, bias)


def lora_nf4_linear(
    x: Tensor,  # (..., I)
    weight: NF4Weight,  # (O, I)
    bias: Tensor | None,  # (O,)
    lora_A: Tensor,  # (R, I)
    lora_B: Tensor,  # (O, R)
    scaling: float,
    *,
    dropout: float = 0.0,  # a probability below 1, of the adapter's input
    dropout_seed: Tensor | None = None,  # () int64 on the CPU, as `draw_seed` gives it; needed where dropout is not 0
) -> Tensor:  # (..., O)
    """add_lora(nf4_linear(x, weight, bias), dropout(x), lora_A, lora_B, scaling), in x's dtype.

    A and B are multiplied in x's dtype; their gradients, and the bias', have the dtypes of A, B and the bias. For
    backward x itself is saved, so that layers with the same input keep it once, and x A^T (N, R); of these only what
    the gradients asked for need. The dropout mask is a function of the seed and the number of elements: backward
    makes it again. Works under checkpointing, where x is recomputed, and on fake tensors.
    """
    assert (dropout_seed is not None) or dropout == 0.0, "dropout needs a seed"
    seed = dropout_seed if dropout else None
    return _LoRANF4Linear.apply(x, weight, bias, lora_A, lora_B, scaling, dropout, seed)


def add_lora(
    base_output: Tensor,  # (..., O)
    x: Tensor,  # (..., I), after dropout
    lora_A: Tensor,  # (R, I)
    lora_B: Tensor,  # (O, R)
    scaling: float,
) -> Tensor:  # (..., O)
    """base_output + scaling * x A^T B^T, multiplied in x's dtype: the adapter beside any linear layer."""
    low_rank = F.linear(x, lora_A.to(x.dtype))  # (..., R)
    return base_output + F.linear(low_rank * scaling, lora_B.to(x.dtype))


def draw_seed() -> Tensor:  # () int64, on the CPU
    """A seed from torch's global CPU generator: restoring its state, as recomputation and resuming do, repeats it.

    A tensor, not an int, so that nothing is read from it on fake tensors.
    """
    return torch.randint(2**63 - 1, (), device="cpu")


def keep_mask(
    like: Tensor,  # (N, any)
    in_features: int,
    dropout: float,  # a probability below 1, rounded to a multiple of 1/65,536
    seed: Tensor,  # () int64 on the CPU
) -> Tensor:  # (N, I), dtype and device of `like`: 1 where kept, 0 where dropped
    """Dropout's mask, not scaled. The same seed, N and I give the same mask, in every dtype."""
    return torch.ops.qlora.keep_mask(like.detach(), in_features, dropout, seed)


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
        # Handles to the stored weight, not saved tensors: hooks that offload or recompute saved tensors pass them by.
        ctx.weight = weight
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _base_output(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:  # grad: (..., O)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dequantize_nf4(ctx.weight, grad.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = _bias_gradient(grad, ctx.bias_dtype)
        return grad_x, None, grad_bias


class _LoRANF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: NF4Weight,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout: float,
        seed: Tensor | None,  # None: no dropout
    ) -> Tensor:
        _, _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        factor = scaling / (1.0 - dropout)  # dropout's own factor goes where the tensor is small
        tokens = x.reshape(-1, x.shape[-1])  # (N, I)
        dropped = tokens if seed is None else keep_mask(tokens, tokens.shape[1], dropout, seed).mul_(tokens)
        low_rank = dropped @ lora_A.to(x.dtype).T  # (N, R)
        del dropped  # before the weight is dequantised, the largest thing here
        output = _base_output(x, weight, bias)
        output.view(-1, output.shape[-1]).addmm_(low_rank, lora_B.to(x.dtype).T, alpha=factor)
        # Handles, as above: the adapter is there until backward anyway, and its casts are made again.
        ctx.weight, ctx.lora_A, ctx.lora_B, ctx.factor = weight, lora_A, lora_B, factor
        ctx.dropout, ctx.seed = dropout, seed
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x if needs_A else None, low_rank if needs_B else None)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # grad: (..., O)
        needs_x, _, needs_bias, needs_A, needs_B, *_ = ctx.needs_input_grad
        x, low_rank = ctx.saved_tensors
        lora_A, lora_B, dtype = ctx.lora_A, ctx.lora_B, grad.dtype
        grad_x = grad_bias = grad_A = grad_B = None
        tokens_grad = grad.reshape(-1, grad.shape[-1])  # (N, O)
        if needs_B:
            grad_B = (tokens_grad.T @ low_rank).to(lora_B.dtype).mul_(ctx.factor)
        if needs_x or needs_A:
            low_rank_grad = tokens_grad @ lora_B.to(dtype)  # (N, R), not yet scaled
            mask = None if ctx.seed is None else keep_mask(tokens_grad, lora_A.shape[1], ctx.dropout, ctx.seed)
        if needs_A:
            tokens = x.reshape(-1, x.shape[-1])
            dropped = tokens if mask is None else mask * tokens
            grad_A = (low_rank_grad.T @ dropped).to(lora_A.dtype).mul_(ctx.factor)
            del dropped
        if needs_x:
            if mask is None:
                grad_x = tokens_grad @ dequantize_nf4(ctx.weight, dtype)  # (N, I)
                grad_x.addmm_(low_rank_grad, lora_A.to(dtype), alpha=ctx.factor)
            else:  # the other way round, so that the mask goes before the weight comes
                grad_x = (low_rank_grad @ lora_A.to(dtype)).mul_(mask)
                del mask
                grad_x.addmm_(tokens_grad, dequantize_nf4(ctx.weight, dtype), beta=ctx.factor)
            grad_x = grad_x.view(*grad.shape[:-1], lora_A.shape[1])
        if needs_bias:
            grad_bias = _bias_gradient(grad, ctx.bias_dtype)
        return grad_x, None, grad_bias, grad_A, grad_B, None, None, None


def _base_output(x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:  # (..., O), a new tensor, contiguous
    return F.linear(x, dequantize_nf4(weight, x.dtype), None if bias is None else bias.to(x.dtype))


def _bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:  # (O,)
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=dtype)


def _keep_mask(like: Tensor, in_features: int, dropout: float, seed: Tensor) -> Tensor:
    """Four elements from each 64-bit draw: several times faster on a CPU than a draw for each, as bernoulli_ makes."""
    elements = like.shape[0] * in_features
    generator = torch.Generator(like.device).manual_seed(int(seed))
    draws = torch.empty(-(elements // -4), dtype=torch.int64, device=like.device)
    lanes = draws.random_(-(2**63), None, generator=generator).view(torch.int16)[:elements]
    threshold = min(round(dropout * 65536), 65535) - 32768
    return (lanes >= threshold).view(like.shape[0], in_features).to(like.dtype)


def _keep_mask_fake(like: Tensor, in_features: int, dropout: float, seed: Tensor) -> Tensor:
    return like.new_empty((like.shape[0], in_features))


# An op, so that on fake tensors, whose seed cannot be read, nothing is drawn.
torch.library.define("qlora::keep_mask", "(Tensor like, SymInt in_features, float dropout, Tensor seed) -> Tensor")
torch.library.impl("qlora::keep_mask", "CompositeExplicitAutograd", _keep_mask)
torch.library.register_fake("qlora::keep_mask", _keep_mask_fake)
