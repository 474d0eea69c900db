"""Eight bits a weight and a scale a row: the nearest codes, and rows that come back as from the whole."""

import pytest
import torch

from qlora_kernels.int8 import dequantize_int8, quantize_int8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def matrix(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(37, 50, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_weight_is_further_off_than_half_a_step_of_its_row(dtype: torch.dtype) -> None:
    weight = matrix(dtype)
    quantized = quantize_int8(weight)
    step = weight.float().abs().amax(dim=1, keepdim=True) / 127
    error = (dequantize_int8(quantized, torch.float32) - weight.float()).abs()
    assert (error <= 0.5 * step * (1 + 1e-5)).all()
    assert quantized.codes.abs().amax(dim=1).tolist() == [127] * 37, "the largest of each row is a whole code"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_is_the_fp32_product_of_code_and_scale_cast_once(dtype: torch.dtype) -> None:
    quantized = quantize_int8(matrix())
    expected = (quantized.codes.float() * quantized.scale[:, None]).to(dtype)
    assert torch.equal(dequantize_int8(quantized, dtype), expected)


@pytest.mark.parametrize("rows", [slice(0, 0), slice(3, 9), slice(30, 99), slice(None)])
def test_rows_are_those_of_the_whole(rows: slice) -> None:
    quantized = quantize_int8(matrix())
    assert torch.equal(
        dequantize_int8(quantized, torch.bfloat16, rows=rows), dequantize_int8(quantized, torch.bfloat16)[rows]
    )


def test_rows_of_zeros_and_of_tiny_numbers_stay_finite() -> None:
    weight = matrix()
    weight[0] = 0.0
    weight[1] *= 1e-40
    back = dequantize_int8(quantize_int8(weight), torch.float32)
    assert torch.equal(back[0], weight[0])
    assert (back[1] - weight[1]).abs().max() <= weight[1].abs().max()


def test_quantizing_in_pieces_gives_the_codes_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize_int8(matrix())
    monkeypatch.setattr("qlora_kernels.int8._CHUNK_ELEMENTS", 120)
    pieces = quantize_int8(matrix())
    assert torch.equal(pieces.codes, whole.codes)
    assert torch.equal(pieces.scale, whole.scale)
