"""Put trained vectors in the place of virtual tokens, after the model's input embedding.

Virtual tokens have the ids after the vocabulary's, so no text has them, and a row of tokens says by itself where they
are: packed, padded or alone. The embedding itself stays as it is and never sees them. Left out: putting them before
rows (data/preparation/store.py) and prompts (training/generation.py).

Legend: V rows of the embedding, P virtual tokens, H hidden size, B rows, T tokens.
"""

import torch
from torch import Tensor, nn

from qlora_trainer.adapters.tokens.token_rows import put_rows_over
from qlora_trainer.adapters.trainable import AdapterModule


class PromptEmbedding(AdapterModule):
    """Look up tokens of the vocabulary in the base's embedding, and virtual tokens in `prompt_embeddings`.

    Args:
        base: the embedding, frozen: ids (B, T) -> (B, T, H).
        initial: values of the virtual tokens, (P, H), fp32 or bf16, on the device of what `base` returns.
    """

    def __init__(self, base: nn.Module, initial: Tensor) -> None:
        super().__init__()
        self.base = base
        self.prompt_embeddings = nn.Parameter(initial)

    @property
    def weight(self) -> Tensor:  # (V, H)
        """Return the weight of the base's embedding."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def leading_ids(self) -> list[int]:
        """Return the ids of the virtual tokens: V to V + P - 1."""
        first = self.weight.shape[0]
        return list(range(first, first + len(self.prompt_embeddings)))

    def stored_name(self, path: str, name: str) -> str:
        """Return the name in PEFT's file, which says no path.

        Args:
            path: of the module in the model.
            name: inside the module.

        Returns:
            The name.
        """
        return name

    def decays(self, name: str) -> bool:
        """Return False: virtual tokens are vectors like those of words, which do not lie around 0.

        Args:
            name: inside the module.

        Returns:
            False.
        """
        return False

    def forward(self, input_ids: Tensor) -> Tensor:  # (B, T) -> (B, T, H)
        """Look up tokens.

        Args:
            input_ids: (B, T), below V + P.

        Returns:
            Their rows, (B, T, H), in the dtype of the base's.
        """
        index = input_ids - self.weight.shape[0]  # below 0 for tokens of the vocabulary
        with torch.no_grad():
            rows = self.base(input_ids.masked_fill(index >= 0, 0))
        return put_rows_over(rows, self.prompt_embeddings, index)
