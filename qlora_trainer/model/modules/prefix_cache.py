"""Give a model's attention trained keys and values before those of its tokens, in the place of a cache.

transformers' attention asks a cache for the keys that come before its own, after rotating its own. So a cache that
always begins with the same ones is what PEFT's prefix tuning is, and nothing of the model changes. In training nothing
is kept from one forward pass to the next, so a layer that is run again in backward finds the same; packed, each
document of the row gets the prefix (qlora_kernels/prefix_layout.py). Generation keeps a cache of transformers', which
begins with the prefix. Left out: what the keys and values are (adapters/prefix.py).

Legend: B rows, T tokens, D numbers of a head, Hkv key heads, P keys of the prefix.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from qlora_kernels.prefix_layout import PrefixLayout, with_prefixes
from qlora_trainer.common.errors import AdapterError

LayerPrefix = tuple[Tensor, Tensor]
"""Keys and values of a layer, (Hkv, P, D) each."""


class PrefixCache(DynamicCache):
    """Give the prefix to each layer that asks for what comes before its row's tokens, and keep nothing.

    Args:
        prefix: by layer.
        layout: of the row's documents; None: each row has the prefix once.
        model: whose it is, in words, for messages.
    """

    def __init__(self, prefix: Sequence[LayerPrefix], layout: PrefixLayout | None, model: str) -> None:
        super().__init__()
        self.prefix, self.layout, self.model = prefix, layout, model
        self.asked: set[int] = set()  # layers that were given their prefix

    def update(
        self,
        key_states: Tensor,  # (B, Hkv, T, D)
        value_states: Tensor,  # (B, Hkv, T, D)
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Put a layer's prefix before keys and values.

        Args:
            key_states: of the tokens.
            value_states: of the tokens.
            layer_idx: of the layer.
            *args: not used.
            **kwargs: not used.

        Returns:
            Keys and values of all.
        """
        self.asked.add(layer_idx)
        key, value = self.prefix[layer_idx]
        refuse_other_heads(key, (key_states, value_states), self.model)
        if self.layout is not None:
            return with_prefixes(key, key_states, self.layout), with_prefixes(value, value_states, self.layout)
        return _before(key, key_states), _before(value, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of keys before the tokens.

        Args:
            layer_idx: not used.

        Returns:
            P.
        """
        return self.prefix[0][0].shape[1]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Say which keys a mask is for.

        Args:
            query_length: T.
            layer_idx: not used.

        Returns:
            (P + T, position of the first key).
        """
        return self.get_seq_length() + query_length, 0


def begin_with_prefix(cache: Any, prefix: Sequence[LayerPrefix], dtype: torch.dtype, rows: int) -> None:
    """Put the prefix into an empty cache of transformers.

    Args:
        cache: of transformers.
        prefix: by layer.
        dtype: that the model computes in.
        rows: B.
    """
    for number, layer in enumerate(prefix):
        key, value = (each.to(dtype).expand(rows, *each.shape) for each in layer)
        cache.update(key, value, number)


def positions_before(model: nn.Module) -> int:
    """Count the positions that come before each row's first token.

    Args:
        model: with or without adapters.

    Returns:
        P; 0 without a prefix.
    """
    return sum(getattr(module, "positions_before", 0) for module in model.modules())


def refuse_other_heads(prefix: Tensor, found: Sequence[Tensor], model: str) -> None:
    """Refuse a layer whose keys or values are not of the prefix's heads.

    Args:
        prefix: (Hkv, P, D).
        found: keys and values of the layer, (B, Hkv, T, D).
        model: in words.

    Raises:
        AdapterError: they are others.
    """
    heads, _, size = prefix.shape
    for tensor in found:
        if (tensor.shape[1], tensor.shape[3]) != (heads, size):
            raise AdapterError(
                f"{model} cannot have a prefix: by its config.json its keys and values are {heads} x {size} numbers a "
                f"token, and a layer has {tensor.shape[1]} x {tensor.shape[3]}. Choose another adapter.kind, or "
                "another base."
            )


def _before(prefix: Tensor, tokens: Tensor) -> Tensor:  # (Hkv, P, D), (B, Hkv, T, D) -> (B, Hkv, P + T, D)
    # Cast last, so that the prefix's gradient is summed over rows in its own dtype.
    before = prefix.expand(tokens.shape[0], *prefix.shape).to(tokens.dtype)
    return torch.cat([before, tokens], dim=2)
