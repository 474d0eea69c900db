"""Train keys and values before each row in every layer: prefix tuning (Li and Liang 2021, arXiv:2101.00190).

A prefix costs attention a few more keys and the rest of a model nothing. It does not merge, since no weight of the base
is another; where it is deployed, the cache begins with it, as PEFT does.

Legend: L layers, Hkv key heads, D numbers of a head.
"""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from qlora_trainer.adapters.kinds.kind import AdapterKind, TextTokenizer, adapter_dtype
from qlora_trainer.adapters.kinds.prefix_file import PrefixFileConfig
from qlora_trainer.adapters.prefix import FILE_TENSOR, PrefixEncoder, PrefixShape
from qlora_trainer.adapters.trainable import mark_only_lora_as_trainable
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.common.units import counted
from qlora_trainer.config.schema import AdapterConfig
from qlora_trainer.model.modules.decoder_layers import decoder_layers
from qlora_trainer.model.modules.packed_attention import head_sizes

_PLAIN_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")  # of transformers' cache: keys and values, and no more


class PrefixKind(AdapterKind):
    """Put a PrefixEncoder before a model's decoder."""

    name: ClassVar[str] = "prefix"
    size: ClassVar[str] = "adapter.virtual_tokens"
    merges: ClassVar[bool] = False

    def target_paths(self, model: nn.Module, settings: AdapterConfig) -> list[str]:
        """Return none, for a model that can have a prefix; another is refused by an AdapterError.

        Args:
            model: without adapters.
            settings: the config's section `adapter`.

        Returns:
            No paths.
        """
        _shape_of(model)
        _decoder_of(model)
        return []

    def add(
        self, model: nn.Module, settings: AdapterConfig, seed: int, tokenizer: TextTokenizer | None = None
    ) -> list[str]:
        """Put a prefix before the rows, drawn on the CPU, so that it is the same on every device.

        A model whose attention takes none is refused by an AdapterError: here, or where it first runs.

        Args:
            model: of transformers.
            settings: the config's section `adapter`.
            seed: of what is drawn.
            tokenizer: not used.

        Returns:
            No paths: no layer is adapted.
        """
        shape = _shape_of(model)
        decoder = _decoder_of(model)
        projection = settings.prefix_hidden_size if settings.prefix_projection else None
        generator = torch.Generator().manual_seed(seed)
        options = {"dtype": adapter_dtype(settings), "device": decoder.device}
        PrefixEncoder(shape, settings.virtual_tokens, projection, generator, options).put_before(decoder)
        mark_only_lora_as_trainable(model)
        return []

    def file_config(
        self,
        settings: AdapterConfig,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        paths: Sequence[str],
        named: Mapping[str, Any],
    ) -> PrefixFileConfig:
        """Describe an adapter as its file does: the prefix alone, whatever it was trained through.

        Args:
            settings: the config's section `adapter`.
            model: with its prefix.
            tensors: of the adapter, by PEFT's names.
            paths: of no layers.
            named: the keys of the base, such as base_model_name_or_path.

        Returns:
            The file's config.
        """
        shape = _shape_of(model)
        return PrefixFileConfig(
            num_virtual_tokens=tensors[FILE_TENSOR].shape[0],
            token_dim=shape.width,
            num_attention_heads=shape.heads,
            num_layers=shape.layers,
            **named,
        )

    def layer_numbers(self, settings: AdapterConfig, path: str, inputs: int, outputs: int) -> int:
        """Count none: no layer is adapted.

        Args:
            settings: the config's section `adapter`.
            path: of the layer.
            inputs: I, features.
            outputs: O, features.

        Returns:
            0.
        """
        return 0

    def in_words(self, settings: AdapterConfig) -> str:
        """Describe the length of the prefix, and the MLP that it is trained through.

        Args:
            settings: the config's section `adapter`.

        Returns:
            A phrase.
        """
        through = f", trained through an MLP of {settings.prefix_hidden_size}" if settings.prefix_projection else ""
        return f"{counted(settings.virtual_tokens, 'key and value', 'keys and values')} before each row{through}"


def _shape_of(model: Any) -> PrefixShape:
    """Read a model's config; AdapterError where it has no decoder whose every layer keeps keys and values."""
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not isinstance(model, PreTrainedModel):
        raise AdapterError(f"{name} is no model of transformers, so it has no attention that takes a prefix.")
    text = config.get_text_config()
    sizes, layers = head_sizes(text), DynamicCache(config=text).layers
    others = [found for layer in layers if (found := type(layer).__name__) not in _PLAIN_LAYERS]
    if sizes is None or others or len(layers) != text.num_hidden_layers:
        has = f"layers that keep {others[0]}" if others else "layers without keys and values of their own"
        raise AdapterError(f"{name} cannot have a prefix: it has {has}. Choose another adapter.kind, or another base.")
    return PrefixShape(text.num_hidden_layers, *sizes[1:])


def _decoder_of(model: Any) -> Any:
    """Find the module that runs the decoder layers, which some models call without the module around it (OPT)."""
    layers = decoder_layers(model)
    for module in model.modules():
        runs_them = any(isinstance(child, nn.ModuleList) and [*child] == layers for child in module.children())
        takes_cache = "past_key_values" in signature(type(module).forward).parameters
        if layers and runs_them and takes_cache and isinstance(module, PreTrainedModel):
            return module
    raise AdapterError(
        f"{type(model).__name__} cannot have a prefix: it has no decoder that is given a cache. Choose another "
        "adapter.kind, or another base."
    )


PREFIX_KIND = PrefixKind()
