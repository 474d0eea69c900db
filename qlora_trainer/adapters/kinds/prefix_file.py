"""Hold prefix tuning's adapter_config.json of PEFT's format.

A file of PEFT whose prefix was trained through an MLP (prefix_projection) holds what the MLP gave, as ours do, so it is
read as any other.

Legend: L layers, Hkv key heads, D numbers of a head.
"""

from typing import ClassVar, Literal

from pydantic import Field

from qlora_trainer.adapters.file_config import FileConfig
from qlora_trainer.adapters.kinds.one_tensor_file import OneTensorFileConfig


class PrefixFileConfig(OneTensorFileConfig):
    """Hold the keys of a prefix's file."""

    # How the values began, and the MLP they were trained through, of which the tensor has what came of it.
    ignored: ClassVar[frozenset[str]] = FileConfig.ignored | {"init_weights"}
    noun: ClassVar[str] = "prefix"

    peft_type: Literal["PREFIX_TUNING"] = "PREFIX_TUNING"
    token_dim: int = Field(ge=1)  # Hkv x D
    num_attention_heads: int = Field(ge=1)  # Hkv
    num_layers: int = Field(ge=1)  # L
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    @property
    def kind(self) -> str:
        """Return the value of adapter.kind that such an adapter has."""
        return "prefix"

    def values_of_a_token(self) -> int:
        """Count a key and a value in each layer.

        Returns:
            L x 2 x Hkv x D.
        """
        return self.num_layers * 2 * self.token_dim
