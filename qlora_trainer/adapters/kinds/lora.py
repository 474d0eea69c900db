"""Add a product of two thin matrices to a layer's output: LoRA (Hu et al. 2021, arXiv:2106.09685)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora_trainer.adapters.formulas import lora_scaling
from qlora_trainer.adapters.fused_parts import trained_rows
from qlora_trainer.adapters.kinds.kind import AdapterKind, adapter_dtype
from qlora_trainer.adapters.kinds.lora_file import LoraFileConfig, stored_ranks
from qlora_trainer.adapters.layers import LoRALinear
from qlora_trainer.adapters.patterns import check_patterns, layer_alpha, layer_rank
from qlora_trainer.adapters.targets import target_names
from qlora_trainer.adapters.tokens.put_tokens import put_token_rows
from qlora_trainer.adapters.tokens.token_choice import TextTokenizer
from qlora_trainer.adapters.tokens.token_modules import stored_indices
from qlora_trainer.adapters.trainable import mark_only_lora_as_trainable
from qlora_trainer.common.units import counted
from qlora_trainer.config.schema import AdapterConfig


class LoraKind(AdapterKind):
    """Put LoRALinear in the place of linear layers."""

    name: ClassVar[str] = "lora"
    size: ClassVar[str] = "adapter.rank"
    mixes: ClassVar[bool] = True
    layer: ClassVar[type[LoRALinear]] = LoRALinear

    def add(
        self, model: nn.Module, settings: AdapterConfig, seed: int, tokenizer: TextTokenizer | None = None
    ) -> list[str]:
        """Wrap the targets, with lora_A drawn in fp32 on the CPU, so that it is the same on every device.

        Targets that match nothing, and parts that cannot be adapted alone, are refused by an AdapterError.

        Args:
            model: any, of transformers or not.
            settings: the config's section `adapter`.
            seed: of lora_A.
            tokenizer: of the model, with new tokens in it; needed where the settings name tokens.

        Returns:
            The paths of the adapted layers.
        """
        paths = self.target_paths(model, settings)
        check_patterns(settings, paths)
        parts = trained_rows(model, paths, settings.fused_parts)
        generator = torch.Generator().manual_seed(seed)
        dtype = adapter_dtype(settings)
        for path in paths:
            layer = self.layer.from_base(
                model.get_submodule(path),
                rank=layer_rank(settings, path),
                alpha=layer_alpha(settings, path),
                dropout=settings.dropout,
                use_rslora=settings.use_rslora,
                generator=generator,
                parts=parts.get(path, ()),
                is_gaussian=settings.init == "gaussian",
            )
            for part in (layer.lora_A, layer.lora_B):
                part.weight = nn.Parameter(part.weight.detach().to(dtype))
            model.set_submodule(path, layer)
        put_token_rows(model, settings, tokenizer)
        mark_only_lora_as_trainable(model, settings.bias)
        return paths

    def file_config(
        self,
        settings: AdapterConfig,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        paths: Sequence[str],
        named: Mapping[str, Any],
    ) -> LoraFileConfig:
        """Describe an adapter as its file does.

        The scaling is written as alpha / rank, for rsLoRA too: some programs do not read use_rslora.

        Args:
            settings: the config's section `adapter`.
            model: with its adapters.
            tensors: of the adapter, by PEFT's names.
            paths: of the adapted layers.
            named: the keys of the base, such as base_model_name_or_path.

        Returns:
            The file's config.
        """
        ranks = stored_ranks(tensors)
        rank = settings.rank if len(set(ranks.values())) > 1 else max(ranks.values())
        alphas = {
            path: lora_scaling(layer_rank(settings, path), layer_alpha(settings, path), settings.use_rslora) * found
            for path, found in ranks.items()
        }
        alpha = lora_scaling(settings.rank, settings.alpha, settings.use_rslora) * rank
        return LoraFileConfig(
            r=rank,
            lora_alpha=alpha,
            rank_pattern={path: found for path, found in ranks.items() if found != rank},
            alpha_pattern={path: found for path, found in alphas.items() if not math.isclose(found, alpha)},
            lora_dropout=settings.dropout,
            target_modules=target_names(model, paths),
            trainable_token_indices=stored_indices(model),
            bias=settings.bias,
            fan_in_fan_out=getattr(model.get_submodule(paths[0]).base, "fan_in_fan_out", False),
            **named,
        )

    def layer_numbers(self, settings: AdapterConfig, path: str, inputs: int, outputs: int) -> int:
        """Count R (I + O).

        Args:
            settings: the config's section `adapter`.
            path: of the layer.
            inputs: I, features.
            outputs: O, features.

        Returns:
            The count.
        """
        return layer_rank(settings, path) * (inputs + outputs)

    def in_words(self, settings: AdapterConfig) -> str:
        """Describe the rank.

        Args:
            settings: the config's section `adapter`.

        Returns:
            A phrase.
        """
        others = sorted(set(settings.rank_pattern.values()) - {settings.rank})
        ranks = f"rank {settings.rank}" + (f" (some {', '.join(map(str, others))})" if others else "")
        tokens = len(settings.trainable_tokens) + len(settings.new_tokens)
        return f"{ranks}, and the rows of {counted(tokens, 'token')}" if tokens else ranks


LORA_KIND = LoraKind()
