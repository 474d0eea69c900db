"""Multiply tokens by a vector, and compute the gradients of vectors that scale layers' outputs or inputs.

Of y[n, o] = c[o] * y0[n, o] the gradient of c is the sum of grad_y[n, o] * y0[n, o] over the tokens, and that of y0 is
c * grad_y. y0 is kept from forward or computed again, a block of the weight's rows at a time: then one dequantized
block gives both y0 and the input's gradient, and c * grad_y takes y0's memory. Of y0 = x W^T + s x A^T B^T only the
first part is computed again: the second's share is the sum of B * (s grad_y^T x A^T) over the ranks, and that product
is made for the gradient of B anyway.

Sums are in fp32 (fp64 for fp64) whatever the dtype of the products.

Legend: N tokens, W width, I in features, O out features, R rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_kernels.adapter import Projection
from qlora_kernels.nf4 import dequantized_blocks
from qlora_kernels.products import linear

SUMMED_AT_ONCE = 1 << 22
"""Elements whose products are there at once, in fp32: 16 MiB, and as much for a cast of 16-bit tensors."""


def scaled(
    tokens: Tensor,  # (N, W)
    scale: Tensor,  # (W,), or of any shape that becomes (N, W)
    out: Tensor | None = None,  # (N, W) in the dtype of the tokens
) -> Tensor:  # (N, W), dtype of the tokens
    """Multiply each token by a vector, in the wider of both dtypes, and round once; without gradients.

    A scale near 1 that trains in fp32 would lose what it learns if it were cast to 16 bits first.

    Args:
        tokens: what is multiplied.
        scale: the vector, of any float dtype.
        out: takes the result, and may be `tokens`; None: a new tensor does.

    Returns:
        The products.
    """
    return torch.mul(tokens, scale, out=torch.empty_like(tokens) if out is None else out)


def summed_products(
    ones: Tensor,  # (N, W)
    others: Tensor,  # (N, W)
) -> Tensor:  # (W,) fp32, or fp64
    """Compute the sum of ones[n] * others[n] over n, multiplied and added in fp32 (fp64 for fp64).

    Args:
        ones: of any float dtype.
        others: of any float dtype.

    Returns:
        The sums.
    """
    wide = torch.promote_types(ones.dtype, torch.float32)
    rows = max(SUMMED_AT_ONCE // max(ones.shape[1], 1), 1)
    if len(ones) <= rows:
        return torch.mul(ones.to(wide), others).sum(0)
    total = ones.new_zeros(ones.shape[1], dtype=wide)
    for start in range(0, len(ones), rows):
        total += torch.mul(ones[start : start + rows].to(wide), others[start : start + rows]).sum(0)
    return total


class OutputScaleBackward:
    """Compute the gradients of output scales, and of outputs as they were before these.

    Args:
        grads: (N, O), of each layer's output.
        projections: the layers, as given to forward.
        remade: places of the layers whose outputs are to be computed again.
        kept: places of the layers whose outputs forward has kept.
        saved: what forward has saved; the kept outputs are its last, and are taken off it.
    """

    def __init__(
        self,
        grads: Sequence[Tensor],
        projections: Sequence[Projection],
        remade: Sequence[int],
        kept: Sequence[int],
        saved: list[Tensor | None],
    ) -> None:
        self.grads, self.projections, self.remade = grads, projections, remade
        self.tokens: Tensor | None = None  # (N, I), the input of the layers, while outputs are computed again
        self.found: dict[int, Tensor] = {}  # the gradients (O,) by the layer's place, fp32 or fp64
        for place in reversed(kept):
            output = saved.pop()
            assert output is not None
            self.found[place] = summed_products(grads[place], output)
            del output
        for place in remade:
            wide = torch.promote_types(grads[place].dtype, torch.float32)
            self.found[place] = grads[place].new_zeros(grads[place].shape[1], dtype=wide)

    def add_adapter(
        self,
        place: int,
        low_rank_products: Tensor,  # (R, O), the transpose of grad^T x A^T
        transposed_B: Tensor,  # (R, O)
        factor: float,
    ) -> None:
        """Add what an adapter's part of the output gives, if that output is computed again.

        Args:
            place: of the layer.
            low_rank_products: of the layer, not scaled.
            transposed_B: of the adapter.
            factor: of the adapter.
        """
        if place in self.remade:
            self.found[place].add_(summed_products(low_rank_products, transposed_B), alpha=factor)

    def before_scale(
        self,
        place: int,
        rows: slice,
        values: Tensor,  # (O, I), or some rows of it, of the weight
        grad: Tensor,  # (N, rows), of the output
    ) -> Tensor:  # (N, rows)
        """Compute the gradient of a block of a layer's output before its scale.

        Where that output is computed again, it is here, and the gradient takes its memory.

        Args:
            place: of the layer.
            rows: of the weight.
            values: of the weight.
            grad: of the output.

        Returns:
            The gradient: `grad` itself where the layer has no scale.
        """
        scale = self.projections[place].output_scale
        if scale is None:
            return grad
        return scaled(grad, scale.values[rows], self._remade(place, rows, values, grad))

    def remake_all(self) -> None:
        """Compute outputs again where no gradient of the input is wanted, block by block, for their scales alone."""
        for place in self.remade:
            for rows, values in dequantized_blocks(self.projections[place].weight, self.grads[place].dtype):
                self._remade(place, rows, values, self.grads[place][:, rows])

    def _remade(self, place: int, rows: slice, values: Tensor, grad: Tensor) -> Tensor | None:
        if place not in self.remade:
            return None
        assert self.tokens is not None
        output = linear(self.tokens, values)
        self.found[place][rows].add_(summed_products(grad, output))
        return output
