"""What tests of kinds of adapters share: plain models, their logits, and how near they must be."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.weights.nf4 import quantize_weight


def dense(directory: Path) -> Any:
    """A model as plain transformers loads it, in fp32."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def four_bit(linear: nn.Linear) -> NF4Linear:
    return NF4Linear(quantize_weight(linear.weight.detach()), linear.bias.detach().clone())


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits


def differ_by(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((one - other).abs().max() / other.abs().max())
