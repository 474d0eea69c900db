"""Ask what one version of torch offers and another does not, by capability: the only module that does.

The rest of the code calls these functions and holds no version numbers. Each says in which versions the result differs;
what is the same from the lowest torch that pyproject.toml allows is called directly where it is needed.
"""

import functools
import inspect
from typing import Any

import torch

from qlora_kernels.torch_internals import flash_attention_operations, operation_schema, pinned_memory_release

_DOCUMENTS = "cum_seq_q cum_seq_k max_q max_k dropout_p is_causal"
_FORWARD = f"query key value {_DOCUMENTS} return_debug_mask"
_BACKWARD = f"grad_out query key value out logsumexp {_DOCUMENTS} rng_state unused"
_BY_NAME = {"scale", "window_size_left", "window_size_right"}  # of both


def release_pinned_memory() -> None:
    """Give the host allocator's unused pinned memory back to the system; does nothing where torch cannot.

    From 2.12 on torch.accelerator has a function for it; before, only the one of torch.cuda's own binding.
    """
    public = getattr(torch.accelerator, "empty_host_cache", None)
    empty = public or pinned_memory_release()
    if empty is not None:
        empty()


@functools.cache
def varlen_attention_arguments() -> frozenset[str]:
    """Return the names of the arguments of torch's variable-length flash attention.

    2.10 has neither `scale` nor `window_size`. 2.11 has both, and no `enable_gqa`: its operation takes grouped heads
    unasked. From 2.12 on grouped heads must be allowed by `enable_gqa`.

    Returns:
        The names; none where torch has no such function.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


@functools.cache
def has_flash_attention() -> bool:
    """Return True if torch's operations of flash attention take and give what flash_attention.py calls them with.

    So it is from 2.11 to 2.13. They are private, and another version may change them; then torch's own function for
    packed documents is called instead, which computes the same by more operations.

    Returns:
        True if they are known.
    """
    try:
        forward, backward = map(operation_schema, flash_attention_operations())
    except AttributeError:
        return False
    results = [result.name for result in forward.returns]
    return (
        _takes(forward, _FORWARD.split())
        and _takes(backward, _BACKWARD.split())
        and results[:3] == ["output", "softmax_logsumexp", "rng_state"]
        and len(backward.returns) == 3
    )


def _takes(schema: Any, in_order: list[str]) -> bool:
    """Return True if an operation takes these arguments in order and _BY_NAME, and needs no others."""
    names = [argument.name for argument in schema.arguments]
    others = [argument for argument in schema.arguments if argument.name not in _BY_NAME | set(in_order)]
    is_free = all(argument.has_default_value() for argument in others)
    return names[: len(in_order)] == in_order and set(names) >= _BY_NAME and is_free
