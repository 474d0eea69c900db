"""Hold the keys and values that a model's attention has before those of each row, in every layer.

They are one matrix as PEFT's file has it, or what a small MLP makes of one vector for each of them (the
reparametrization of Li and Liang 2021, arXiv:2101.00190, section 4.3), which trains in their place. Two hooks on the
decoder give them to its attention and count their positions, so the model is called as any other: in training, by
`generate`, or from a program of one's own. Left out: how attention takes them (model/modules/prefix_cache.py).

Legend: P keys of the prefix, L layers, Hkv key heads, D numbers of a head, W width of the MLP, B rows, T tokens.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from qlora_kernels.prefix_layout import prefix_layout
from qlora_trainer.adapters.trainable import AdapterModule
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.model.modules.prefix_cache import LayerPrefix, PrefixCache, begin_with_prefix

FILE_TENSOR = "prompt_embeddings"
"""PEFT's name of the prefix in its file, (P, L x 2 x Hkv x D): of each layer its keys, then its values."""


@dataclass(frozen=True)
class PrefixShape:
    """Say what a model's attention takes as a prefix."""

    layers: int  # L
    heads: int  # Hkv
    head_dim: int  # D

    @property
    def width(self) -> int:
        """Return the numbers of a token's keys in one layer, PEFT's token_dim.

        Returns:
            Hkv x D.
        """
        return self.heads * self.head_dim


class PrefixEncoder(AdapterModule):
    """Hold a prefix, or the MLP that makes it.

    Values are drawn as PEFT's are: the prefix, or the MLP's vectors, from the normal distribution.

    Args:
        shape: of the model.
        positions: P.
        projection: W, of the MLP; None: the prefix itself trains.
        generator: on the CPU.
        options: dtype and device of what trains, as Tensor.to takes them.
    """

    def __init__(
        self,
        shape: PrefixShape,
        positions: int,
        projection: int | None,
        generator: torch.Generator,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.base = nn.Identity()  # no module is wrapped
        self.shape, self.positions_before, self.file_is_made = shape, positions, projection is not None
        outputs = shape.layers * 2 * shape.width
        if projection is None:
            self.prompt_embeddings = nn.Parameter(torch.randn(positions, outputs, generator=generator).to(**options))
            return
        self.embedding = nn.Parameter(torch.randn(positions, shape.width, generator=generator).to(**options))
        self.inner = _linear(shape.width, projection, generator, options)
        self.outer = _linear(projection, outputs, generator, options)

    def prefix(self) -> Tensor:  # (P, L x 2 x Hkv x D)
        """Return the prefix as PEFT's file has it, of the MLP as it is now where it has one.

        Returns:
            Keys and values of all layers.
        """
        if not self.file_is_made:
            return self.prompt_embeddings
        return self.outer(F.tanh(self.inner(self.embedding)))

    def by_layer(self) -> list[LayerPrefix]:
        """Return the prefix as attention takes it.

        Returns:
            Keys and values of each layer, (Hkv, P, D).
        """
        shape = self.shape
        heads = self.prefix().unflatten(1, (2 * shape.layers, shape.heads, shape.head_dim))
        parts = [part.transpose(0, 1) for part in heads.unbind(1)]
        return list(zip(parts[::2], parts[1::2], strict=True))

    def made_for_file(self) -> dict[str, Tensor]:
        """Return the prefix, of which the MLP is no part.

        Returns:
            By PEFT's name.
        """
        return {FILE_TENSOR: self.prefix()}

    def stored_name(self, path: str, name: str) -> str:
        """Return the name in PEFT's file, which says no path, or of a part of the MLP.

        Args:
            path: of the module in the model.
            name: inside the module.

        Returns:
            The name.
        """
        return super().stored_name(path, name) if self.file_is_made else name

    def decays(self, name: str) -> bool:
        """Return True for the MLP's matrices: keys and values do not lie around 0.

        Args:
            name: inside the module.

        Returns:
            True for them.
        """
        return name.endswith(".weight")

    def put_before(self, decoder: nn.Module) -> None:
        """Make a decoder's forward begin with the prefix, and make this module a part of it.

        Args:
            decoder: of transformers, whose forward takes past_key_values.
        """
        decoder.add_module("prefix_encoder", self)
        decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        decoder.register_forward_hook(self._check_all_asked, with_kwargs=True)

    def _begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], Any]:
        """Add the prefix to the arguments of a forward pass."""
        names = list(inspect.signature(type(decoder).forward).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        ids = given.get("input_ids")
        tokens = given["inputs_embeds"] if ids is None else ids  # (B, T, ...)
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + self.positions_before
        if (mask := given.get("attention_mask")) is not None:
            given["attention_mask"] = self._mask_with_prefix(mask)
        cache, bounds = given.get("past_key_values"), given.get("document_bounds")
        config: Any = decoder.config
        keeps = bounds is None and (
            getattr(config, "use_cache", False) if given.get("use_cache") is None else given["use_cache"]
        )
        if cache is None and keeps:
            cache = given["past_key_values"] = DynamicCache(config=config)
        if cache is None:
            layout = None
            if bounds is not None:
                known = given.get("bounds_on_device")
                layout = prefix_layout(self.positions_before, bounds, tokens.device, known)
                given |= {"document_bounds": layout.bounds, "bounds_on_device": layout.bounds_on_device}
                given["prefix_layout"] = layout
            given["past_key_values"] = PrefixCache(self.by_layer(), layout, type(decoder).__name__)
        elif not cache.get_seq_length():
            begin_with_prefix(cache, self.by_layer(), decoder.dtype, tokens.shape[0])  # type: ignore[arg-type]
        return (), given

    def _mask_with_prefix(self, mask: Any) -> Tensor:
        """Let all tokens see the prefix; masks that transformers would take as they are have no place for it."""
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            of = f"of {mask.ndim} dimensions" if isinstance(mask, Tensor) else f"of the type {type(mask).__name__}"
            raise AdapterError(
                f"A model with a prefix takes an attention mask of (rows, tokens), and was given one {of}."
            )
        return torch.cat([mask.new_ones(mask.shape[0], self.positions_before), mask], dim=1)

    def _check_all_asked(self, decoder: nn.Module, _: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Refuse a model some of whose layers have other ways to remember than keys and values."""
        cache = kwargs.get("past_key_values")
        if isinstance(cache, PrefixCache) and len(cache.asked) < self.shape.layers:
            layer = next(iter(set(range(self.shape.layers)) - cache.asked))
            raise AdapterError(
                f"{type(decoder).__name__} cannot have a prefix: layer {layer} asks for no keys and values before its "
                "own. Choose another adapter.kind, or another base."
            )


def _linear(inputs: int, outputs: int, generator: torch.Generator, options: Mapping[str, Any]) -> nn.Linear:
    """Make a linear layer with torch's usual values, drawn from the generator."""
    layer = nn.Linear(inputs, outputs, device="meta")
    bound = inputs**-0.5
    for name, parameter in list(layer.named_parameters()):
        values = (2 * torch.rand(parameter.shape, generator=generator) - 1) * bound
        setattr(layer, name, nn.Parameter(values.to(**options)))
    return layer
