"""Promises of the 4-bit layer: it computes with its dequantized weight, in NF4 alone, and has no dense weight."""

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from qlora_kernels.nf4 import dequantize_nf4
from qlora_trainer.common.errors import (
    ModelError,
    QuantizationError,
)
from qlora_trainer.model.modules.nf4_linear import NF4Linear, adopt_linear4bit
from qlora_trainer.weights.nf4 import quantize_weight


def test_the_layer_computes_with_the_dequantized_weight(tiny_llama: Path) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(96, 128), torch.randn(96)
    layer = NF4Linear(quantize_weight(weight), bias)
    x = torch.randn(5, 128)
    dense = dequantize_nf4(layer.nf4_weight, torch.float32)
    assert torch.equal(layer(x), nn.functional.linear(x, dense, bias))
    assert 0 < float((dense - weight).abs().mean()) < 0.1


def quantized(**settings: object) -> nn.Sequential:
    layer = bnb.nn.Linear4bit(64, 64, bias=False, **settings)
    return nn.Sequential(layer).to("cpu")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_type": "fp4"}, "type fp4"),
        ({"quant_type": "nf4", "compress_statistics": False}, "double quantization False"),
        ({"quant_type": "nf4", "quant_storage": torch.bfloat16}, "storage bfloat16"),
    ],
)
def test_a_layer_quantized_otherwise_is_refused(settings: dict, reason: str) -> None:
    with pytest.raises(QuantizationError, match=reason):
        adopt_linear4bit(quantized(**settings))


def test_a_model_that_reads_a_4_bit_layers_weight_is_refused() -> None:
    """As the fused path of a Mamba does: the error message comes in whatever forward is the first."""
    layer = NF4Linear(quantize_weight(torch.ones(96, 64)), None)
    assert not hasattr(layer, "weight")
    with pytest.raises(ModelError, match=r"reads the weight of a linear layer \(96 x 64\) .*another architecture"):
        nn.functional.linear(torch.ones(1, 64), layer.weight)
    with pytest.raises(AttributeError, match="no attribute 'scales'"):
        _ = layer.scales
