"""Put a bottleneck adapter behind a part of a decoder layer: h + U f(D h + b_D) + b_U of the part's output h.

The part, attention or MLP, is wrapped whole and knows nothing of it: its own forward, also one that keeps less for
backward, runs on. Parameters are fp32 and cast where they are multiplied. U and b_U start at zero: before the first
step the part gives its own output, bit for bit.

Legend: H hidden size, R bottleneck size.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kernels.bottleneck import BottleneckActivation, add_bottleneck
from qlora_trainer.adapters.trainable import AdapterModule


class BottleneckLayer(AdapterModule):
    """Add a small MLP's output to that of a part of a decoder layer.

    Args:
        base: returns a tensor (..., H), or a tuple that begins with one.
        hidden: H.
        size: R.
        activation: f.
        generator: of the CPU; D is drawn from it, Kaiming-uniform as LoRA's A.
        dtype: of the parameters.
    """

    def __init__(
        self,
        base: nn.Module,
        hidden: int,
        size: int,
        activation: BottleneckActivation,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.base = base
        self.activation = activation
        bound = math.sqrt(1.0 / hidden)
        drawn = torch.empty(size, hidden).uniform_(-bound, bound, generator=generator)
        held = next(itertools.chain(base.parameters(), base.buffers())).device
        where: dict[str, Any] = {"dtype": dtype, "device": torch.device("cpu") if held.type == "meta" else held}
        self.bottleneck_down = _WeightAndBias(drawn.to(**where))
        self.bottleneck_up = _WeightAndBias(torch.zeros(hidden, size, **where))

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the part, and add the adapter's output to its own.

        Args:
            *inputs: of the part.
            **named: of the part, by name.

        Returns:
            What the part returns, with the sum (..., H) for its tensor.
        """
        output = self.base(*inputs, **named)
        if isinstance(output, Tensor):
            return self.adapt(output)
        return self.adapt(output[0]), *output[1:]

    def adapt(
        self,
        h: Tensor,  # (..., H)
    ) -> Tensor:  # (..., H)
        """Add the adapter's output to what it is computed from.

        Args:
            h: output of the part.

        Returns:
            The sum.
        """
        down, up = self.bottleneck_down, self.bottleneck_up
        return add_bottleneck(h, down.weight, down.bias, up.weight, up.bias, self.activation)

    def extra_repr(self) -> str:
        """Describe the adapter, as `print(model)` shows it.

        Returns:
            Size and activation.
        """
        return f"size={len(self.bottleneck_down.weight)}, activation={self.activation}"


class _WeightAndBias(nn.Module):
    """Hold a matrix and a bias of zeros; no nn.Linear, which would be taken for a layer of the base.

    Args:
        weight: the matrix.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(weight.new_zeros(len(weight)))
