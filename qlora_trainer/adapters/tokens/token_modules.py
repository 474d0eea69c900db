"""Train the rows of some tokens in the input embedding and in the LM head; all other rows stay frozen.

The values that train are the rows themselves, as in PEFT, not differences from the base's. They are fp32, whatever the
base is held in: dense, in 4 or 8 bits, or on the host. Tokens beyond the base's rows make the matrices longer.

Where the head shares the embedding's weight, it shares the rows that train, too. Left out: which tokens train, and how
they begin (token_choice.py), and the loss (qlora_kernels/linear_cross_entropy.py).

Legend: V rows of the base's matrices, R rows that train, H hidden size, B rows, T tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_kernels.head_rows import DenseRows, TrainedRows
from qlora_trainer.adapters.file_config import PEFT_PREFIX
from qlora_trainer.adapters.tokens.token_rows import put_rows_over
from qlora_trainer.adapters.trainable import AdapterModule
from qlora_trainer.model.modules.cpu_embedding import CpuEmbedding
from qlora_trainer.model.modules.lm_head import head_weight

STORED_TOKENS = "token_adapter.trainable_tokens_delta"
"""PEFT's name of the rows, which are no differences in spite of it."""


class _TokenModule(AdapterModule):
    """Hold what the two have in common: which rows they are, and how these are stored.

    Args:
        base: the embedding or head, frozen.
        ids: which tokens train, ascending.
        device: of the rows.
    """

    def __init__(self, base: nn.Module, ids: Sequence[int], device: torch.device) -> None:
        super().__init__()
        self.base = base
        self.token_ids = tuple(ids)  # ascending
        self.register_buffer("ids", torch.tensor(self.token_ids, device=device), persistent=False)

    def stored_name(self, path: str, name: str) -> str:
        """Return the name in PEFT's file.

        Args:
            path: of the module in the model.
            name: inside the module.

        Returns:
            The name.
        """
        return f"{PEFT_PREFIX}{path}.{STORED_TOKENS}"

    def decays(self, name: str) -> bool:
        """Return False: the rows are the tokens themselves, and what a token means is not near 0.

        Args:
            name: inside the module.

        Returns:
            False.
        """
        return False

    def is_merged_as_it_is(self, name: str) -> bool:
        """Return True: a merge writes the rows into the matrix.

        Args:
            name: inside the module.

        Returns:
            True.
        """
        return True


class TokenEmbedding(_TokenModule):
    """Look up tokens in the base's embedding, and those that train in `values`.

    Args:
        base: the embedding, frozen: ids (B, T) -> (B, T, H).
        ids: which tokens train, ascending.
        initial: their rows, (R, H), fp32, on the device of what `base` returns.
    """

    ids: Tensor  # (R,)

    def __init__(self, base: nn.Module, ids: Sequence[int], initial: Tensor) -> None:
        super().__init__(base, ids, initial.device)
        self.values = nn.Parameter(initial)

    @property
    def weight(self) -> Tensor:  # (V, H)
        """Return the weight of the base's embedding."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, input_ids: Tensor) -> Tensor:  # (B, T) -> (B, T, H)
        """Look up tokens.

        Args:
            input_ids: (B, T).

        Returns:
            Their rows, (B, T, H), in the dtype of the base's.
        """
        place = torch.searchsorted(self.ids, input_ids).clamp(max=len(self.token_ids) - 1)
        index = torch.where(self.ids[place] == input_ids, place, -1)
        height = self.weight.shape[0]
        known = input_ids
        if self.token_ids[-1] >= height:
            known = input_ids.masked_fill(input_ids >= height, 0)
        with torch.no_grad():
            rows = self.base(known)
        return put_rows_over(rows, self.values, index, embedding_scale(self.base))


class TokenHead(_TokenModule):
    """Compute logits with the base's head, and those of tokens that train with their own rows; it is its own HeadRows.

    Args:
        base: the LM head, frozen, without bias: a linear layer or a HeadRows.
        ids: which tokens train, ascending.
        height: rows of the whole matrix.
        rows: (R, H), fp32, on the head's device, or the embedding whose rows these are.
    """

    ids: Tensor  # (R,)
    bias = None

    def __init__(self, base: nn.Module, ids: Sequence[int], height: int, rows: Tensor | TokenEmbedding) -> None:
        given = rows if isinstance(rows, Tensor) else rows.values
        super().__init__(base, ids, given.device)
        self.height = height
        self._shared: tuple[TokenEmbedding, ...] = ()  # nn.Module does not look for modules in a tuple
        if isinstance(rows, Tensor):
            self.values = nn.Parameter(rows)
        else:
            self._shared = (rows,)

    @property
    def trained_rows(self) -> TrainedRows:
        """Return the matrix as the loss takes it.

        Returns:
            The frozen rows, and those that train.
        """
        frozen = head_weight(self.base)
        rows = DenseRows(frozen) if isinstance(frozen, Tensor) else frozen
        values = self._shared[0].values if self._shared else self.values
        return TrainedRows(rows, values, self.ids, self.height)

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the matrix, with the rows of new tokens."""
        return self.trained_rows.shape

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:  # (stop - start, H)
        """Return rows of the matrix, copied.

        Args:
            start: the first row.
            stop: the row after the last.
            dtype: of the result.

        Returns:
            The rows.
        """
        return self.trained_rows.rows(start, stop, dtype)

    def forward(self, hidden: Tensor) -> Tensor:  # (..., H) -> (..., height)
        """Compute logits.

        Args:
            hidden: (..., H).

        Returns:
            Logits, (..., height), in the dtype of `hidden`.
        """
        logits = self.base(hidden)
        if (new := self.height - logits.shape[-1]) > 0:  # else F.pad would copy the logits
            logits = F.pad(logits, (0, new))
        own = hidden @ self.trained_rows.values.to(hidden.dtype).T
        return logits.index_copy(-1, self.ids, own)


def embedding_scale(base: nn.Module) -> Tensor | float | None:
    """Return what an embedding multiplies its rows by, as Gemma 3's does.

    Args:
        base: an embedding, also one on the host.

    Returns:
        The number; None for a plain embedding.
    """
    inner = base.embedding if isinstance(base, CpuEmbedding) else base
    scale = getattr(inner, "embed_scale", None)
    if isinstance(scale, Tensor) and isinstance(base, CpuEmbedding):
        return scale.to(base.device)
    return scale


def token_modules(model: nn.Module) -> list[TokenEmbedding | TokenHead]:
    """Find the modules of a model in which rows of tokens train.

    Args:
        model: with or without adapters.

    Returns:
        The modules, in the model's order.
    """
    return [module for module in model.modules() if isinstance(module, TokenEmbedding | TokenHead)]


def trained_token_ids(model: nn.Module) -> tuple[int, ...]:
    """Return the tokens whose rows train.

    Args:
        model: with or without adapters.

    Returns:
        Their ids, ascending.
    """
    return next((module.token_ids for module in token_modules(model)), ())


def stored_indices(model: nn.Module) -> list[int] | dict[str, list[int]] | None:
    """Return what PEFT's file says of the rows that train.

    Args:
        model: with adapters.

    Returns:
        The ids, for an embedding whose weight the head shares; by path, where both have rows of their own; or None.
    """
    found = {
        path: list(module.token_ids)
        for path, module in model.named_modules()
        if isinstance(module, TokenEmbedding | TokenHead) and any(True for _ in module.own_parameters())
    }
    return found if len(found) > 1 else next(iter(found.values()), None)
