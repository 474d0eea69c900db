"""Multiply with an NF4 weight: x W^T + bias, the weight dequantized to x's dtype.

`multiply` takes any number of tokens: it dequantizes into the weight's workspace, and multiplies as `products` does.
`multiply_few` is for generation, where one to sixteen tokens meet each weight: there reading the weight is all the
cost, and the fast version (`nf4_matmul_triton`) reads the four bits and nothing else, where dequantizing first writes
and reads back two bytes a weight besides. Both give the same products summed in another order.

Legend: N tokens, I in features, O out features.
"""

import dataclasses

import torch
from torch import Tensor

from qlora_kernels.nf4 import NF4Weight, dequantized_blocks
from qlora_kernels.products import linear
from qlora_kernels.registry import define, from_triton

MOST_FEW = 16
"""Tokens that `multiply_few` takes: one tile of a tensor core. From some more on the product itself is the cost."""


def multiply(
    x: Tensor,  # (N, I)
    weight: NF4Weight,  # (O, I)
    bias: Tensor | None,  # (O,) of x's dtype
) -> Tensor:  # (N, O), a new tensor, contiguous
    """Compute x W^T + bias, a block of the weight's rows at a time where its workspace is smaller than the weight.

    Args:
        x: the tokens.
        weight: quantized.
        bias: or None.

    Returns:
        The product.
    """
    output, out_features = None, weight.shape[0]
    for rows, values in dequantized_blocks(weight, x.dtype):
        if values.shape[0] == out_features:
            return linear(x, values, bias)
        output = x.new_empty(len(x), out_features) if output is None else output
        torch.mm(x, values.T, out=output[:, rows])
        if bias is not None:
            output[:, rows] += bias[rows]
    assert output is not None
    return output


def multiply_few(
    x: Tensor,  # (N, I), N at most MOST_FEW
    weight: NF4Weight,  # (O, I)
    bias: Tensor | None,  # (O,) of x's dtype
) -> Tensor:  # (N, O), a new tensor, contiguous
    """Compute `multiply` for few tokens, without gradients: the sum in fp32 (fp64 for fp64), rounded once to x's dtype.

    Args:
        x: the tokens.
        weight: quantized.
        bias: or None.

    Returns:
        The product.
    """
    assert len(x) <= MOST_FEW, f"multiply_few takes {MOST_FEW} tokens at most"
    tables = (weight.packed, weight.absmax, weight.nested_absmax, weight.nested_code, weight.offset)
    return torch.ops.qlora_kernels.nf4_matmul_few(
        x, *tables, bias, weight.workspace, weight.shape[0], weight.block_size, weight.nested_block_size
    )


def multiply_few_torch(
    x: Tensor,  # (N, I)
    packed: Tensor,  # (bytes,) uint8
    absmax: Tensor,  # (blocks,) uint8
    nested_absmax: Tensor,  # (nested blocks,) fp32
    nested_code: Tensor,  # (256,) fp32
    offset: Tensor,  # () fp32
    bias: Tensor | None,  # (O,)
    workspace: Tensor | None,  # (any,), overwritten
    out_features: int,
    block_size: int,
    nested_block_size: int,
) -> Tensor:  # (N, O)
    """Define `multiply_few` in plain torch: dequantize to x's dtype, then multiply.

    Args:
        x: the tokens.
        packed: of the weight.
        absmax: of the weight.
        nested_absmax: of the weight.
        nested_code: of the weight.
        offset: of the weight.
        bias: or None.
        workspace: of the weight, or None.
        out_features: O.
        block_size: of the format.
        nested_block_size: of the format.

    Returns:
        The product.
    """
    shape = (out_features, x.shape[1])
    tables = (packed, absmax, nested_absmax, nested_code, offset)
    weight = NF4Weight(*tables, shape, block_size, nested_block_size)
    if workspace is not None:
        weight = dataclasses.replace(weight, workspace=workspace)
    return multiply(x, weight, bias)


define(
    "nf4_matmul_few(Tensor x, Tensor packed, Tensor absmax, Tensor nested_absmax, Tensor nested_code, Tensor offset,"
    " Tensor? bias, Tensor(a!)? workspace, SymInt out_features, int block_size, int nested_block_size) -> Tensor",
    multiply_few_torch,
    lambda x, *others: x.new_empty(x.shape[0], others[-3]),
    cuda=from_triton("nf4_matmul_triton", "multiply_few_triton"),
)
