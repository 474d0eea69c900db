"""A start and the 4-bit rest are the weight, as near as NF4 lets them be, and are PEFT's."""

from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn

from benchmarks.private_memory import PrivatePeak
from qlora_kernels.nf4 import dequantize_nf4
from qlora_trainer.adapters.arithmetic import low_rank
from qlora_trainer.adapters.arithmetic.starts import LOFTQ_STEPS, STARTS, SplitWeight
from qlora_trainer.common.process_memory import private_bytes
from qlora_trainer.weights.nf4 import quantize_weight

RANK, SCALING = 6, 2.0


def weight(rows: int = 96, columns: int = 128) -> Tensor:
    """Like a trained weight: noise, and a few directions that are much stronger."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(rows, columns, generator=generator)
    left, right = torch.randn(rows, 4, generator=generator), torch.randn(4, columns, generator=generator)
    return 0.02 * (noise + left @ right)


def split(init: str, values: Tensor, rank: int = RANK) -> SplitWeight:
    return STARTS[init](values, rank, SCALING, torch.Generator().manual_seed(0), "the weight")


def product(parts: SplitWeight) -> Tensor:
    return SCALING * parts.lora_B @ parts.lora_A


def plain_error(values: Tensor) -> float:
    return float((dequantize_nf4(quantize_weight(values), torch.float32) - values).square().sum())


@pytest.mark.parametrize("init", STARTS)
def test_the_rest_is_the_weight_less_the_product_in_4_bits(init: str) -> None:
    values = weight()
    before = values.clone()
    parts = split(init, values)
    assert torch.equal(values, before)
    assert (parts.lora_A.shape, parts.lora_B.shape) == ((RANK, 128), (96, RANK))
    rest = dequantize_nf4(parts.rest, torch.float32)
    error = (values - product(parts) - rest).square().sum()
    assert parts.squared_error == pytest.approx(float(error), rel=1e-4)
    if init != "loftq":  # whose last product comes after its last quantization
        assert torch.equal(parts.rest.packed, quantize_weight(values - product(parts)).packed)
    # An error of NF4's size, not of the product's.
    assert error < 4 * plain_error(values)


@pytest.mark.parametrize(("init", "theirs"), [("pissa", "pissa"), ("olora", "olora")])
def test_peft_takes_out_the_same(init: str, theirs: Any) -> None:
    from peft import LoraConfig, get_peft_model

    layer = nn.Linear(128, 96, bias=False)
    layer.weight = nn.Parameter(weight())
    config = LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=["0"], init_lora_weights=theirs)
    model: Any = get_peft_model(nn.Sequential(layer), config)
    adapted = model.base_model.model[0]
    parts = split(init, weight())
    scale = weight().norm()
    assert (adapted.get_delta_weight("default") - product(parts)).norm() < 1e-5 * scale
    assert (adapted.base_layer.weight - (weight() - product(parts))).norm() < 1e-5 * scale
    # The same factors, but for signs of singular vectors.
    for ours, name in ((parts.lora_A, "lora_A"), (parts.lora_B, "lora_B")):
        factor = getattr(adapted, name)["default"].weight
        torch.testing.assert_close(ours.abs(), factor.detach().abs(), rtol=1e-3, atol=1e-5)


def test_pissa_takes_out_the_largest_singular_values() -> None:
    values = weight()
    left = values - product(split("pissa", values))
    assert float(left.norm()) == pytest.approx(float(torch.linalg.svdvals(values)[RANK:].norm()), rel=1e-5)


def by_bitsandbytes(values: Tensor) -> Tensor:
    """Through NF4 and back, in the hands of bitsandbytes."""
    packed, state = quantize_4bit(values.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state)


def test_loftq_is_nearer_than_plain_nf4_and_is_the_papers_alternation() -> None:
    values = weight()
    errors, left = [], values
    for _ in range(LOFTQ_STEPS):
        rest = by_bitsandbytes(left)
        U, s, Vh = torch.linalg.svd(values - rest, full_matrices=False)
        approximation = U[:, :RANK] * s[:RANK] @ Vh[:RANK]
        errors.append(float((values - rest - approximation).square().sum()))
        left = values - approximation
    assert min(errors) < 0.99 * errors[0]  # so that the alternation matters
    found = split("loftq", values).squared_error
    assert found == pytest.approx(min(errors), rel=1e-3)
    assert found < 0.9 * plain_error(values)


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_random_projections_find_nearly_the_same(init: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = weight(256, 192)
    exact = split(init, values).squared_error
    monkeypatch.setattr(low_rank, "EXACT_SIDE", 1)
    assert split(init, values).squared_error == pytest.approx(exact, rel=0.02)
    again = split(init, values)
    assert torch.equal(again.lora_A, split(init, values).lora_A)


@pytest.mark.slow
@pytest.mark.skipif(private_bytes() is None, reason="the system does not say what a process holds")
@pytest.mark.parametrize("init", STARTS)
def test_splitting_takes_no_more_than_four_copies_of_the_weight(init: str) -> None:
    """Which is what is looked for on the device before anything is read."""
    values = torch.randn(3072, 3072, generator=torch.Generator().manual_seed(0))
    with PrivatePeak() as memory:
        split(init, values, rank=16)
    assert memory.peak - memory.before < 4 * values.nbytes
