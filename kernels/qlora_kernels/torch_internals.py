"""Gather every private name of torch that this project uses, each behind a function or a name of its own.

A private name may change with any release. So it is used here and nowhere else, and each has a test in
tests/kernels/test_torch_internals.py that fails by its name after an upgrade. tests/test_library_names.py finds private
names elsewhere.

Four classes are passed on as they are, since others derive from them or ask for them by isinstance: `FakeTensor` and
`FakeTensorMode` (tensors with a shape and no memory), `TorchDispatchMode` (sees every operation), and `OpOverload` (an
operation). Left out: what one version of torch has and another has not (torch_features.py).
"""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from copy import copy
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch._ops import OpOverload as OpOverload
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves


def with_real_tensors() -> AbstractContextManager[Any]:
    """Leave FakeTensorMode for the block, so that tensors made in it have values.

    Returns:
        The context manager.
    """
    return unset_fake_temporarily()


def without_dispatch() -> AbstractContextManager[Any]:
    """Hide operations in the block from every TorchDispatchMode.

    Returns:
        The context manager.
    """
    return torch._C._DisableTorchDispatch()


def without_torch_function() -> AbstractContextManager[Any]:
    """Keep functions called in the block from calling `__torch_function__` of a tensor's class again.

    Returns:
        The context manager.
    """
    return torch._C.DisableTorchFunctionSubclass()


def leaves(result: Any) -> list[Any]:
    """Return what a nest of lists, tuples and dicts holds.

    Args:
        result: such as an operation returns.

    Returns:
        All that is none of these, in order.
    """
    return tree_leaves(result)


def default_device() -> Any:
    """Return the device on which a tensor is made where none is named.

    `torch.get_default_device` would say the same, in several times the time: a plan asks before every operation.

    Returns:
        The device.
    """
    return torch._C._get_default_device()


def storage_address(storage: UntypedStorage) -> int:
    """Return a number that no other living storage has, of fake ones too, whose data_ptr is 0.

    Args:
        storage: of a tensor.

    Returns:
        The number.
    """
    return storage._cdata


def operation_schema(operation: OpOverload) -> Any:
    """Return an operation's name and arguments, and which of these it writes to.

    Args:
        operation: of torch.

    Returns:
        The schema, with `name` and `arguments`; an argument has `name` and `alias_info`.
    """
    return operation._schema


def is_reading_of_a_number(operation: Any) -> bool:
    """Return True for the operation behind `tensor.item()`.

    Args:
        operation: of torch.

    Returns:
        True if it is that one.
    """
    return operation is torch.ops.aten._local_scalar_dense.default


def release_saved_tensors(node: Any) -> None:
    """Release what a node of autograd saved for backward, unless its graph is to be used again.

    Args:
        node: of a function written in Python.
    """
    node.maybe_clear_saved_tensors()


def version_of(tensor: Tensor) -> int:
    """Count how often a tensor's memory was written to in place.

    Args:
        tensor: of any shape, but none of inference mode.

    Returns:
        The count, shared with all views.
    """
    return tensor._version


def reshaped_without_view(
    tensor: Tensor,  # of any shape, contiguous
    shape: list[int],
) -> Tensor:
    """Return the tensor in another shape, as one that autograd does not take for a view of the first.

    Autograd forbids to write into a view that a function made inside.

    Args:
        tensor: contiguous.
        shape: of as many elements.

    Returns:
        A tensor with the same memory.
    """
    return torch.ops.aten._unsafe_view(tensor, shape)


def copy_with(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter] | None = None,
    children: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """Copy a module so that some of its parameters or children are others; the original stays as it is.

    Args:
        module: copied without what it holds, which the copy shares.
        parameters: all that the copy has, by name; by default the module's own.
        children: those of the copy that are not the module's, by name.

    Returns:
        The copy, with the forward of its class.
    """
    copied = copy(module)
    vars(copied).pop("forward", None)
    if parameters is not None:
        copied._parameters = dict(parameters)
    if children is not None:
        copied._modules = {**module._modules, **children}
    return copied


def has_hooks(module: nn.Module) -> bool:
    """Return True if something is to be called with the module: its outputs must then come from its own call.

    Args:
        module: any; hooks of torch for all modules are not asked for.

    Returns:
        True if it has a hook.
    """
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_onednn_linear() -> bool:
    """Return True where torch has `onednn_linear`.

    Returns:
        True if it has it.
    """
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(
    x: Tensor,  # (N, I) fp32
    weight: Tensor,  # (O, I)
    bias: Tensor | None,  # (O,) contiguous: it is read as if it were
) -> Tensor:  # (N, O)
    """Compute x W^T + bias on a CPU by oneDNN, through the op that torch's compiler puts in the place of F.linear.

    Args:
        x: the tokens.
        weight: the matrix.
        bias: contiguous, as it is read as if it were; or None.

    Returns:
        The product.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def efficient_attention(
    query: Tensor,  # (B, H, L, D)
    key: Tensor,  # (B, H, L, D)
    value: Tensor,  # (B, H, L, D)
    *,
    scale: float,
    dropout: float,
    for_backward: bool,
) -> Tensor:  # (B, H, L, D)
    """Attend causally by the kernel that torch takes on a CUDA card where flash attention does not fit.

    `F.scaled_dot_product_attention` chooses by where its tensors are; a plan's are on no card.

    Args:
        query: of one document.
        key: of as many heads as the query.
        value: of as many heads as the query.
        scale: what products of queries and keys are multiplied by.
        dropout: share of the attention weights that are dropped.
        for_backward: a gradient is wanted.

    Returns:
        The output.
    """
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    output, *_ = attend(query, key, value, None, for_backward, dropout, True, scale=scale)
    return output


def efficient_attention_backward() -> OpOverload:
    """Return the backward operation of `efficient_attention`.

    Returns:
        The operation.
    """
    return torch.ops.aten._scaled_dot_product_efficient_attention_backward.default


@functools.cache
def takes_cpu_flash_attention(heads: int, key_heads: int, head_dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """Return True if `F.scaled_dot_product_attention` takes its fused kernel on a CPU, causal and without dropout.

    It is asked with one token; besides what is named here, it wants the values of a head next to each other.

    Args:
        heads: of queries.
        key_heads: of keys and values.
        head_dim: of queries and keys.
        value_dim: of values.
        dtype: of all.

    Returns:
        True for that kernel; False for another way.
    """
    with without_dispatch():
        shapes = (heads, head_dim), (key_heads, head_dim), (key_heads, value_dim)
        q, k, v = (torch.empty(1, count, 1, size, dtype=dtype, device="cpu") for count, size in shapes)
        choice = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=heads != key_heads)
    return choice == SDPBackend.FLASH_ATTENTION.value


def cpu_flash_attention() -> OpOverload:
    """Return the operation of torch's fused attention on a CPU.

    Returns:
        The operation: of query, key, value, dropout, whether it is causal and, by name, the scale; it gives the output,
        and the logarithms of the sums of exponentials, in fp32 or wider.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def cpu_flash_attention_backward() -> OpOverload:
    """Return the backward operation of torch's fused attention on a CPU.

    Returns:
        The operation: of the output's gradient, query, key, value, both results, and the rest as the forward one.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def varlen_attention_backward() -> OpOverload:
    """Return the backward operation of flash attention over packed documents; its module must be imported.

    Returns:
        The operation.
    """
    return torch.ops.torch_attn._varlen_attn_backward.default


def flash_attention_operations() -> tuple[OpOverload, OpOverload]:
    """Return flash attention forward and backward, the operations that torch's function for packed documents runs.

    They are used directly only where `torch_features.has_flash_attention` knows their arguments.

    Returns:
        Both.
    """
    return torch.ops.aten._flash_attention_forward.default, torch.ops.aten._flash_attention_backward.default


def pinned_memory_release() -> Callable[[], None] | None:
    """Return what gives unused pinned memory back under a torch without `torch.accelerator.empty_host_cache`.

    Returns:
        The function; None where torch has none.
    """
    return getattr(torch._C, "_host_emptyCache", None)


def sleep_on_device(cycles: int) -> None:
    """Make the current CUDA stream wait.

    Args:
        cycles: of the card's clock.
    """
    torch.cuda._sleep(cycles)
