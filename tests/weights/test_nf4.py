"""Promises of quantizing: the codes of exact division on every device, of finite weights alone."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from tiny_models import change_tensors, load, make_model_directory
from torch import Tensor

from qlora_kernels.nf4 import NF4Weight
from qlora_kernels.nf4_reference import MIDPOINTS
from qlora_trainer.common.errors import QuantizationError
from qlora_trainer.model.fingerprint import is_same, tensor_fingerprint
from qlora_trainer.planning.fake_tensors import FakeRun
from qlora_trainer.weights.nf4 import quantize_weight


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, bad: float) -> None:
    directory = make_model_directory(tmp_path / "m")
    change_tensors(directory, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3, 5].fill_(bad))
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .* not finite"):
        load(directory)
    with pytest.raises(QuantizationError, match="holds 1 value"):
        quantize_weight(torch.tensor([[1.0, bad]]))


def next_to_midpoints(dtype: torch.dtype) -> Tensor:  # (1024, 1024)
    """Blocks whose values lie within two steps of fp32 of the middle of two codes, under as many maxima as blocks."""
    generator = torch.Generator().manual_seed(0)
    maxima = torch.rand(1 << 14, 1, generator=generator) + 0.5
    midpoints = MIDPOINTS[torch.randint(15, (1 << 14, 63), generator=generator)]
    values = (midpoints.double() * maxima).float()
    values += values * torch.randint(-2, 3, values.shape, generator=generator) * 2**-24
    return torch.cat([maxima, values], dim=1).to(dtype).view(1024, 1024)


def codes_by_numpy(values: Tensor, reciprocal_off_by: int = 0) -> Any:
    """The code of every value by the definition, with the reciprocals of the maxima so many steps of fp32 off."""
    blocks = values.float().numpy().reshape(-1, 64)
    inverse = np.float32(1) / np.abs(blocks).max(1, keepdims=True)
    for _ in range(abs(reciprocal_off_by)):
        inverse = np.nextafter(inverse, np.float32(np.sign(reciprocal_off_by) * np.inf))
    return np.searchsorted(MIDPOINTS.numpy(), blocks * inverse, side="left").reshape(-1)


def unpacked(weight: NF4Weight) -> Any:
    return torch.stack([weight.packed >> 4, weight.packed & 15], dim=1).view(-1).cpu().numpy()


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_codes_are_those_of_exact_division(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bitsandbytes divides on CUDA, with a reciprocal that may be one step of fp32 off, fp32 values change codes."""
    monkeypatch.setenv("QLORA_KERNELS", choice)
    values = next_to_midpoints(torch.float32)
    exact = codes_by_numpy(values)
    assert all((codes_by_numpy(values, off) != exact).sum() > 1000 for off in (-1, 1))
    assert (unpacked(quantize_weight(values)) == exact).all()


def test_no_device_quantizes_by_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **settings: object) -> None:
        raise AssertionError("bitsandbytes was asked to quantize")

    monkeypatch.setattr(bnb.functional, "quantize_4bit", refuse)
    run = FakeRun()
    run.mode.allow_non_fake_inputs = True  # the tables of the format
    with run:
        weight = quantize_weight(torch.empty(64, 128, dtype=torch.bfloat16, device="meta"))
    assert (weight.packed.device.type, tuple(weight.packed.shape)) == ("meta", (4096,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_quantizes_to_the_codes_of_a_cpu(dtype: torch.dtype) -> None:
    plain = torch.randn(1024, 1000, generator=torch.Generator().manual_seed(0)).mul(0.02).to(dtype)
    for values in (plain, next_to_midpoints(dtype)):
        ours, theirs = quantize_weight(values), quantize_weight(values.cuda())
        assert torch.equal(ours.packed, theirs.packed.cpu()), int((ours.packed != theirs.packed.cpu()).sum())
        assert torch.equal(ours.nested_code, theirs.nested_code.cpu())
        assert is_same(tensor_fingerprint(ours), tensor_fingerprint(theirs))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_that_is_not_finite_is_refused_on_cuda(dtype: torch.dtype, bad: float) -> None:
    weight = torch.randn(64, 128, dtype=dtype, device="cuda")
    weight[3, 5] = bad
    with pytest.raises(QuantizationError, match="holds 1 value"):
        quantize_weight(weight)
    with pytest.raises(QuantizationError, match="holds 1 value"):
        quantize_weight(weight.T)
