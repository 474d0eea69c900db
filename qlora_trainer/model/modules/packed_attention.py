"""Attend over packed documents through transformers' own attention registry.

`packed_documents(model)` switches the model to our attention function for the forward passes in the block. Each of them
gets `document_bounds`, the first token of each document in the row, with the same numbers on the device, copied once a
pack; the function keeps the documents apart without a mask matrix. No mask function is registered under its name, so
transformers builds none. Outside the block the model attends as it was loaded, which generation with a cache needs.

A model that does not use the registry, or whose layers mix tokens in other ways, would silently let documents see each
other. `attends_apart` tries it, and such a model is trained on right-padded rows instead. One that cannot run a plain
forward on token and position ids cannot be trained at all.

Legend: T tokens, N documents, D numbers of a head, Hq query heads, Hkv key heads, P keys of a prefix of each document.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from qlora_kernels.card import Card, attention_in_words
from qlora_kernels.prefix_layout import PrefixLayout, outputs_of_tokens, queries_in_places
from qlora_kernels.varlen_attention import varlen_attention
from qlora_trainer.common.boundary import as_model_error, is_from_library
from qlora_trainer.common.transformers_internals import attention_name, set_attention_name
from qlora_trainer.model.evaluation_mode import evaluation_mode
from qlora_trainer.model.modules.experts import has_experts
from qlora_trainer.model.modules.prefix_cache import positions_before

NAME = "qlora_packed"
LONGEST_WINDOW_TRIED = 512  # tokens; a longer document would cost too much on a CPU
# The configs that a model's modules read the attention's name from, each once: a look at every module of a large model
# takes as long as some ten operations, and it is asked for twice in each forward pass.
_CONFIGS: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, Hq, T, D)
    key: Tensor,  # (1, Hkv, T, D), or with prefixes (1, Hkv, T + N P, D)
    value: Tensor,  # likewise, (1, Hkv, T, D)
    attention_mask: Tensor | None,
    *,
    document_bounds: list[int],  # (N + 1,) first token of each document, and T
    bounds_on_device: Tensor | None = None,  # (N + 1,) int32
    prefix_layout: PrefixLayout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each document of a row, by the signature that transformers' models call.

    Args:
        module: the model's attention, not used.
        query: of the row.
        key: of the row.
        value: of the row.
        attention_mask: of any shape, not used; transformers makes none.
        document_bounds: the row's documents.
        bounds_on_device: the same on the query's device; None: they are copied there where they are needed.
        prefix_layout: where keys and values have a prefix before each document, as the bounds have; None: they do not.
        scaling: of the scores; by default 1 / sqrt(D).
        dropout: probability, of the attention weights.
        sliding_window: tokens that a token sees, itself counted; None: all before it.
        softcap: bound of the scores, or None.
        **kwargs: what else transformers passes, not used.

    Returns:
        (output (1, T, Hq, D), None in place of the attention weights).
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if prefix_layout is not None:
        query = queries_in_places(query, prefix_layout)
    output = varlen_attention(
        query,
        key,
        value,
        document_bounds,
        bounds_on_device,
        scale=scale,
        window=sliding_window,
        softcap=softcap,
        dropout=dropout,
    )
    return output if prefix_layout is None else outputs_of_tokens(output, prefix_layout), None


@contextmanager
def packed_documents(model: nn.Module, attention: Callable[..., Any] = packed_attention) -> Iterator[None]:
    """Switch the model to another attention in the block, where every forward must pass `document_bounds`.

    Args:
        model: of transformers.
        attention: with the signature of `packed_attention`.
    """
    AttentionInterface.register(NAME, attention)
    if model not in _CONFIGS:
        found = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
        _CONFIGS[model] = list(found.values())
    before = [(config, attention_name(config)) for config in _CONFIGS[model]]
    for config, _ in before:
        set_attention_name(config, NAME)
    try:
        yield
    finally:
        for config, name in before:
            set_attention_name(config, name)


@torch.no_grad()
def attends_apart(model: Any, vocab_size: int) -> bool | None:
    """Return True if two packed documents give the hidden states that each gives by itself, None if that is not known.

    It is not known where the model's values are not finite in its dtype: there is nothing to compare.

    Args:
        model: of transformers, with weights.
        vocab_size: random ids are below it.

    Returns:
        True if the model can be trained on packed rows, False if it cannot; None if neither was seen.

    Raises:
        ModelError: the model cannot run a plain forward.
        Exception: the device failed, or memory ran out.
    """
    config = model.config.get_text_config()
    first, second = _probe_length(config, positions_before(model)), 7
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (1, first + second), generator=generator).to(device)
    other_first = torch.cat([(ids[:, :first] + 1) % vocab_size, ids[:, first:]], dim=1)
    positions = torch.cat([torch.arange(first), torch.arange(second)])[None].to(device)
    windows: set[int | None] = set()

    def noting_windows(*tensors: Any, sliding_window: int | None = None, **settings: Any) -> tuple[Tensor, None]:
        windows.add(sliding_window)
        return packed_attention(*tensors, sliding_window=sliding_window, **settings)

    def pack(tokens: Tensor) -> Tensor:
        with evaluation_mode(model), packed_documents(model, noting_windows):
            return _hidden(model, tokens, positions, document_bounds=[0, first, first + second])[0]

    with evaluation_mode(model), as_model_error(cannot_be_trained(model)):
        alone = [_hidden(model, ids[:, part], positions[:, part]) for part in (slice(first), slice(first, None))]
    try:
        packed, after_another = pack(ids), pack(other_first)
    except Exception as error:
        if not is_from_library(error):
            raise
        # The model passes our arguments to code that does not know them, or needs the mask, which is not made.
        return False
    if has_window(config) and windows <= {None}:
        return False  # its window works only through a mask, and a packed forward has none
    expected = torch.cat(alone, dim=1)[0].float()
    if not torch.isfinite(expected).all():
        return None
    tolerance = 1e-3 if packed.dtype == torch.float32 else 5e-2
    if not (packed.float() - expected).norm() <= tolerance * expected.norm():
        return False
    # What rounding hides above shows here: passes of the same shapes give the same bits, whatever the first document
    # is, but for a device that does not repeat itself, and for experts, whose shapes follow from the tokens they get.
    ours, theirs = packed[first:].float(), after_another[first:].float()
    difference = (ours - theirs).norm(dim=1)
    allowed = tolerance / 10 * ours.norm(dim=1) if has_experts(model) else torch.zeros_like(difference)
    if (difference <= allowed).all():
        return True
    repeated = pack(ids)[first:].float()
    return bool((difference <= allowed + 2 * (ours - repeated).norm(dim=1)).all())


def attention_taken(model: Any, card: Card | None, dtype: torch.dtype, packing: bool) -> str:
    """Describe how a model attends in training, and why no faster way is taken.

    Args:
        model: of transformers.
        card: the GPU; None for a CPU.
        dtype: of computation.
        packing: False if rows are padded.

    Returns:
        A phrase for people.
    """
    config = model.config.get_text_config()
    sizes = head_sizes(config)
    if not packing or sizes is None:
        return "transformers' own, over padded rows"
    softcap = getattr(config, "attn_logit_softcapping", None)
    dropout = getattr(config, "attention_dropout", None) or getattr(config, "attn_pdrop", None) or 0.0
    return attention_in_words(card, dtype, sizes[2], softcap=softcap, dropout=dropout)


def head_sizes(config: Any) -> tuple[int, int, int] | None:
    """Read the sizes of the attention heads from a model's config.

    Args:
        config: of the text model.

    Returns:
        (query heads, key heads, numbers of a head); None if the config does not have them.
    """
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return None
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, key_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def cannot_be_trained(model: Any) -> Callable[[BaseException], str]:
    """Return what describes the error of a model whose own code cannot run a plain forward, for `as_model_error`.

    Args:
        model: named in the message.

    Returns:
        A function that makes the message of an error.
    """
    if positions_before(model):
        return lambda error: (
            f"{type(model).__name__} cannot have a prefix: with keys and values before its own, its forward fails with "
            f"{type(error).__name__}: {error}. Choose another adapter.kind, or a base of another architecture."
        )
    return lambda error: (
        f"{type(model).__name__} cannot be trained here: given only input_ids and position_ids, its forward fails "
        f"with {type(error).__name__}: {error}. Choose a base of another architecture."
    )


def _probe_length(config: Any, before: int) -> int:
    """Choose the tokens of the first probe document: past the window, if affordable and within the positions left."""
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    longest = max((w for w in windows if isinstance(w, int) and w <= LONGEST_WINDOW_TRIED), default=0)
    positions = getattr(config, "max_position_embeddings", None)
    return min(longest + 12, positions - before if positions else longest + 12)


def has_window(config: Any) -> bool:
    """Return True if some layer sees only the nearest tokens, or a chunk of them: it must then pass us a window.

    This holds for windows of any length, also those too long to try. A chunked layer has no window to pass.

    Args:
        config: of the text model.

    Returns:
        True if one does.
    """
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention", "chunked_attention"]
    windows = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    return any(kind in layer_types and getattr(config, name, None) is not None for kind, name in windows.items())


def _hidden(model: Any, input_ids: Tensor, position_ids: Tensor, **bounds: list[int]) -> Tensor:
    """Run the model without its LM head."""
    inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
    return model.base_model(**inputs, **bounds).last_hidden_state
