"""Try on a small input whether other code computes what ours does, bit for bit.

So no list of supported models is needed, and code that only looks alike is not mistaken for the same.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kernels.gated import ACTIVATION_NAMES, Activation, activate
from qlora_kernels.torch_internals import with_real_tensors

SIZES = torch.logspace(-4, 4, 32)
"""Sizes of the values that modules are tried on; from small to large, since some modules clip only large ones."""

ERRORS_OF_A_CALL = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors of code that is called in a way it is not made for."""


def agree(theirs: Callable[[], Any], ours: Callable[[], Tensor]) -> bool:
    """Return True if `theirs()` runs without error and returns exactly the bits of `ours()`.

    Args:
        theirs: may fail, as the code in it may not be made for such a call.
        ours: gives the expected tensor.

    Returns:
        True if dtype, shape and values are equal.
    """
    try:
        result = theirs()
    except ERRORS_OF_A_CALL:
        return False
    expected = ours()
    return isinstance(result, Tensor) and result.dtype == expected.dtype and torch.equal(result, expected)


def named_activation(activation: nn.Module) -> Activation:
    """Find the name under which qlora_kernels has operations for an activation, by comparing bits on many values.

    Args:
        activation: of each element.

    Returns:
        The name; the activation itself if no name gives its bits.
    """
    with with_real_tensors(), torch.no_grad():
        sizes = torch.cat([SIZES, torch.linspace(0, 9, 129)])
        probes = [torch.cat([-sizes, sizes]).to(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
        for name in ACTIVATION_NAMES:
            ours = functools.partial(activate, activation=name)
            if all(agree(functools.partial(activation, x), functools.partial(ours, x)) for x in probes):
                return name
    return activation
