"""Rotate heads in one pass where a model's attention does it as `qlora_kernels.rotary` does.

transformers' attention modules call a function of their file by name. It is tried alone, on random numbers; where it
gives our bits, the `forward` of this model's modules finds ours under that name. The library's own functions and every
other model stay as they are, and so does attention that calls it otherwise, or rotates heads otherwise (in pairs, in
part).
"""

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kernels.rotary import rotate
from qlora_kernels.torch_internals import with_real_tensors
from qlora_trainer.model.modules.same_bits import agree

ROTARY_FUNCTION = "apply_rotary_pos_emb"  # called as (q, k, cos, sin), with q (B, H, T, D) and the tables (B, T, D)


def patch_rotary(modules: Iterable[nn.Module]) -> int:
    """Let attention modules call our rotary embedding where theirs computes the same.

    Args:
        modules: of one model.

    Returns:
        How many of them do.
    """
    replaced: dict[types.CodeType, types.FunctionType | None] = {}
    count = 0
    for module in modules:
        method = type(module).forward
        if not isinstance(method, types.FunctionType) or ROTARY_FUNCTION not in method.__code__.co_names:
            continue
        if method.__code__ not in replaced:
            theirs = method.__globals__.get(ROTARY_FUNCTION)
            replaced[method.__code__] = (
                _calling(method, _rotation(theirs)) if theirs and _rotates_halves(theirs) else None
            )
        if (function := replaced[method.__code__]) is not None:
            module.forward = types.MethodType(function, module)
            count += 1
    return count


def _calling(function: types.FunctionType, rotation: Callable[..., Any]) -> types.FunctionType:
    """Copy the function as it is, but for what it finds under ROTARY_FUNCTION."""
    scope = {**function.__globals__, ROTARY_FUNCTION: rotation}
    copied = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return functools.wraps(function)(copied)  # type: ignore[return-value]


def _rotation(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Make their function, computed by ours where the arguments are such as were tried."""

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **named: Any) -> Any:
        alike = cos.shape == sin.shape and q.dtype == k.dtype == cos.dtype == sin.dtype
        fits = q.ndim == k.ndim == 4 and cos.ndim == 3 and cos.shape[2] == q.shape[3] == k.shape[3]
        if others or named or not alike or not fits or cos.shape[0] not in (1, q.shape[0]) or cos.requires_grad:
            return theirs(q, k, cos, sin, *others, **named)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    return apply_rotary_pos_emb


def _rotates_halves(theirs: Callable[..., Any]) -> bool:
    """Return True if the function, given q, k, cos and sin, rotates each head's halves together as `rotate` does."""
    with with_real_tensors(), torch.no_grad():
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            generator = torch.Generator().manual_seed(0)
            shapes = [(2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8)]
            q, k, cos, sin = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)

            def both(q: Tensor = q, k: Tensor = k, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
                rotated = theirs(q, k, cos, sin)
                return torch.cat(rotated, dim=1)

            def ours(q: Tensor = q, k: Tensor = k, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
                return torch.cat([rotate(q, cos, sin), rotate(k, cos, sin)], dim=1)

            if not agree(both, ours):
                return False
    return True
