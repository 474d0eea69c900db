"""Compute the product inside a gated MLP, activation(gate) * up (Shazeer 2020, arXiv:2002.05202), and its gradients.

Backward needs gate and up and nothing else, so whoever keeps those can make the product again. For the activations of
`Name` both directions are operations of the register: in plain torch, with the bits of the formula in autograd; on CUDA
one kernel each (gated_triton.py), which keeps the activated gate in registers. Other activations go through autograd.

Legend: W width of the MLP.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kernels.registry import define, from_triton

Name = Literal["silu", "gelu", "gelu_tanh"]
ACTIVATION_NAMES: tuple[Name, ...] = get_args(Name)

Activation = Callable[[Tensor], Tensor] | Name
"""By name, or any function of each element that returns a new tensor; autograd takes its gradient."""

_APPROXIMATION = {"gelu": "none", "gelu_tanh": "tanh"}


def activate(gate: Tensor, activation: Name) -> Tensor:
    """Compute activation(gate).

    Args:
        gate: any shape.
        activation: by name.

    Returns:
        A new tensor.
    """
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate=_APPROXIMATION[activation])


def gated_product(
    gate: Tensor,  # (..., W)
    up: Tensor,  # (..., W)
    activation: Activation,
) -> Tensor:  # (..., W)
    """Compute activation(gate) * up, without gradients.

    Args:
        gate: what is activated.
        up: what it is multiplied with.
        activation: a name or a function.

    Returns:
        A new tensor.
    """
    if not isinstance(activation, str):
        return activation(gate).mul_(up)
    if torch.is_grad_enabled():
        gate, up = gate.detach(), up.detach()
    return torch.ops.qlora_kernels.gated_product(gate, up, activation)


def gated_gradients(
    grad: Tensor,  # (..., W) of the product; it becomes gate's gradient
    gate: Tensor,  # (..., W)
    up: Tensor,  # (..., W)
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of gate and up from that of their product.

    Args:
        grad: of the product; its contents are lost, as a named activation writes gate's gradient there.
        gate: as given to `gated_product`.
        up: as given to `gated_product`.
        activation: as given to `gated_product`.

    Returns:
        The gradients of gate and up.
    """
    if not isinstance(activation, str):
        with torch.enable_grad():
            input = gate.detach().requires_grad_()
            activated = activation(input)
        grad_up = grad * activated.detach()
        (grad_gate,) = torch.autograd.grad(activated, input, grad.mul_(up))
        return grad_gate, grad_up
    if torch.is_grad_enabled():
        gate, up = gate.detach(), up.detach()
    grad_up = torch.ops.qlora_kernels.gated_gradients(grad, gate, up, activation)
    return grad, grad_up


def product_torch(gate: Tensor, up: Tensor, activation: Name) -> Tensor:
    """Define `gated_product` for named activations in plain torch.

    Args:
        gate: (..., W).
        up: (..., W).
        activation: by name.

    Returns:
        A new tensor (..., W).
    """
    return activate(gate, activation).mul_(up)


def gradients_torch(grad: Tensor, gate: Tensor, up: Tensor, activation: Name) -> Tensor:
    """Define `gated_gradients` for named activations in plain torch: gate's gradient takes the place of `grad`.

    Args:
        grad: (..., W), overwritten.
        gate: (..., W).
        up: (..., W).
        activation: by name.

    Returns:
        The gradient of up (..., W).
    """
    grad_up = activate(gate, activation).mul_(grad)
    grad.mul_(up)
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=grad)
    else:
        torch.ops.aten.gelu_backward.grad_input(grad, gate, approximate=_APPROXIMATION[activation], grad_input=grad)
    return grad_up


def _product_fake(gate: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(gate)


define(
    "gated_product(Tensor gate, Tensor up, str activation) -> Tensor",
    product_torch,
    _product_fake,
    cuda=from_triton("gated_triton", "product_triton"),
)
define(
    "gated_gradients(Tensor(a!) grad, Tensor gate, Tensor up, str activation) -> Tensor",
    gradients_torch,
    lambda grad, gate, *others: torch.empty_like(gate),
    cuda=from_triton("gated_triton", "gradients_triton"),
)
