"""Dense products on a CPU: the same to fp32's rounding whichever library makes them, and the same again each time."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_tensors import normal
from torch import Tensor

from qlora_kernels import products
from qlora_kernels.processor import processor_fact
from qlora_kernels.products import STEP, by_onednn, library, linear, step_of
from qlora_kernels.registry import Op, UnavailableError
from qlora_kernels.torch_internals import has_onednn_linear

pytestmark = pytest.mark.skipif(not has_onednn_linear(), reason="needs torch's oneDNN")


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("rows", [1, 8, 17, 64, 65, 300, 2051])
@pytest.mark.parametrize("features", [(64, 48), (576, 1536), (1536, 16), (16, 576), (7, 5)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_onednn_multiplies_in_fp32(rows: int, features: tuple[int, int], transposed: bool, with_bias: bool) -> None:
    """Not in a shorter format, which would err by 1e-4 and more."""
    wide, narrow = features
    x, weight = normal(rows, wide), normal(narrow, wide, seed=1)
    if transposed:
        weight = weight.T.contiguous().T
    bias = normal(narrow, seed=2) if with_bias else None
    found = by_onednn(x, weight, bias)
    exact = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    assert relative_error(found, exact) < 2e-6
    assert found.shape == (rows, narrow)
    assert found.is_contiguous()


def test_onednn_takes_columns_of_a_wider_matrix() -> None:
    """As gradients of a block of rows are."""
    x, weight = normal(32, 100)[:, 20:60], normal(24, 40, seed=1)
    assert relative_error(by_onednn(x, weight, None), x.double() @ weight.double().T) < 2e-6
    weight = normal(24, 32, seed=2)
    assert relative_error(by_onednn(x.T, weight, None), x.T.double() @ weight.double().T) < 2e-6


def test_gradients_of_any_number_of_tokens() -> None:
    """The terms of these sums are tokens; both factors are transposes."""
    for tokens in (8, 64, 65, 500, 2049):
        low, grad = normal(tokens, 16), normal(tokens, 96, seed=1)
        found = by_onednn(low.T, grad.T, None)
        assert relative_error(found, low.T.double() @ grad.double()) < 2e-6


@pytest.mark.parametrize("tokens", [16, 200])
def test_a_bias_and_a_weight_may_have_any_layout(tokens: int) -> None:
    x, wide = normal(tokens, 40), normal(24, 100, seed=1)
    for weight in (wide[:, 20:60], wide[:, :80:2], normal(24, seed=2)[:, None].expand(24, 40)):
        for bias in (normal(48, seed=3)[::2], normal(1, seed=4).expand(24)):
            exact = x.double() @ weight.double().T + bias.double()
            assert relative_error(by_onednn(x, weight, bias), exact) < 2e-6


def test_steps_are_a_small_share_of_the_number() -> None:
    assert [step_of(number) for number in (1, 255, 256, 1000, 1024, 2047, 2048, 5000, 131_072)] == [
        STEP // 2, STEP // 2, STEP, STEP, STEP, STEP, 128, 256, 8192
    ]  # fmt: skip
    assert all(number / 32 <= step_of(number) <= number / 16 for number in range(1024, 9000))


SHAPES = """
import sys, torch
from qlora_kernels.products import by_onednn
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
weight, tokens = torch.randn(64, 64), torch.randn(1024, 64)
by_onednn(tokens, weight, None)
before = resident()
for rows in range(300, 900):
    by_onednn(tokens[:rows], weight, None)
    by_onednn(tokens[:rows, :16].T, tokens[:rows].T, None)
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_every_number_of_tokens() -> None:
    """Code for each of 600 numbers of rows would take some 200 MiB."""
    done = subprocess.run([sys.executable, "-c", SHAPES], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50 * 2**20


def test_what_fails_for_want_of_memory_is_torchs_own_product(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(message: str) -> Callable[..., Tensor]:
        def multiply(*arguments: Any) -> Tensor:
            raise RuntimeError(message)

        return multiply

    x, weight = normal(100, 40), normal(24, 40, seed=1)
    monkeypatch.setattr(products, "onednn_linear", failing("could not create a primitive"))
    assert torch.equal(by_onednn(x, weight, None), torch.nn.functional.linear(x, weight))
    monkeypatch.setattr(products, "onednn_linear", failing("could not execute a primitive"))
    with pytest.raises(RuntimeError, match="could not execute"):
        by_onednn(x, weight, None)


def test_the_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_LINEAR", Op("linear", linear, {"cpu": lambda: by_onednn}))
    monkeypatch.setenv("QLORA_KERNELS", "auto")
    assert library() == "oneDNN"
    monkeypatch.setenv("QLORA_KERNELS", "reference")
    assert library() == "torch's own"


def test_onednn_repeats_its_bits_wherever_the_operands_lie() -> None:
    """What resuming to the last bit is on."""
    x, weight = normal(257, 576), normal(1536, 576, seed=1)
    found = by_onednn(x, weight, None)
    memory = torch.empty(x.numel() + 3)
    elsewhere = memory[3:].view_as(x).copy_(x)
    assert elsewhere.data_ptr() % 16 != x.data_ptr() % 16
    assert all(torch.equal(by_onednn(operand, weight, None), found) for operand in (x, elsewhere, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_torchs_own_products(dtype: torch.dtype) -> None:
    x, weight, bias = normal(9, 64, dtype=dtype), normal(5, 64, seed=1, dtype=dtype), normal(5, seed=2, dtype=dtype)
    assert torch.equal(by_onednn(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize(("rows", "wide", "narrow"), [(0, 4, 3), (5, 0, 3), (5, 4, 0)])
def test_empty_products(rows: int, wide: int, narrow: int) -> None:
    x, weight = torch.ones(rows, wide), torch.ones(narrow, wide)
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))
    assert torch.equal(by_onednn(x, weight, None), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize(
    ("maker", "capability", "machine", "takes_onednn"),
    [
        ("AuthenticAMD", "AVX512", "x86_64", True),
        ("HygonGenuine", "AVX512", "x86_64", True),
        ("GenuineIntel", "AVX512", "x86_64", False),
        ("AuthenticAMD", "AVX2", "x86_64", False),
        (None, "AVX512", "x86_64", False),
        ("AuthenticAMD", "AVX512", "aarch64", False),
    ],
)
def test_the_library_goes_by_the_processors_maker(
    maker: str | None, capability: str, machine: str, takes_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "processor_fact", {"vendor_id": maker}.get)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products.fastest_on_cpu() is (by_onednn if takes_onednn else torch.nn.functional.linear)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    if takes_onednn:
        with pytest.raises(UnavailableError, match="no oneDNN"):
            products.fastest_on_cpu()
    else:
        assert products.fastest_on_cpu() is torch.nn.functional.linear


def test_the_maker_is_read_where_linux_says_it(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: Some: CPU\n\nvendor_id\t: Other\n")
    assert processor_fact("vendor_id", cpuinfo) == "AuthenticAMD"
    cpuinfo.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert processor_fact("vendor_id", cpuinfo) is None
    assert processor_fact("vendor_id", tmp_path / "none") is None
