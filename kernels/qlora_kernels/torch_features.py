"""Ask what one version of torch offers and another does not, by capability: the only module that does.

The rest of the code calls these functions and holds no version numbers. Each says in which versions the result differs;
what is the same from the lowest torch that pyproject.toml allows is called directly where it is needed.
"""

import functools
import inspect

import torch

from qlora_kernels.torch_internals import pinned_memory_release


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
