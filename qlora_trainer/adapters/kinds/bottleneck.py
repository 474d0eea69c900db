"""Put a small MLP behind each attention and MLP: bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751).

Behind the MLPs alone they are those of Pfeiffer et al. 2021 (arXiv:2005.00247). What is not linear cannot become a
weight, so they stay in the forward pass and never merge.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora_trainer.adapters.bottleneck import BottleneckLayer
from qlora_trainer.adapters.kinds.bottleneck_file import BottleneckFileConfig
from qlora_trainer.adapters.kinds.kind import AdapterKind, adapter_dtype
from qlora_trainer.adapters.sublayers import find_sublayers
from qlora_trainer.adapters.tokens.token_choice import TextTokenizer
from qlora_trainer.adapters.trainable import mark_only_lora_as_trainable
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import AdapterConfig


class BottleneckKind(AdapterKind):
    """Put a BottleneckLayer in the place of attention and MLPs."""

    name: ClassVar[str] = "bottleneck"
    size: ClassVar[str] = "adapter.bottleneck_size"
    merges: ClassVar[bool] = False
    deployment: ClassVar[str] = "with its base, by this program alone"

    def target_paths(self, model: nn.Module, settings: AdapterConfig) -> list[str]:
        """Find the parts of decoder layers that adapters are put behind.

        Args:
            model: of transformers, without adapters.
            settings: the config's section `adapter`.

        Returns:
            Their paths.

        Raises:
            AdapterError: the model has none, or its layers add them to the hidden states in another way.
        """
        wanted = settings.placement.split("+")
        found = [path for path, part in find_sublayers(model).items() if part in wanted]
        if not found:
            raise AdapterError(
                f"adapter.placement={settings.placement} finds no part of a decoder layer of {type(model).__name__}. "
                "Set adapter.placement=attention+mlp."
            )
        return found

    def targets_as_settings(self, model: nn.Module, settings: AdapterConfig, paths: Sequence[str]) -> dict[str, Any]:
        """Return none: the placement, which a file holds, says what is adapted.

        Args:
            model: without adapters.
            settings: the config's section `adapter`.
            paths: of parts.

        Returns:
            No values.
        """
        return {}

    def add(
        self, model: nn.Module, settings: AdapterConfig, seed: int, tokenizer: TextTokenizer | None = None
    ) -> list[str]:
        """Wrap the parts, with D drawn on the CPU, so that it is the same on every device.

        A model without such parts is refused by an AdapterError.

        Args:
            model: of transformers.
            settings: the config's section `adapter`.
            seed: of D.
            tokenizer: not used.

        Returns:
            The paths of the parts.
        """
        paths = self.target_paths(model, settings)
        generator = torch.Generator().manual_seed(seed)
        dtype = adapter_dtype(settings)
        hidden: int = model.config.get_text_config().hidden_size  # type: ignore[operator,union-attr]
        for path in paths:
            base = model.get_submodule(path)
            layer = BottleneckLayer(base, hidden, settings.bottleneck_size, settings.activation, generator, dtype)
            layer.train(base.training)
            model.set_submodule(path, layer)
        mark_only_lora_as_trainable(model)
        return paths

    def file_config(
        self,
        settings: AdapterConfig,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        paths: Sequence[str],
        named: Mapping[str, Any],
    ) -> BottleneckFileConfig:
        """Describe an adapter as its file does.

        Args:
            settings: the config's section `adapter`.
            model: with its adapters.
            tensors: of the adapter, by the names in its file.
            paths: of the parts.
            named: the keys of the base, such as base_model_name_or_path.

        Returns:
            The file's config.
        """
        return BottleneckFileConfig(
            bottleneck_size=settings.bottleneck_size,
            hidden_size=model.config.get_text_config().hidden_size,  # type: ignore[operator,union-attr]
            activation=settings.activation,
            placement=settings.placement,
            **named,
        )

    def layer_numbers(self, settings: AdapterConfig, path: str, inputs: int, outputs: int) -> int:
        """Count R (H + H).

        Args:
            settings: the config's section `adapter`.
            path: of the part.
            inputs: of the part.
            outputs: H.

        Returns:
            The count.
        """
        return 2 * settings.bottleneck_size * outputs

    def in_words(self, settings: AdapterConfig) -> str:
        """Describe the size, and what is adapted.

        Args:
            settings: the config's section `adapter`.

        Returns:
            A phrase.
        """
        return f"bottlenecks of {settings.bottleneck_size} ({settings.activation}, {settings.placement})"


BOTTLENECK_KIND = BottleneckKind()
