"""Hold prompt tuning's adapter_config.json of PEFT's format.

Legend: H hidden size.
"""

from typing import ClassVar, Literal

from qlora_trainer.adapters.file_config import FileConfig
from qlora_trainer.adapters.kinds.one_tensor_file import OneTensorFileConfig


class PromptFileConfig(OneTensorFileConfig):
    """Hold the keys of a prompt's file."""

    ignored: ClassVar[frozenset[str]] = FileConfig.ignored | {"tokenizer_kwargs"}
    noun: ClassVar[str] = "prompt of virtual tokens"

    peft_type: Literal["PROMPT_TUNING"] = "PROMPT_TUNING"
    token_dim: int | None = None  # H
    num_attention_heads: int | None = None  # of the base, as its layers; prompt tuning needs neither
    num_layers: int | None = None
    # How the values began, of which the tensor has what came of it.
    prompt_tuning_init: Literal["TEXT", "SAMPLE_VOCAB", "RANDOM"] = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None

    @property
    def kind(self) -> str:
        """Return the value of adapter.kind that such an adapter has."""
        return "prompt"

    def values_of_a_token(self) -> int | None:
        """Return the size of an embedding.

        Returns:
            H; None where the config does not say it.
        """
        return self.token_dim
