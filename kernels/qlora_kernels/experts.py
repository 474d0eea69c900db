"""Take each token through the few experts that its router chose, over frozen NF4 weights.

output[t] = sum over slots s of routing[t, s] * down(activation(gate(x[t])) * up(x[t])), with the matrices of expert
chosen[t, s] (Shazeer et al. 2017, arXiv:1701.06538; Jiang et al. 2024, arXiv:2401.04088). Experts take turns, each with
all of its tokens at once, so that one dequantized matrix is alive at a time, in the weights' shared workspace.

For backward only the tokens are kept, once, with their routes: an expert's inputs are gathered and taken through gate
and up again, which costs two of its three products once more and saves three tensors of the MLP's width for each slot.
Gradients go to the tokens and to the routing weights, whose router sees the tokens too. Experts are frozen.

Left out: which expert a token goes to (the model's router), adapters on experts.

Legend: N tokens, K slots of each token, E experts, H hidden size, I the experts' width.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.adapter import Projection
from qlora_kernels.gated import Activation, gated_gradients, gated_product
from qlora_kernels.lora_linear import input_gradient, nf4_linear
from qlora_kernels.nf4 import NF4Weight
from qlora_kernels.saved_tensors import fetch, keep, visible
from qlora_kernels.torch_internals import FakeTensor


class Expert(NamedTuple):
    """Hold one expert's matrices."""

    gate: NF4Weight  # (I, H)
    up: NF4Weight  # (I, H)
    down: NF4Weight  # (H, I)


def gated_experts(
    x: Tensor,  # (N, H)
    chosen: Tensor,  # (N, K) int64: experts, each at most once for a token
    routing: Tensor,  # (N, K), any float dtype
    experts: Sequence[Expert],
    activation: Activation,
) -> Tensor:  # (N, H), dtype of x
    """Sum the outputs of each token's experts, weighted by its router.

    Products are in x's dtype; a routing weight of a wider dtype multiplies in that one. On fake tensors, whose routes
    cannot be read, the first K experts take every token: no routing needs more memory.

    Args:
        x: the tokens.
        chosen: the experts of each token, each at most once.
        routing: their weights.
        experts: all E of them.
        activation: of the gate.

    Returns:
        The sums.
    """
    return _GatedExperts.apply(*visible(x, routing), chosen, experts, activation)


class _GatedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, routing: Tensor, chosen: Tensor, experts: Sequence[Expert], activation: Activation
    ) -> Tensor:
        order, counts = expert_order(chosen, len(experts))
        if any(ctx.needs_input_grad):
            keep(ctx, x, routing, order)
        ctx.counts, ctx.experts, ctx.activation = counts, experts, activation
        output = torch.zeros_like(x)
        for index, tokens, slots in expert_turns(order, counts, routing.shape[1]):
            expert = experts[index]
            inputs = x[tokens]
            gate, up = nf4_linear(inputs, expert.gate, None), nf4_linear(inputs, expert.up, None)
            product = gated_product(gate, up, activation)
            weighted = nf4_linear(product, expert.down, None) * routing.reshape(-1)[slots, None]
            output.index_add_(0, tokens, weighted.to(x.dtype))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # grad: (N, H)
        x, routing, order = fetch(ctx)
        assert x is not None
        assert routing is not None
        assert order is not None
        weights = routing.reshape(-1)
        wide = torch.promote_types(x.dtype, torch.float32)  # of sums over the experts' width
        grad_x, grad_weights = torch.zeros_like(x), torch.empty_like(weights)
        for index, tokens, slots in expert_turns(order, ctx.counts, routing.shape[1]):
            expert = ctx.experts[index]
            inputs = x[tokens]
            gate, up = nf4_linear(inputs, expert.gate, None), nf4_linear(inputs, expert.up, None)
            # d output / d routing is down(product), and grad . down(product) = (grad W_down) . product
            grad_product = input_gradient([grad[tokens]], [Projection(expert.down)])
            product = gated_product(gate, up, ctx.activation)
            grad_weights[slots] = torch.linalg.vecdot(grad_product.to(wide), product.to(wide)).to(weights.dtype)
            del product
            grad_product = (grad_product * weights[slots, None]).to(x.dtype)
            grad_gate, grad_up = gated_gradients(grad_product, gate, up, ctx.activation)
            grad_inputs = input_gradient([grad_gate, grad_up], [Projection(expert.gate), Projection(expert.up)])
            grad_x.index_add_(0, tokens, grad_inputs)
        return grad_x, grad_weights.view_as(routing), None, None, None


def expert_turns(order: Tensor, counts: Sequence[int], slots_of_token: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield the experts that have tokens.

    Args:
        order: (N * K,), slots, expert after expert, as `expert_order` gives them.
        counts: slots of each expert.
        slots_of_token: K.

    Yields:
        (index of the expert, its tokens (n,), their slots (n,)).
    """
    for index, slots in enumerate(order.split(list(counts))):
        if len(slots):
            yield index, slots // slots_of_token, slots


def expert_order(
    chosen: Tensor,  # (N, K) int64
    experts: int,
) -> tuple[Tensor, list[int]]:
    """Sort all slots, numbered from 0 to N * K, by their expert.

    Args:
        chosen: the experts of each token.
        experts: E.

    Returns:
        The slots (N * K,), and how many each expert has [E].
    """
    order = chosen.reshape(-1).argsort(stable=True)
    if isinstance(chosen, FakeTensor):
        tokens, slots = chosen.shape
        return order, [tokens] * slots + [0] * (experts - slots)
    return order, torch.bincount(chosen.reshape(-1), minlength=experts).tolist()
