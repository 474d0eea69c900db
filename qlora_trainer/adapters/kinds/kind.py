"""Say what a kind of adapter is: what it adds to a model, what of it trains, how it is stored, whether it merges."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora_trainer.adapters.file_config import FileConfig
from qlora_trainer.adapters.targets import adapted_paths, target_names
from qlora_trainer.adapters.tokens.token_choice import TextTokenizer
from qlora_trainer.config.schema import AdapterConfig


class AdapterKind(ABC):
    """Describe a kind of adapter; one object of a subclass in each file of this folder."""

    name: ClassVar[str]  # the value of adapter.kind
    size: ClassVar[str]  # the setting to lower for a smaller adapter, such as adapter.rank
    remakes_outputs: ClassVar[bool] = False  # where a layer is not recomputed, backward multiplies by its weight again
    merges: ClassVar[bool] = True  # into plain weights; what does not stays in the forward pass
    deployment: ClassVar[str] = "as a PEFT adapter, next to its base"  # of what does not merge
    mixes: ClassVar[bool] = False  # rows of one batch may take several adapters; their layers are AdaptedLinear

    @property
    def merges_in_words(self) -> str:
        """Say how a trained adapter is deployed, as the first lines of a run do."""
        return "yes" if self.merges else f"no: it is deployed {self.deployment}"

    def target_paths(self, model: nn.Module, settings: AdapterConfig) -> list[str]:
        """Find the modules that the settings choose to adapt, without adapting them: linear layers, by default.

        What the model does not have is refused by an AdapterError.

        Args:
            model: without adapters, also one without memory.
            settings: the config's section `adapter`.

        Returns:
            Their paths, in the model's order.
        """
        return adapted_paths(model, settings)

    def targets_as_settings(self, model: nn.Module, settings: AdapterConfig, paths: Sequence[str]) -> dict[str, Any]:
        """Say which settings would adapt these modules.

        Args:
            model: without adapters.
            settings: the config's section `adapter`, which adapts others.
            paths: of modules; of linear layers, by default.

        Returns:
            Values by the config's keys; none where no setting names modules.
        """
        in_all = {} if settings.layers_to_transform is None else {"adapter.layers_to_transform": None}
        return {"adapter.target_modules": target_names(model, paths), **in_all}

    @abstractmethod
    def add(
        self, model: nn.Module, settings: AdapterConfig, seed: int, tokenizer: TextTokenizer | None = None
    ) -> list[str]:
        """Put adapters on a model, and freeze everything else.

        Args:
            model: any, of transformers or not.
            settings: the config's section `adapter`.
            seed: of what is drawn, on the CPU.
            tokenizer: of the model, for settings that hold text.

        Returns:
            The paths of the adapted modules.
        """

    @abstractmethod
    def file_config(
        self,
        settings: AdapterConfig,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        paths: Sequence[str],
        named: Mapping[str, Any],
    ) -> FileConfig:
        """Describe an adapter as its file does.

        Args:
            settings: the config's section `adapter`.
            model: with its adapters.
            tensors: of the adapter, by PEFT's names.
            paths: of the adapted modules.
            named: the keys of the base, such as base_model_name_or_path.

        Returns:
            The file's config.
        """

    @abstractmethod
    def layer_numbers(self, settings: AdapterConfig, path: str, inputs: int, outputs: int) -> int:
        """Count the numbers that multiply each token at an adapted module, for the estimate of a step's time.

        Args:
            settings: the config's section `adapter`.
            path: of the module.
            inputs: I, features of a linear layer; of any other module the hidden size.
            outputs: O, features, likewise.

        Returns:
            The count.
        """

    @abstractmethod
    def in_words(self, settings: AdapterConfig) -> str:
        """Describe an adapter's size, as the first lines of a run do.

        Args:
            settings: the config's section `adapter`.

        Returns:
            A phrase, such as "rank 16".
        """


def adapter_dtype(settings: AdapterConfig) -> torch.dtype:
    """Return the dtype that an adapter trains in.

    Args:
        settings: the config's section `adapter`.

    Returns:
        bf16 where it is asked for; else fp32, for auto too.
    """
    return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
