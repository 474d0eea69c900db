"""Keep the input embedding in host memory: look up the rows of a micro-batch there and copy them to the device.

A step reads a few thousand rows of an embedding that takes a gigabyte for a vocabulary of 128,000: the copy is small,
and the results are bit for bit the same. A plain embedding stays in the checkpoint's dtype, and its rows are cast: on a
CPU that computes in fp32 this halves its memory. An embedding of another class runs its own forward in the dtype of
computation, so what a model does there (Gemma scales by the root of the hidden size) is done.

The embedding is not among the module's parameters and buffers. So the model's device, also as transformers finds it, is
the one that computes, and moving or casting the model does not change the embedding. `tensors_on_cpu` finds it. Call
`keep_embeddings_on_cpu` last, after everything that goes through parameters by name (fingerprint) or casts them.

On CUDA the rows are copied from pinned memory without waiting. A model's forward has its ids on the device, and to read
them the host would wait for all work that is queued there: in a block of `known_ids` they are taken from the host.
Generation, whose ids come from the device, waits. Left out: LM heads that share the embedding's weight.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kernels.torch_internals import storage_address, version_of
from qlora_trainer.common.errors import ModelError

_KNOWN: ContextVar[tuple[Tensor, int, Tensor] | None] = ContextVar("known_ids", default=None)


@contextmanager
def known_ids(
    input_ids: Tensor,  # (B, T)
    on_host: Tensor | None,  # (B, T)
) -> Iterator[None]:
    """Let embeddings in host memory take ids from the host, in the block and its thread, where they are given these.

    Args:
        input_ids: on a device.
        on_host: the same on the host; None: they are read from the device.
    """
    token = _KNOWN.set(None if on_host is None else (input_ids, version_of(input_ids), on_host))
    try:
        yield
    finally:
        _KNOWN.reset(token)


class CpuEmbedding(nn.Module):
    """Run an embedding on the CPU for ids on a device, and return the rows on that device.

    Args:
        embedding: moved to the CPU.
        device: of the ids and the result.
        dtype: of the result.
    """

    def __init__(self, embedding: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        for parameter in embedding.parameters():
            parameter.data = parameter.data.to("cpu")
        for name, buffer in embedding.named_buffers():  # such as a scale that multiplies the rows
            setattr(embedding, name, buffer.to("cpu"))
        self._outside = (embedding,)  # nn.Module does not look for modules in a tuple
        self.device, self.dtype = device, dtype

    @property
    def embedding(self) -> nn.Module:
        """Return the embedding, which is on the CPU."""
        return self._outside[0]

    @property
    def weight(self) -> Tensor:  # (V, H), on the CPU
        """Return the embedding's weight."""
        return self.embedding.get_parameter("weight")

    def forward(self, input_ids: Tensor) -> Tensor:  # (B, T) -> (B, T, H)
        """Look up rows in host memory, and copy them to the device.

        Args:
            input_ids: (B, T).

        Returns:
            Rows of the embedding, (B, T, H).
        """
        found: Tensor = self.embedding(_on_host(input_ids)).to(self.dtype)
        if self.device.type == "cuda":
            found = found.pin_memory()
        return found.to(self.device, non_blocking=True)

    def extra_repr(self) -> str:
        """Describe the embedding, as `print(model)` shows it.

        Returns:
            The embedding and its place.
        """
        return f"{self.embedding} on the host"


def _on_host(input_ids: Tensor) -> Tensor:
    """Return ids on the host: those known, if these are the same memory, in any shape and not written to since."""
    known = _KNOWN.get()
    if known is not None and _memory(input_ids) == _memory(known[0]) and version_of(input_ids) == known[1]:
        return known[2].view(input_ids.shape)
    return input_ids.to("cpu")


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """Return what two tensors of the same values in the same memory have in common, whatever their shapes."""
    address = storage_address(tensor.untyped_storage())
    return address, tensor.storage_offset(), tensor.numel(), tensor.is_contiguous()


def keeps_own_dtype(model: Any) -> bool:
    """Return True if the model's input embedding may stay in the checkpoint's dtype, as it only looks up rows.

    Args:
        model: of transformers.

    Returns:
        True for a plain nn.Embedding.
    """
    return type(model.get_input_embeddings()) is nn.Embedding


def keep_embeddings_on_cpu(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Move the model's input embedding to host memory and put a CpuEmbedding in its place.

    ModelError is raised if the LM head shares its weight.

    Args:
        model: of transformers.
        device: the one that computes.
        dtype: of computation; the embedding already has it, or its own where `keeps_own_dtype` allows.
    """
    refuse_tied_embedding(model)
    embedding = model.get_input_embeddings()
    paths = [path for path, module in model.named_modules() if module is embedding]
    model.set_submodule(paths[0], CpuEmbedding(embedding, device, dtype))


def refuse_tied_embedding(model: Any) -> None:
    """Refuse an input embedding that shares its weight with the LM head, as it cannot be kept on the host.

    Args:
        model: of transformers.

    Raises:
        ModelError: the weight has another user.
    """
    weight = model.get_input_embeddings().weight
    users = [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if len(users) > 1:
        raise ModelError(
            f"model.embeddings is cpu, but {' and '.join(users)} are one weight in this model: the LM head needs "
            "it on the device, and nothing would be saved. Set model.lm_head=4bit (or 8bit) too, which gives the "
            "head a quantized weight of its own, or model.embeddings=device."
        )


def tensors_on_cpu(model: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters and buffers that `keep_embeddings_on_cpu` keeps in host memory.

    Args:
        model: any.

    Yields:
        Tensors on the CPU.
    """
    for module in model.modules():
        if isinstance(module, CpuEmbedding):
            yield from module.embedding.parameters()
            yield from module.embedding.buffers()
