"""Hold prefix tuning's adapter_config.json of PEFT's format, and check its one tensor.

A file of PEFT whose prefix was trained through an MLP (prefix_projection) holds what the MLP gave, as ours do, so it is
read as any other.

Legend: P keys of the prefix, L layers, Hkv key heads, D numbers of a head.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from qlora_trainer.adapters.file_config import Differences, FileConfig
from qlora_trainer.adapters.folds import Fold
from qlora_trainer.adapters.prefix import FILE_TENSOR
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import AdapterConfig


class PrefixFileConfig(FileConfig):
    """Hold the keys of a prefix's file."""

    # How the values began, and the MLP they were trained through, of which the tensor has what came of it.
    ignored: ClassVar[frozenset[str]] = FileConfig.ignored | {"init_weights"}
    refused: ClassVar[Mapping[str, str]] = {
        "modules_to_save": "modules saved whole are not supported; train it without them",
    }

    peft_type: Literal["PREFIX_TUNING"] = "PREFIX_TUNING"
    task_type: Literal["CAUSAL_LM"] | None = "CAUSAL_LM"
    num_virtual_tokens: int = Field(ge=1)  # P
    token_dim: int = Field(ge=1)  # Hkv x D
    num_transformer_submodules: Literal[1] | None = 1
    num_attention_heads: int = Field(ge=1)  # Hkv
    num_layers: int = Field(ge=1)  # L
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    modules_to_save: None = None

    @property
    def kind(self) -> str:
        """Return the value of adapter.kind that such an adapter has."""
        return "prefix"

    def check_tensors(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        """Check that there is one tensor, of the config's shape.

        Args:
            tensors: by PEFT's names: prompt_embeddings (P, L x 2 x Hkv x D).
            origin: of them, for the message.

        Raises:
            AdapterError: there is another, or none.
        """
        if others := sorted(tensors.keys() - {FILE_TENSOR}):
            raise AdapterError(f"{origin} also holds {others[0]}, which is no part of a prefix.")
        if FILE_TENSOR not in tensors:
            raise AdapterError(f"{origin} holds no {FILE_TENSOR}.")
        shape = tuple(tensors[FILE_TENSOR].shape)
        wanted = (self.num_virtual_tokens, self.num_layers * 2 * self.token_dim)
        if shape != wanted:
            raise AdapterError(f"{origin}: {FILE_TENSOR} has shape {shape}; its config says {wanted}.")

    def adapted_paths(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """List no layers: the prefix is the decoder's.

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
        """Put the length of the prefix next to a run's.

        Args:
            tensors: by PEFT's names.
            wanted: the run's section `adapter`.

        Returns:
            Pairs, equal or not.
        """
        return {"adapter.virtual_tokens": (self.num_virtual_tokens, wanted.virtual_tokens)}
