"""Compute what operations use inside and free again, by formula: the part of a step that fake tensors do not show.

For a CUDA card it is what torch's kernels allocate there, by their source; for a CPU, what an operation written in
plain torch makes within. Here is also what cuBLAS holds all the time. Left out: the CUDA context, which is no part of
torch's memory.
"""

import functools
import math
import os
import re
from typing import Any

import torch

from qlora_kernels.blockwise_attention import blockwise_workspace_bytes
from qlora_kernels.card import Card
from qlora_kernels.rms_norm import norm_workspace_bytes
from qlora_kernels.rotary import rotary_workspace_bytes
from qlora_kernels.softmax_loss import softmax_loss_workspace_bytes
from qlora_kernels.torch_features import has_flash_attention, varlen_attention_arguments
from qlora_kernels.torch_internals import (
    OpOverload,
    cpu_flash_attention_backward,
    efficient_attention_backward,
    flash_attention_operations,
    varlen_attention_backward,
)
from qlora_kernels.varlen_attention import flash_backward_bytes
from qlora_trainer.planning.live_bytes import Workspace
from qlora_trainer.training.determinism import CUBLAS_DETERMINISTIC, CUBLAS_SETTING
from qlora_trainer.weights.bitsandbytes_internals import update_operations

CUBLAS_THREADS = 2  # the one that goes forward, and autograd's for the device, which goes backward

Workspaces = dict[OpOverload, Workspace]


def cublas_bytes(card: Card, setting: str | None = None) -> int:
    """Compute what torch's allocator holds for cuBLAS: one workspace per thread that calls it (CublasHandlePool.cpp).

    cuBLASLt shares it. On sm_120 some versions of torch take the smaller size; counted is the larger.

    Args:
        card: that it runs on.
        setting: of CUBLAS_WORKSPACE_CONFIG, such as ":4096:8" (KiB, how often); None: torch's default for the card.

    Returns:
        Bytes.
    """
    default = 8 * 4096 if card.capability[0] in (9, 10, 12) else 2 * 4096 + 8 * 16
    asked = sum(int(size) * int(count) for size, count in re.findall(r":(\d+):(\d+)", setting or ""))
    has_sizes = setting is not None and re.search(r":\d+:\d+", setting)
    return CUBLAS_THREADS * 1024 * (asked if has_sizes else default)


def cublas_setting(deterministic: bool) -> str | None:
    """Return the setting that a run in this process will have.

    Args:
        deterministic: training.deterministic.

    Returns:
        The value of CUBLAS_WORKSPACE_CONFIG; None: unset.
    """
    return os.environ.get(CUBLAS_SETTING, CUBLAS_DETERMINISTIC if deterministic else None)


def workspaces_on_cuda(card: Card) -> Workspaces:
    """Map operations to what they use inside on a card; attention outside of packs is there as the CPU's operation.

    Args:
        card: that they run on.

    Returns:
        Functions of an operation's arguments that give bytes.
    """
    fused = functools.partial(fused_backward_bytes, card=card)
    found: Workspaces = {
        cpu_flash_attention_backward(): fused,
        efficient_attention_backward(): fused,
        torch.ops.qlora_kernels.blockwise_attention.default: functools.partial(blockwise_bytes, on_cuda=True),
        torch.ops.qlora_kernels.blockwise_attention_backward.default: functools.partial(
            blockwise_backward_bytes, on_cuda=True
        ),
        torch.ops.qlora_kernels.keep_mask.default: keep_mask_bytes,
    }
    varlen = functools.partial(varlen_backward_bytes, card=card)
    if has_flash_attention():
        found[flash_attention_operations()[1]] = varlen
    elif varlen_attention_arguments():  # which has imported the module that defines it
        found[varlen_attention_backward()] = varlen
    if card.is_deterministic:
        found[torch.ops.aten.index_add_.default] = index_add_bytes
    return found


def workspaces_on_cpu() -> Workspaces:
    """Map operations to what they use inside on a CPU.

    Returns:
        Functions of an operation's arguments that give bytes.
    """
    update_32bit, update_8bit = update_operations()
    return {
        torch.ops.qlora_kernels.blockwise_attention.default: functools.partial(blockwise_bytes, on_cuda=False),
        torch.ops.qlora_kernels.blockwise_attention_backward.default: functools.partial(
            blockwise_backward_bytes, on_cuda=False
        ),
        torch.ops.qlora_kernels.keep_mask.default: keep_mask_bytes,
        torch.ops.qlora_kernels.rms_norm.default: functools.partial(rms_norm_bytes, backward=False),
        torch.ops.qlora_kernels.rms_norm_backward.default: functools.partial(rms_norm_bytes, backward=True),
        torch.ops.qlora_kernels.rotate.default: lambda arguments: rotary_workspace_bytes(arguments[0]),
        torch.ops.qlora_kernels.softmax_loss.default: softmax_loss_bytes,
        update_32bit: adamw_32bit_bytes,
        update_8bit: adamw_8bit_bytes,
    }


def fused_backward_bytes(arguments: tuple[Any, ...], card: Card) -> int:
    """Compute what the backward of attention over dense rows uses inside on CUDA.

    The kernel for older cards and fp32 (kernel_backward.h) has the same fp32 gradient of the queries, or as much to sum
    what it begins with; as keys and values are repeated for it, it makes none for them.

    Args:
        arguments: of the operation.
        card: that it runs on.

    Returns:
        Bytes.
    """
    query, key = arguments[1:3]  # (B, Hq, T, D), (B, Hkv, T, D)
    batch, heads, tokens, head_dim = query.shape
    processors = card.processors_summed_over(query.dtype)
    size = query.element_size()
    return flash_backward_bytes(batch * tokens, heads, key.shape[1], head_dim, size, batch, processors)


def varlen_backward_bytes(arguments: tuple[Any, ...], card: Card) -> int:
    """Compute what the backward of flash attention over packed documents uses inside.

    Args:
        arguments: of the operation.
        card: that it runs on.

    Returns:
        Bytes.
    """
    _, query, key, _, _, _, bounds, *_ = arguments  # (T, Hq, D), (T, Hkv, D), (N + 1,)
    tokens, heads, head_dim = query.shape
    processors = card.processors_summed_over(query.dtype)
    size = query.element_size()
    return flash_backward_bytes(tokens, heads, key.shape[1], head_dim, size, len(bounds) - 1, processors)


def index_add_bytes(arguments: tuple[Any, ...]) -> int:
    """Compute what the deterministic index_add_ uses inside: the sorted sum takes a copy of what is added.

    Args:
        arguments: of the operation.

    Returns:
        Bytes.
    """
    return arguments[3].nbytes


def keep_mask_bytes(arguments: tuple[Any, ...]) -> int:
    """Count dropout's draws, 64 bits for four elements, and what the comparison gives, without the mask itself.

    Args:
        arguments: of the operation.

    Returns:
        Bytes.
    """
    like, in_features, *_ = arguments
    elements = like.shape[0] * in_features
    return 8 * math.ceil(elements / 4) + elements


def adamw_32bit_bytes(arguments: tuple[Any, ...]) -> int:
    """Count what bitsandbytes' update on a CPU, written in torch, has at once: three fp32 tensors; on CUDA none.

    Args:
        arguments: of the operation.

    Returns:
        Bytes.
    """
    parameter = arguments[2]
    return (3 + (parameter.dtype != torch.float32)) * 4 * parameter.numel()


def adamw_8bit_bytes(arguments: tuple[Any, ...]) -> int:
    """Count the same for 8-bit state, with both moments in fp32.

    Args:
        arguments: of the operation.

    Returns:
        Bytes.
    """
    return adamw_32bit_bytes(arguments) + 2 * 4 * arguments[2].numel()


def blockwise_bytes(arguments: tuple[Any, ...], *, on_cuda: bool) -> int:
    """Compute what attention by blocks of queries uses inside its forward.

    Args:
        arguments: of the operation.
        on_cuda: with blocks as large as there.

    Returns:
        Bytes.
    """
    query, key, _, _, _, *settings = arguments
    return blockwise_workspace_bytes(query, key, *settings, backward=False, on_cuda=on_cuda)


def blockwise_backward_bytes(arguments: tuple[Any, ...], *, on_cuda: bool) -> int:
    """Compute what attention by blocks of queries uses inside its backward.

    Args:
        arguments: of the operation.
        on_cuda: with blocks as large as there.

    Returns:
        Bytes.
    """
    _, query, key, _, _, _, *settings = arguments
    return blockwise_workspace_bytes(query, key, *settings, backward=True, on_cuda=on_cuda)


def rms_norm_bytes(arguments: tuple[Any, ...], *, backward: bool) -> int:
    """Compute what a norm in plain torch uses inside; on CUDA one kernel keeps it in registers.

    Args:
        arguments: of the operation.
        backward: of the backward one.

    Returns:
        Bytes.
    """
    return norm_workspace_bytes(arguments[1 if backward else 0], backward=backward)


def softmax_loss_bytes(arguments: tuple[Any, ...]) -> int:
    """Compute what the loss in plain torch uses inside; on CUDA one kernel keeps it in registers.

    Args:
        arguments: of the operation.

    Returns:
        Bytes.
    """
    logits, _, _, softcap, _, with_gradient = arguments
    return softmax_loss_workspace_bytes(logits, softcap, with_gradient)
