"""The NF4 contract: bitsandbytes' bits in both directions, any shape, any rows, on fake tensors too."""

import math
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from random_tensors import normal
from torch import Tensor

from qlora_kernels import nf4_cpu
from qlora_kernels.nf4 import NF4Weight, dequantize_nf4, dynamic_code, quantize_nf4
from qlora_kernels.nf4_reference import NF4_CODE
from qlora_kernels.registry import UnavailableError, other_versions
from qlora_kernels.torch_internals import FakeTensorMode

TABLES = ("packed", "absmax", "nested_absmax", "nested_code", "offset")
# Whole blocks; rows that share blocks; a short last block; an odd number of elements; more than one chunk of either.
SHAPES = [(1, 1), (1, 2), (1, 63), (1, 64), (1, 65), (3, 43), (7, 64), (256, 64), (257, 65), (3, (1 << 17) + 7)]


def compiled_for(*flags: str) -> dict[str, Callable[..., None]]:
    try:
        return {"quantize_nf4": nf4_cpu.quantizer(*flags), "dequantize_nf4": nf4_cpu.dequantizer(*flags)}
    except UnavailableError as reason:
        pytest.skip(str(reason))


@pytest.fixture(params=["reference", "compiled", "compiled without vector instructions"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every promise here is one of each implementation."""
    if request.param == "reference":
        monkeypatch.setenv("QLORA_KERNELS", "reference")
        yield
        return
    monkeypatch.setenv("QLORA_KERNELS", "fast")
    flags = () if request.param == "compiled" else ("-march=x86-64",) if platform.machine() == "x86_64" else ("-O0",)
    with other_versions("cpu", compiled_for(*flags)):
        yield


def quantize_with_bitsandbytes(weight: Tensor) -> tuple[NF4Weight, bnb.QuantState]:
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    nested = state.state2
    tables = (packed.view(-1), state.absmax, nested.absmax, nested.code, state.offset)
    out_features, in_features = weight.shape
    return NF4Weight(*tables, shape=(out_features, in_features)), state


def dequantize_with_bitsandbytes(weight: NF4Weight, state: bnb.QuantState) -> Tensor:
    state.dtype = torch.float32
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles its path for odd shapes, for seconds
        return bnb.dequantize_4bit(weight.packed.view(-1, 1), state).view(weight.shape)


def assert_same_bits(ours: NF4Weight, theirs: NF4Weight) -> None:
    for name in TABLES:
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert mine.dtype == other.dtype, name
        assert torch.equal(mine, other), name
    assert ours.shape == theirs.shape


def ties() -> Tensor:
    """Values at the midpoint of two codes, and one fp32 step to either side of it, under many scales."""
    midpoints = (NF4_CODE[1:] + NF4_CODE[:-1]) / 2
    steps = [midpoints, midpoints.nextafter(torch.tensor(2.0)), midpoints.nextafter(torch.tensor(-2.0))]
    row = torch.cat([torch.ones(1), *steps, torch.zeros(18)])
    return torch.cat([row * torch.ones(8, 1), row * normal(300, 1)])


def some_equal_blocks() -> Tensor:
    weight = normal(600, 64)
    weight[3] = 0
    weight[256:512] = 1  # a whole nested block of equal maxima
    return weight


AWKWARD = {
    "zeros": torch.zeros(5, 64),
    "zeros, short last block": torch.zeros(5, 13),
    "one value": torch.full((5, 64), -3.0),
    "one value, short last block": torch.full((5, 63), 3.0),
    "equal blocks": some_equal_blocks(),
    "ties": ties(),
    "at the clamp": normal(300, 64) * 1e-38,
    "subnormal": normal(300, 65) * 1e-41,
    "huge": normal(300, 64) * 1e30,
    "an outlier": normal(300, 64).index_put((torch.tensor(7), torch.tensor(7)), torch.tensor(1e4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantizing_gives_the_bits_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = normal(*shape).to(dtype)
    assert_same_bits(quantize_nf4(weight), quantize_with_bitsandbytes(weight)[0])


@pytest.mark.parametrize("name", AWKWARD)
def test_quantizing_awkward_values_gives_the_bits_of_bitsandbytes(name: str) -> None:
    assert_same_bits(quantize_nf4(AWKWARD[name]), quantize_with_bitsandbytes(AWKWARD[name])[0])


def test_ties_in_a_short_last_block_give_the_bits_of_bitsandbytes() -> None:
    for row in ties()[:200, :47].split(1):
        assert_same_bits(quantize_nf4(row), quantize_with_bitsandbytes(row)[0])


def test_block_maxima_are_rounded_like_bitsandbytes_at_every_boundary() -> None:
    # Maxima -1 and 1 around the mean fix the scale of a nested block; the others sweep the range between,
    # most finely around zero, where the codes are densest.
    sweep = (torch.linspace(-1, 1, 254 * 40) ** 3).view(-1, 254)
    wanted = torch.cat([torch.full((len(sweep), 1), -1.0), torch.ones(len(sweep), 1), sweep], dim=1).view(-1, 1) + 2
    weight = wanted * torch.ones(64)
    ours, theirs = quantize_nf4(weight), quantize_with_bitsandbytes(weight)[0]
    assert len(ours.absmax.unique()) > 245  # a few codes around zero are nearest to no point of the grid
    assert_same_bits(ours, theirs)


def test_dynamic_code_is_that_of_bitsandbytes() -> None:
    assert torch.equal(dynamic_code(), bnb.create_dynamic_map())


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantizing_gives_the_bits_of_bitsandbytes(shape: tuple[int, int]) -> None:
    weight, state = quantize_with_bitsandbytes(normal(*shape))
    assert torch.equal(dequantize_nf4(weight, torch.float32), dequantize_with_bitsandbytes(weight, state))


def test_dequantized_value_is_two_rounded_operations() -> None:
    weight = quantize_nf4(normal(9, 64))
    codes = torch.stack([weight.packed >> 4, weight.packed & 15], dim=1).view(9, 64)
    scale = weight.nested_code[weight.absmax.int()] * weight.nested_absmax[0]
    scale = scale + weight.offset
    assert torch.equal(dequantize_nf4(weight, torch.float32), NF4_CODE[codes.int()] * scale[:, None])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_the_fp32_value_cast_once(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = quantize_nf4(normal(*shape))
        assert torch.equal(dequantize_nf4(weight, dtype), dequantize_nf4(weight, torch.float32).to(dtype))


@pytest.mark.parametrize("shape", [(50, 64), (51, 65), (9, 43), (5, (1 << 17) + 7)])
def test_rows_have_the_bits_of_the_whole(shape: tuple[int, int]) -> None:
    weight = quantize_nf4(normal(*shape))
    for dtype in (torch.float32, torch.float16):
        whole = dequantize_nf4(weight, dtype)
        for rows in (slice(0, 1), slice(1, 4), slice(3, None), slice(None, -1), slice(2, 2), slice(-1, None)):
            assert torch.equal(dequantize_nf4(weight, dtype, rows=rows), whole[rows])


def test_dequantizing_reads_only_the_rows_asked_for() -> None:
    weight = quantize_nf4(normal(512, 64))
    wanted = dequantize_nf4(weight, torch.float32)[300:310]
    spoiled = weight.packed.clone()
    spoiled[: 300 * 32], spoiled[310 * 32 :] = 255, 255
    assert torch.equal(dequantize_nf4(replace(weight, packed=spoiled), torch.float32, rows=slice(300, 310)), wanted)


def test_fake_tensors_give_shapes_without_a_value() -> None:
    real = quantize_nf4(normal(6, 43))
    with FakeTensorMode() as mode:
        tables: Any = {name: mode.from_tensor(getattr(real, name)) for name in TABLES}
        fake = replace(real, **tables)
        result = dequantize_nf4(fake, torch.bfloat16, rows=slice(2, 5))
    assert (result.shape, result.dtype) == ((3, 43), torch.bfloat16)


def test_op_is_registered_as_torch_asks() -> None:
    weight = quantize_nf4(normal(6, 44))
    tables = [getattr(weight, name) for name in TABLES]
    out = torch.empty(88, dtype=torch.float16)
    torch.library.opcheck(torch.ops.qlora_kernels.dequantize_nf4.default, (*tables, 44, 64, 256, out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_value_that_is_not_finite_shows_in_the_offset(bad: float, dtype: torch.dtype) -> None:
    for shape, place in (((70, 64), (69, 63)), ((3, 43), (2, 42)), ((40000, 64), (20000, 1))):
        weight = normal(*shape).to(dtype)
        weight[place] = bad
        assert not torch.isfinite(quantize_nf4(weight).offset)


def test_a_transposed_weight_is_read_in_its_own_order() -> None:
    weight = normal(128, 96)
    assert_same_bits(quantize_nf4(weight.T), quantize_nf4(weight.T.contiguous()))


@pytest.mark.slow
def test_importing_needs_neither_triton_nor_bitsandbytes() -> None:
    program = "import sys; sys.modules.update(triton=None, bitsandbytes=None); from qlora_kernels import lora_linear"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    "table",
    [
        {"packed": torch.zeros(95, dtype=torch.uint8)},
        {"absmax": torch.zeros(2, dtype=torch.uint8)},
        {"absmax": torch.zeros(3)},
        {"nested_absmax": torch.ones(1, dtype=torch.float16)},
        {"nested_absmax": torch.ones(0)},
        {"nested_code": torch.ones(4)},
        {"offset": torch.zeros((), dtype=torch.float64)},
    ],
    ids=str,
)
def test_compiled_code_is_given_no_table_that_it_would_read_past(table: dict[str, Tensor]) -> None:
    dequantize = compiled_for()["dequantize_nf4"]
    weight = quantize_nf4(normal(3, 64))
    tables = {name: getattr(weight, name) for name in TABLES}
    dequantize(*tables.values(), 0, 64, 256, torch.empty(3, 64))
    with pytest.raises(AssertionError):
        dequantize(*(tables | table).values(), 0, 64, 256, torch.empty(3, 64))
    with pytest.raises(AssertionError):
        dequantize(*tables.values(), 64, 64, 256, torch.empty(3, 64))
