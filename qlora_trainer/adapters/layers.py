"""A linear layer with a LoRA adapter beside it: y = base(x) + s (dropout(x) A^T) B^T.

The base is frozen (NF4Linear, or a plain layer that stayed 16-bit) and knows nothing of the adapter. Over an NF4Linear
both are one autograd function, which keeps the input and a rank-sized product for backward; over a plain layer it is
the formula in plain torch. A and B are fp32 parameters; they are cast to the activations' dtype where they are
multiplied, so their gradients and updates are fp32. lora_B starts at zero: before the first step the layer gives the
base's own output, bit for bit.

Legend: O out features, I in features, R rank.
"""

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_kernels.lora_linear import Adapter, add_lora, draw_seed, nf4_linear
from qlora_trainer.adapters.delta import lora_scaling
from qlora_trainer.quantization import NF4Linear


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: 4-bit, plain, or GPT-2's Conv1D, which stores its weight (I, O)."""
    return isinstance(module, NF4Linear | nn.Linear) or type(module).__name__ == "Conv1D"


class LoRALinear(nn.Module):
    """See above. `base` is what `is_linear` says; the adapter lies on its device, on the CPU for a meta base."""

    def __init__(
        self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, use_rslora: bool = False
    ) -> None:
        super().__init__()
        in_features, out_features, device = _facts(base)
        self.base = base
        self.scaling = lora_scaling(rank, alpha, use_rslora)
        self.dropout = dropout  # a probability, of the adapter's input
        self.lora_A = _uninitialised(in_features, rank, device)  # weight (R, I)
        self.lora_B = _uninitialised(rank, out_features, device)  # weight (O, R)
        self.casts: tuple[Tensor, Tensor] | None = None  # A and B in the compute dtype, while `adapters_cast` holds

    @classmethod
    def from_base(
        cls,
        base: nn.Module,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        use_rslora: bool,
        generator: torch.Generator,
    ) -> Self:
        """Wrap `base`, with A drawn as PEFT and the LoRA authors draw it (Kaiming-uniform), and B zero."""
        layer = cls(base, rank, alpha, dropout, use_rslora)
        bound = math.sqrt(1.0 / layer.lora_A.in_features)  # kaiming_uniform with a = sqrt(5)
        drawn = torch.empty(layer.lora_A.weight.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            layer.lora_A.weight.copy_(drawn)
            layer.lora_B.weight.zero_()
        return layer

    def forward(
        self,
        x: Tensor,  # (..., I)
    ) -> Tensor:  # (..., O)
        base = self.base
        if isinstance(base, NF4Linear):
            return nf4_linear(x, base.nf4_weight, base.bias, self.adapter())
        dropped = F.dropout(x, self.dropout, self.training)
        return add_lora(base(x), dropped, self.lora_A.weight, self.lora_B.weight, self.scaling)

    def adapter(self) -> Adapter:
        """The adapter as the kernels take it, for one call: with dropout on, it draws the seed of that call."""
        dropout = self.dropout if self.training else 0.0
        seed = draw_seed() if dropout else None
        return Adapter(self.lora_A.weight, self.lora_B.weight, self.scaling, dropout, seed, self.casts)

    def extra_repr(self) -> str:
        return f"rank={self.lora_A.out_features}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class TrainableBias(nn.Module):
    """A module whose bias trains in fp32 beside weights of 16 bits: the bias is cast where the module runs.

    A layer norm, for one, takes weight and bias of one dtype only, and a bias that trains in bf16 loses its updates.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.bias = nn.Parameter(base.get_parameter("bias").detach().float())

    def forward(self, *inputs: Any, **named: Any) -> Any:
        bias = self.bias.to(self.base.get_parameter("bias").dtype)
        return torch.func.functional_call(self.base, {"bias": bias}, inputs, named)


def _facts(base: nn.Module) -> tuple[int, int, torch.device]:
    """(I, O, device of the adapter) of a linear layer."""
    if isinstance(base, NF4Linear):
        return base.in_features, base.out_features, base.packed.device
    weight = base.get_parameter("weight")
    out_features, in_features = weight.shape if isinstance(base, nn.Linear) else weight.shape[::-1]
    return in_features, out_features, torch.device("cpu") if weight.is_meta else weight.device


def _uninitialised(in_features: int, out_features: int, device: torch.device) -> nn.Linear:
    """An fp32 Linear without bias that draws no random numbers. (torch's skip_init cannot make fake tensors.)"""
    layer = nn.Linear(in_features, out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.float32, device=device))
    return layer
