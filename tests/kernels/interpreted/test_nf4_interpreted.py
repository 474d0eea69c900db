"""The NF4 kernels, interpreted: dequantizing has the bits of plain torch, products with few tokens err little more."""

import pytest
import torch
from random_tensors import normal
from torch import Tensor
from triton_support import between_guards

from qlora_kernels import nf4_matmul_triton, nf4_triton
from qlora_kernels.nf4 import NF4Weight, dequantize_nf4, quantize_nf4
from qlora_kernels.nf4_matmul import multiply_few_torch
from qlora_kernels.nf4_reference import dequantize_torch

TABLES = ("packed", "absmax", "nested_absmax", "nested_code", "offset")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One element; odd counts; rows that begin inside a block or inside a byte; more than one program; a last one not full.
CASES = {
    "one element": ((1, 1), slice(None)),
    "short block": ((1, 63), slice(None)),
    "whole blocks": ((5, 128), slice(None)),
    "several programs": ((37, 129), slice(None)),
    "rows at a block": ((9, 64), slice(3, 8)),
    "rows inside a block": ((50, 66), slice(17, 40)),
    "rows inside a byte": ((51, 65), slice(3, 46)),
    "last row": ((51, 65), slice(-1, None)),
    "nested blocks": ((3, 64 * 257), slice(1, 2)),
    "one column": ((2049, 1), slice(1, None)),  # half a byte more than one program's
    "no row": ((3, 64), slice(2, 2)),
}


Tables = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def tables_of(weight: NF4Weight) -> Tables:
    packed, absmax, nested_absmax, nested_code, offset = (between_guards(getattr(weight, name)) for name in TABLES)
    return packed, absmax, nested_absmax, nested_code, offset


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_dequantized_has_the_bits_of_plain_torch(case: str, dtype: torch.dtype) -> None:
    shape, rows = CASES[case]
    weight = quantize_nf4(normal(*shape) * 3e-5)  # fp16 subnormals too
    start, stop, _ = rows.indices(shape[0])
    first, count = start * shape[1], (stop - start) * shape[1]
    found = torch.full((count + 128,), -7.0, dtype=dtype)
    wanted = found.clone()
    nf4_triton.dequantize_triton(*tables_of(weight), first, 64, 256, found[64 : 64 + count])
    dequantize_torch(*tables_of(weight), first, 64, 256, wanted[64 : 64 + count])
    assert torch.equal(found, wanted)


def test_dequantizing_reaches_above_2_to_the_31_elements() -> None:
    """Only the last bytes are written or read, and what nobody touches takes no memory."""
    elements = (1 << 31) + 640
    huge = NF4Weight(
        packed=torch.empty(elements // 2, dtype=torch.uint8),
        absmax=torch.empty(elements // 64, dtype=torch.uint8),
        nested_absmax=torch.ones(-(elements // -(64 * 256))),
        nested_code=quantize_nf4(torch.ones(1, 64)).nested_code,
        offset=torch.tensor(1.5),
        shape=(elements // 64, 64),
    )
    huge.packed[-320:] = torch.arange(320).to(torch.uint8)
    huge.absmax[-10:] = torch.arange(10, dtype=torch.uint8) * 20
    tables = huge.packed, huge.absmax, huge.nested_absmax, huge.nested_code, huge.offset
    found, wanted = torch.empty(500), torch.empty(500)
    nf4_triton.dequantize_triton(*tables, elements - 500, 64, 256, found)
    dequantize_torch(*tables, elements - 500, 64, 256, wanted)
    assert torch.equal(found, wanted)


def multiplied(x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
    return nf4_matmul_triton.multiply_few_triton(x, *tables_of(weight), bias, None, weight.shape[0], 64, 256)


# (tokens, out features, in features): all tokens of a tile or few; rows and spans that do not fill a program.
PRODUCTS = [(1, 1, 64), (1, 33, 192), (3, 16, 64), (16, 40, 320), (5, 7, 64 * 40)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "out_features", "in_features"), PRODUCTS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_product_with_few_tokens_errs_little_more_than_plain_torch(
    tokens: int, out_features: int, in_features: int, has_bias: bool, dtype: torch.dtype
) -> None:
    weight = quantize_nf4(normal(out_features, in_features))
    x = between_guards(normal(tokens, in_features, seed=1).to(dtype))
    bias = between_guards(normal(out_features, seed=2).to(dtype)) if has_bias else None
    found = multiplied(x, weight, bias)
    plain = multiply_few_torch(x, *tables_of(weight), bias, None, out_features, 64, 256)
    values = dequantize_nf4(weight, dtype).double()
    exact = x.double() @ values.T + (0.0 if bias is None else bias.double())
    assert found.dtype == dtype
    error, allowed = ((value.double() - exact).norm() for value in (found, plain))
    # Partial sums round at their own size, which a sum of one row may fall far below by cancellation.
    size = (x.double().square() @ values.square().T).sum().sqrt()
    assert error <= 1.1 * allowed + 2e-7 * size


def test_product_takes_x_that_is_not_contiguous_and_none_at_all() -> None:
    weight = quantize_nf4(normal(16, 128))
    x = normal(128, 6, seed=1)[:, ::2].T
    assert not x.is_contiguous()
    assert torch.equal(multiplied(x, weight, None), multiplied(x.contiguous(), weight, None))
    assert multiplied(x[:0], weight, None).shape == (0, 16)


@pytest.mark.parametrize("shape", [(9, 65), (3, 96)])
def test_product_with_rows_that_begin_inside_a_block_is_left_to_plain_torch(shape: tuple[int, int]) -> None:
    weight, x = quantize_nf4(normal(*shape)), normal(2, shape[1], seed=1)
    wanted = multiply_few_torch(x, *tables_of(weight), None, None, shape[0], 64, 256)
    assert torch.equal(multiplied(x, weight, None), wanted)
