"""Check the file of a kind whose adapter is one tensor: trained values before each row, which no layer holds.

Legend: P virtual tokens, or keys of a prefix.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from qlora_trainer.adapters.file_config import Differences, FileConfig
from qlora_trainer.adapters.folds import Fold
from qlora_trainer.adapters.prefix import FILE_TENSOR
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import AdapterConfig


class OneTensorFileConfig(FileConfig):
    """Hold the keys that such files share."""

    refused: ClassVar[Mapping[str, str]] = {
        "modules_to_save": "modules saved whole are not supported; train it without them",
    }
    noun: ClassVar[str]  # of the adapter, in messages

    task_type: Literal["CAUSAL_LM"] | None = "CAUSAL_LM"
    num_virtual_tokens: int = Field(ge=1)  # P
    num_transformer_submodules: Literal[1] | None = 1
    modules_to_save: None = None

    @abstractmethod
    def values_of_a_token(self) -> int | None:
        """Return how many values the tensor has for each of P, where the config says it.

        Returns:
            The count; None for any.
        """

    def check_tensors(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        """Check that there is one tensor, of the config's shape.

        Args:
            tensors: by PEFT's names: prompt_embeddings (P, values of a token).
            origin: of them, for the message.

        Raises:
            AdapterError: there is another, or none.
        """
        if others := sorted(tensors.keys() - {FILE_TENSOR}):
            raise AdapterError(f"{origin} also holds {others[0]}, which is no part of a {self.noun}.")
        if FILE_TENSOR not in tensors:
            raise AdapterError(f"{origin} holds no {FILE_TENSOR}.")
        shape = tuple(tensors[FILE_TENSOR].shape)
        wanted = (self.num_virtual_tokens, self.values_of_a_token() or shape[-1])
        if shape != wanted:
            raise AdapterError(f"{origin}: {FILE_TENSOR} has shape {shape}; its config says {wanted}.")

    def adapted_paths(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """List no layers, as none is adapted.

        Args:
            tensors: by PEFT's names.

        Returns:
            No paths.
        """
        return []

    def folds(self, tensors: Mapping[str, Tensor]) -> dict[str, Fold]:
        """Say that no weight becomes another.

        Args:
            tensors: by PEFT's names.

        Returns:
            No folds.
        """
        return {}

    def settings_of(self, tensors: Mapping[str, Tensor], wanted: AdapterConfig) -> Differences:
        """Put the number of virtual tokens next to a run's.

        Args:
            tensors: by PEFT's names.
            wanted: the run's section `adapter`.

        Returns:
            Pairs, equal or not.
        """
        return {"adapter.virtual_tokens": (self.num_virtual_tokens, wanted.virtual_tokens)}
