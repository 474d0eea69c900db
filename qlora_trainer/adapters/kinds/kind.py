"""Say what a kind of adapter is: what it adds to a model, what of it trains, how it is stored, whether it merges."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from qlora_trainer.adapters.file_config import FileConfig
from qlora_trainer.config.schema import AdapterConfig


class AdapterKind(ABC):
    """Describe a kind of adapter; one object of a subclass in each file of this folder."""

    name: ClassVar[str]  # the value of adapter.kind
    merges: ClassVar[bool] = True  # into plain weights; what does not stays in the forward pass

    @abstractmethod
    def add(self, model: nn.Module, settings: AdapterConfig, seed: int) -> list[str]:
        """Put adapters on a model, and freeze everything else.

        Args:
            model: any, of transformers or not.
            settings: the config's section `adapter`.
            seed: of what is drawn, on the CPU.

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
        """Count the numbers that multiply each token at an adapted layer, for the estimate of a step's time.

        Args:
            settings: the config's section `adapter`.
            path: of the layer.
            inputs: I, features.
            outputs: O, features.

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
