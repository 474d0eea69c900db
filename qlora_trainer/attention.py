"""Attention over packed documents, through transformers' own attention registry.

`packed_documents(model, bounds)` switches the model to our attention function for the forward passes inside: the
function reads the bounds of the documents lying end to end and keeps them apart without any mask matrix. No mask
function is registered under its name, so transformers builds none. Outside, the model attends as it was loaded,
which generation with a cache needs.

A model that does not go through the registry, or whose layers mix tokens otherwise, would silently let documents see
each other; `attends_apart` tries it, and such a model is trained on right-padded rows instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from qlora_kernels.varlen_attention import varlen_attention

NAME = "qlora_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, Hq, T, D)
    key: Tensor,  # (1, Hkv, T, D)
    value: Tensor,  # (1, Hkv, T, D)
    attention_mask: Tensor | None,
    *,
    document_bounds: list[int],  # (N + 1,) first token of each document, and the end
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The signature that transformers' models call; returns ((1, T, Hq, D), no weights)."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = varlen_attention(
        query, key, value, document_bounds, scale=scale, window=sliding_window, softcap=softcap, dropout=dropout
    )
    return output, None


@contextmanager
def packed_documents(model: nn.Module) -> Iterator[None]:
    """Within, the model's attention is `packed_attention`, and every forward must pass `document_bounds`."""
    AttentionInterface.register(NAME, packed_attention)
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


@torch.no_grad()
def attends_apart(model: nn.Module, vocab_size: int) -> bool:
    """Whether packing leaves this model's documents alone: two packed documents give what each gives by itself."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (1, 19), generator=generator).to(device)
    first, second = ids[:, :12], ids[:, 12:]
    positions = torch.cat([torch.arange(12), torch.arange(7)])[None].to(device)
    was_training = model.training
    model.eval()
    try:
        with packed_documents(model):
            packed = _hidden(model, ids, positions, [0, 12, 19])
        alone = [
            _hidden(model, part, torch.arange(part.shape[1], device=device)[None], None) for part in (first, second)
        ]
    except (TypeError, RuntimeError, ValueError):
        return False  # the model hands our arguments to code that does not know them
    finally:
        model.train(was_training)
    expected = torch.cat(alone, dim=1).float()
    tolerance = 1e-3 if packed.dtype == torch.float32 else 5e-2
    return bool((packed.float() - expected).norm() <= tolerance * expected.norm())


def _hidden(model: Any, input_ids: Tensor, position_ids: Tensor, bounds: list[int] | None) -> Tensor:
    extra = {} if bounds is None else {"document_bounds": bounds}
    return model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **extra).last_hidden_state
