"""Compute the gradients of adapters over one input, from those of their layers' outputs.

The methods are called in this order, in which memory is least: what a gradient needs goes as soon as it is made, and a
mask of dropout is made once for both gradients that need it. Where a layer's output is scaled by c, the gradient before
that, c * grad, is not made for them: c goes to the tensors of R, to B and to its gradient.

Legend: N tokens, I in features, O out features, R rank, S ranks of a stack together.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from qlora_kernels.adapter import Adapter, Projection, Stack, stacks_of
from qlora_kernels.products import product
from qlora_kernels.scale_gradients import OutputScaleBackward, scaled


class AdapterBackward:
    """Compute the gradients of A and B, and the adapters' part of the input's.

    Args:
        grads: (N, O), of each layer's output.
        projections: the layers, as given to forward.
        needs_x: the input's gradient is wanted.
        scales: of the same layers; None where no output is scaled.
    """

    def __init__(
        self,
        grads: Sequence[Tensor],
        projections: Sequence[Projection],
        *,
        needs_x: bool,
        scales: OutputScaleBackward | None = None,
    ) -> None:
        self.grads, self.projections = grads, projections
        self.needs_x, self.scales = needs_x, scales
        self.stacks = stacks_of(projections, grads[0].dtype)
        self._plain: list[tuple[Stack, Tensor]] = []  # adapters without dropout, each with its low-rank gradient (N, S)
        self._masked: tuple[Stack, Tensor, Tensor] | None = None  # one with dropout, with that and its mask (N, I)
        self._of_masked: Tensor | None = None  # (N, I), the part of adapters with dropout

    def grads_B(self, low_ranks: Sequence[Tensor | None]) -> dict[int, Tensor]:
        """Compute the gradients of the B's, or add them to the adapters' `grads`.

        Args:
            low_ranks: x A^T (N, S) of each stack, as forward had it; None where it was not needed.

        Returns:
            Those that were not added, (O, R) in the dtype of B, by the layer's place.
        """
        found: dict[int, Tensor] = {}
        for stack, low_rank in zip(self.stacks, low_ranks, strict=True):
            if low_rank is None:
                continue
            for (place, adapter), part in zip(stack.members, stack.split(low_rank.T, 0), strict=True):
                grad = product(part, self.grads[place])  # (R, O)
                if self.scales is not None:
                    grad = self._of_scaled(place, adapter, grad)
                if adapter.grads is None:
                    found[place] = grad.T.to(adapter.lora_B.dtype).mul_(adapter.factor)
                else:
                    adapter.grads[1].add_(grad, alpha=adapter.factor)
        return found

    def _of_scaled(self, place: int, adapter: Adapter, grad: Tensor) -> Tensor:  # (R, O)
        """Make B's gradient from that for an output without a scale, and add the adapter's part to the scale's."""
        scale = self.projections[place].output_scale
        if scale is None:
            return grad
        assert self.scales is not None
        self.scales.add_adapter(place, grad, adapter.transposed_B_in(grad.dtype), adapter.factor)
        return grad * scale.values

    def _scaled_B(self, place: int, adapter: Adapter) -> Tensor:  # (O, R)
        scale, B = self.projections[place].output_scale, adapter.B_in(self.grads[place].dtype)
        return B if scale is None else scaled(B, scale.values[:, None])

    def grads_A(self, tokens: Tensor | None, trains_A: Collection[int]) -> dict[int, Tensor]:
        """Compute the gradients of the A's, or add them to the adapters' `grads`.

        Args:
            tokens: (N, I), the input of the layers; None where no A needs a gradient.
            trains_A: places of the layers whose A needs one.

        Returns:
            Those that were not added, (R, I) in the dtype of A, by the layer's place.
        """
        found: dict[int, Tensor] = {}
        for stack in self.stacks:
            self._multiply_masked()
            grad = self._grad_A(stack, tokens if stack.place in trains_A else None)
            factor = stack.first.factor
            if grad is not None and stack.grad is not None:
                stack.grad.add_(grad, alpha=factor)
            elif grad is not None:
                found[stack.place] = grad.to(stack.first.lora_A.dtype).mul_(factor)
        return found

    def _grad_A(self, stack: Stack, tokens: Tensor | None) -> Tensor | None:  # (S, I), not yet scaled
        """Compute a stack's gradient, and keep what its part of the input's gradient is made of."""
        parts = [
            product(
                self.grads[place],
                adapter.B_in(self.grads[place].dtype) if self.scales is None else self._scaled_B(place, adapter),
            )
            for place, adapter in stack.members
        ]
        low_rank_grad = parts[0] if len(parts) == 1 else torch.cat(parts, 1)  # (N, S), not yet scaled
        mask = stack.first.keep_mask(low_rank_grad) if stack.first.dropout else None
        if mask is None:
            self._plain.append((stack, low_rank_grad))
        elif self.needs_x:
            self._masked = stack, low_rank_grad, mask
        if tokens is None:
            return None
        return product(low_rank_grad.T, tokens if mask is None else mask * tokens)

    def _multiply_masked(self) -> None:
        """Make the part of the input's gradient that waits for its product, and let go of its mask."""
        if self._masked is None:
            return
        (stack, low_rank_grad, mask), self._masked = self._masked, None
        part = (low_rank_grad @ stack.A).mul_(mask).mul_(stack.first.factor)
        self._of_masked = part if self._of_masked is None else self._of_masked.add_(part)

    def with_dropout(self) -> Tensor | None:
        """Return the part of adapters with dropout in the input's gradient: first, so that no mask is left.

        Returns:
            (N, I), to be added to in place; None without dropout.
        """
        self._multiply_masked()
        return self._of_masked

    def add_without_dropout(self, grad_x: Tensor) -> None:
        """Add the part of the other adapters.

        Args:
            grad_x: (N, I), added to in place.
        """
        for stack, low_rank_grad in self._plain:
            grad_x.addmm_(low_rank_grad, stack.A, alpha=stack.first.factor)
