"""Train virtual tokens before each row: prompt tuning (Lester et al. 2021, arXiv:2104.08691).

The smallest adapter: P vectors of the hidden size, in one place. It does not merge, since no weight of the base is
another; the tokens have to be put before each prompt where it is deployed, as PEFT does.

Legend: V rows of the embedding, P virtual tokens, H hidden size.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora_trainer.adapters.kinds.kind import AdapterKind, adapter_dtype
from qlora_trainer.adapters.kinds.prompt_embedding import PromptEmbedding
from qlora_trainer.adapters.kinds.prompt_file import PromptFileConfig
from qlora_trainer.adapters.prefix import FILE_TENSOR
from qlora_trainer.adapters.tokens.token_choice import TextTokenizer
from qlora_trainer.adapters.trainable import mark_only_lora_as_trainable
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.common.units import counted
from qlora_trainer.config.schema import AdapterConfig


class PromptKind(AdapterKind):
    """Put PromptEmbedding in the place of the input embedding."""

    name: ClassVar[str] = "prompt"
    size: ClassVar[str] = "adapter.virtual_tokens"
    merges: ClassVar[bool] = False

    def target_paths(self, model: nn.Module, settings: AdapterConfig) -> list[str]:
        """Return none: no module in particular is adapted.

        Args:
            model: without adapters.
            settings: the config's section `adapter`.

        Returns:
            No paths.
        """
        return []

    def add(
        self, model: nn.Module, settings: AdapterConfig, seed: int, tokenizer: TextTokenizer | None = None
    ) -> list[str]:
        """Wrap the input embedding, with virtual tokens that begin as tokens of a text, or as drawn ones.

        A model without an input embedding, or with several, and a text without a tokenizer or beyond the embedding are
        refused by an AdapterError.

        Args:
            model: of transformers.
            settings: the config's section `adapter`.
            seed: of the tokens drawn, each of V as likely.
            tokenizer: of the model; needed for adapter.prompt_init_text.

        Returns:
            No paths: no layer is adapted.
        """
        embedding = _input_embedding(model)
        paths = [path for path, module in model.named_modules() if module is embedding]
        weight = embedding.weight
        assert isinstance(weight, Tensor)
        _refuse_other_tables(model, embedding, weight.shape[0])
        ids = _initial_ids(settings, seed, tokenizer, weight.shape[0])
        with torch.no_grad():
            rows = embedding(ids.to(weight.device))
        dtype = adapter_dtype(settings)
        model.set_submodule(paths[0], PromptEmbedding(embedding, rows.detach().to(dtype, copy=True)))
        mark_only_lora_as_trainable(model)
        return []

    def file_config(
        self,
        settings: AdapterConfig,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        paths: Sequence[str],
        named: Mapping[str, Any],
    ) -> PromptFileConfig:
        """Describe an adapter as its file does.

        Args:
            settings: the config's section `adapter`.
            model: with its virtual tokens.
            tensors: of the adapter, by PEFT's names.
            paths: of no layers.
            named: the keys of the base, such as base_model_name_or_path.

        Returns:
            The file's config.
        """
        prompt = tensors[FILE_TENSOR]
        config: Any = model.config
        text = config.get_text_config()
        is_text = settings.prompt_init_text is not None
        return PromptFileConfig(
            num_virtual_tokens=prompt.shape[0],
            token_dim=prompt.shape[1],
            num_attention_heads=getattr(text, "num_attention_heads", None),
            num_layers=getattr(text, "num_hidden_layers", None),
            prompt_tuning_init="TEXT" if is_text else "SAMPLE_VOCAB",
            prompt_tuning_init_text=settings.prompt_init_text,
            tokenizer_name_or_path=named["base_model_name_or_path"] if is_text else None,
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
        """Describe the number of virtual tokens.

        Args:
            settings: the config's section `adapter`.

        Returns:
            A phrase.
        """
        return f"{counted(settings.virtual_tokens, 'virtual token')} before each row"


def _input_embedding(model: nn.Module) -> nn.Module:
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Module):
        raise AdapterError(
            f"{type(model).__name__} has no input embedding that transformers finds, so no virtual tokens can be put "
            "after it. Choose another model, or another adapter.kind."
        )
    return embedding


def _refuse_other_tables(model: nn.Module, embedding: nn.Module, vocabulary: int) -> None:
    """Refuse a model that looks tokens up elsewhere too, as Gemma 4 does for each layer: virtual ones are not there."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module is not embedding and module.num_embeddings == vocabulary:
            raise AdapterError(
                f"{type(model).__name__} looks tokens up in {path} too, which has no rows for virtual tokens. Choose "
                "another adapter.kind, or another model."
            )


def _initial_ids(settings: AdapterConfig, seed: int, tokenizer: TextTokenizer | None, vocabulary: int) -> Tensor:
    """Choose the tokens that the virtual ones begin as, (P,) int64, as PEFT does."""
    count = settings.virtual_tokens
    if settings.prompt_init_text is None:
        return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(seed))
    if tokenizer is None:
        raise AdapterError("adapter.prompt_init_text is a text, and no tokenizer was given that turns it into tokens.")
    ids = list(tokenizer(settings.prompt_init_text)["input_ids"])
    if not ids or max(ids) >= vocabulary:
        raise AdapterError(
            f"adapter.prompt_init_text becomes {counted(len(ids), 'token')}"
            + (f", one of them {max(ids)}, beyond the {vocabulary} rows of the model's embedding" if ids else "")
            + ". Choose another text."
        )
    return torch.tensor((ids * -(-count // len(ids)))[:count])


PROMPT_KIND = PromptKind()
