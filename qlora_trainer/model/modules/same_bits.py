"""Trying whether somebody else's code computes what ours does, on a small input, to the last bit.

So there is no list of models that ours fits, and nothing that only looks alike is taken for it.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kernels.gated import ACTIVATION_NAMES, Activation, activate
from qlora_kernels.torch_internals import with_real_tensors

SIZES = torch.logspace(-4, 4, 32)
"""Of the values that modules are tried on: some clip only what is large."""

# What code may raise that is run in a way it is not made for.
_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def agree(theirs: Callable[[], Any], ours: Callable[[], Tensor]) -> bool:
    """Whether what may not be made for being run so gives the same bits."""
    try:
        result = theirs()
    except _ERRORS:
        return False
    expected = ours()
    return isinstance(result, Tensor) and result.dtype == expected.dtype and torch.equal(result, expected)


def named_activation(activation: nn.Module) -> Activation:
    """The name of an activation that qlora_kernels has operations for; else itself."""
    with with_real_tensors(), torch.no_grad():
        sizes = torch.cat([SIZES, torch.linspace(0, 9, 129)])
        probes = [torch.cat([-sizes, sizes]).to(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
        for name in ACTIVATION_NAMES:
            ours = functools.partial(activate, activation=name)
            if all(agree(functools.partial(activation, x), functools.partial(ours, x)) for x in probes):
                return name
    return activation
