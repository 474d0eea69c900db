"""Hold prompt tuning's adapter_config.json of PEFT's format, and check its one tensor.

Legend: P virtual tokens, H hidden size.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from qlora_trainer.adapters.file_config import Differences, FileConfig
from qlora_trainer.adapters.folds import Fold
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import AdapterConfig

_TENSOR = "prompt_embeddings"


class PromptFileConfig(FileConfig):
    """Hold the keys of a prompt's file."""

    ignored: ClassVar[frozenset[str]] = FileConfig.ignored | {"tokenizer_kwargs"}
    refused: ClassVar[Mapping[str, str]] = {
        "modules_to_save": "modules saved whole are not supported; train it without them",
    }

    peft_type: Literal["PROMPT_TUNING"] = "PROMPT_TUNING"
    task_type: Literal["CAUSAL_LM"] | None = "CAUSAL_LM"
    num_virtual_tokens: int = Field(ge=1)  # P
    token_dim: int | None = None  # H
    num_transformer_submodules: Literal[1] | None = 1
    num_attention_heads: int | None = None  # of the base, as its layers; prompt tuning needs neither
    num_layers: int | None = None
    # How the values began, of which the tensor has what came of it.
    prompt_tuning_init: Literal["TEXT", "SAMPLE_VOCAB", "RANDOM"] = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    modules_to_save: None = None

    @property
    def kind(self) -> str:
        """Return the value of adapter.kind that such an adapter has."""
        return "prompt"

    def check_tensors(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        """Check that there is one tensor, of the config's shape.

        Args:
            tensors: by PEFT's names: prompt_embeddings (P, H).
            origin: of them, for the message.

        Raises:
            AdapterError: there is another, or none.
        """
        if others := sorted(tensors.keys() - {_TENSOR}):
            raise AdapterError(f"{origin} also holds {others[0]}, which is no part of a prompt of virtual tokens.")
        if _TENSOR not in tensors:
            raise AdapterError(f"{origin} holds no {_TENSOR}.")
        shape = tuple(tensors[_TENSOR].shape)
        wanted = (self.num_virtual_tokens, self.token_dim or shape[-1])
        if shape != wanted:
            raise AdapterError(f"{origin}: {_TENSOR} has shape {shape}; its config says {wanted}.")

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
