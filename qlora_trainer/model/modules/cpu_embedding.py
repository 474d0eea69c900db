"""The input embedding kept in host memory: the rows of a micro-batch are looked up there and copied to the device.

A step reads a few thousand of the embedding's rows, of a gigabyte for a vocabulary of 128,000: the copy is small, and
the results are the same to the last bit. A plain embedding stays in the checkpoint's dtype, and its rows are cast: half
the memory on a CPU that computes in fp32. Another one runs its own forward in the dtype of computation, so what a model
does in it (Gemma scales by the root of the hidden size) is done.

The embedding is not among the module's parameters and buffers: the model's device stays the one that computes, for
transformers too, and moving or casting the model leaves the host's part where it is. `host_tensors` finds it. So put it
there when all has been read that goes by names (fingerprint) and casts (dtype of computation).

On CUDA the rows go through pinned memory, and the copy does not wait; but the ids come from the device, so each lookup
waits for what is queued there. Left out: LM heads that share the embedding's weight.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.common.errors import ModelError


class HostEmbedding(nn.Module):
    """`embedding` on the CPU, called with ids on `device` and giving its result there, in `dtype`."""

    def __init__(self, embedding: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        for parameter in embedding.parameters():
            parameter.data = parameter.data.to("cpu")
        for name, buffer in embedding.named_buffers():  # such as a scale that multiplies the rows
            setattr(embedding, name, buffer.to("cpu"))
        self._outside = (embedding,)  # in a tuple, where nn.Module does not look for modules
        self.device, self.dtype = device, dtype

    @property
    def embedding(self) -> nn.Module:
        return self._outside[0]

    @property
    def weight(self) -> Tensor:  # (V, H), on the CPU
        return self.embedding.get_parameter("weight")

    def forward(self, input_ids: Tensor) -> Tensor:  # (B, T) -> (B, T, H)
        found: Tensor = self.embedding(input_ids.to("cpu")).to(self.dtype)
        if self.device.type == "cuda":
            found = found.pin_memory()
        return found.to(self.device, non_blocking=True)

    def extra_repr(self) -> str:
        return f"{self.embedding} on the host"


def keeps_own_dtype(model: Any) -> bool:
    """Whether the model's input embedding may stay in the checkpoint's dtype: it gives rows, and computes nothing."""
    return type(model.get_input_embeddings()) is nn.Embedding


def keep_embeddings_on_cpu(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Move the model's input embedding to host memory and put a HostEmbedding in its place.

    Args:
        device: the one that computes.
        dtype: of computation; the embedding has it already, or a narrower one where `keeps_own_dtype`.

    Raises:
        ModelError: the embedding's weight is the LM head's too.
    """
    refuse_tied_embedding(model)
    embedding = model.get_input_embeddings()
    paths = [path for path, module in model.named_modules() if module is embedding]
    model.set_submodule(paths[0], HostEmbedding(embedding, device, dtype))


def refuse_tied_embedding(model: Any) -> None:
    """ModelError where the input embedding's weight is the LM head's too, so that it cannot be kept on the host."""
    weight = model.get_input_embeddings().weight
    users = [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if len(users) > 1:
        raise ModelError(
            f"model.embeddings is host, but {' and '.join(users)} are one weight in this model: the LM head needs "
            "it on the device, and nothing would be saved. Set model.lm_head=4bit (or 8bit) too, which gives the "
            "head a quantized weight of its own, or model.embeddings=device."
        )


def host_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of the model that lie in host memory by `keep_embeddings_on_cpu`."""
    for module in model.modules():
        if isinstance(module, HostEmbedding):
            yield from module.embedding.parameters()
            yield from module.embedding.buffers()
