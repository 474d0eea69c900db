"""A linear layer with a LoRA adapter beside it: y = base(x) + s (dropout(x) A^T) B^T.

The base is frozen (NF4Linear, or a plain Linear that stayed 16-bit) and knows nothing of the adapter. A and B are
fp32 parameters; they are cast to the activations' dtype where they are multiplied, so their gradients and updates are
fp32. lora_B starts at zero: before the first step the layer gives the base's own output, bit for bit.

Legend: O out features, I in features, R rank.
"""

import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_trainer.adapters.delta import lora_scaling
from qlora_trainer.quantization import NF4Linear


class LoRALinear(nn.Module):
    def __init__(
        self, base: NF4Linear | nn.Linear, rank: int, alpha: float, dropout: float = 0.0, use_rslora: bool = False
    ) -> None:
        super().__init__()
        device = next(base.buffers()).device if isinstance(base, NF4Linear) else base.weight.device
        self.base = base
        self.scaling = lora_scaling(rank, alpha, use_rslora)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_A = _uninitialised(base.in_features, rank, device)  # weight (R, I)
        self.lora_B = _uninitialised(rank, base.out_features, device)  # weight (O, R)

    @classmethod
    def from_base(
        cls,
        base: NF4Linear | nn.Linear,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        use_rslora: bool,
        generator: torch.Generator,
    ) -> Self:
        """Wrap `base`, with A drawn as PEFT and the LoRA authors draw it, and B zero."""
        layer = cls(base, rank, alpha, dropout, use_rslora)
        bound = math.sqrt(1.0 / base.in_features)  # kaiming_uniform with a = sqrt(5)
        drawn = torch.empty(layer.lora_A.weight.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            layer.lora_A.weight.copy_(drawn)
            layer.lora_B.weight.zero_()
        return layer

    def forward(
        self,
        x: Tensor,  # (..., I)
    ) -> Tensor:  # (..., O)
        low_rank = F.linear(self.dropout(x), self.lora_A.weight.to(x.dtype))  # (..., R)
        return self.base(x) + F.linear(low_rank * self.scaling, self.lora_B.weight.to(x.dtype))


def _uninitialised(in_features: int, out_features: int, device: torch.device) -> nn.Linear:
    """An fp32 Linear without bias that draws no random numbers. (torch's skip_init cannot make fake tensors.)"""
    layer = nn.Linear(in_features, out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.float32, device=device))
    return layer
