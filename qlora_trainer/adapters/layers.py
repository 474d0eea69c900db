"""A linear layer with a LoRA adapter beside it: y = base(x) + s (dropout(x) A^T) B^T.

The base is frozen (NF4Linear, or a plain Linear that stayed 16-bit) and knows nothing of the adapter. Over an
NF4Linear both are one autograd function, which keeps the input and a rank-sized product for backward; over a plain
Linear it is the formula in plain torch. A and B are fp32 parameters; they are cast to the activations' dtype where they
are multiplied, so their gradients and updates are fp32. lora_B starts at zero: before the first step the layer gives
the base's own output, bit for bit.

Legend: O out features, I in features, R rank.
"""

import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from qlora_kernels.lora_linear import add_lora, draw_seed, lora_nf4_linear
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
        self.dropout = dropout  # a probability, of the adapter's input
        options = {"bias": False, "dtype": torch.float32, "device": device}
        self.lora_A = skip_init(nn.Linear, base.in_features, rank, **options)  # weight (R, I)
        self.lora_B = skip_init(nn.Linear, rank, base.out_features, **options)  # weight (O, R)

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
        base, A, B = self.base, self.lora_A.weight, self.lora_B.weight
        dropout = self.dropout if self.training else 0.0
        if not isinstance(base, NF4Linear):
            return add_lora(base(x), F.dropout(x, dropout), A, B, self.scaling)
        seed = draw_seed() if dropout else None
        return lora_nf4_linear(x, base.nf4_weight, base.bias, A, B, self.scaling, dropout=dropout, dropout_seed=seed)

    def extra_repr(self) -> str:
        return f"rank={self.lora_A.out_features}, scaling={self.scaling:g}, dropout={self.dropout:g}"
