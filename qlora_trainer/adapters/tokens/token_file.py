"""Check the rows of tokens in an adapter's file of PEFT's format, and put them in the order of the vocabulary.

PEFT writes them as `<path>.token_adapter.trainable_tokens_delta`, one for the embedding and one for an LM head that has
a weight of its own; `trainable_token_indices` says which tokens they are, in the order of the rows. Where the
vocabulary grew, PEFT also writes both matrices whole, unless it is asked not to.

Legend: R rows that train, H hidden size.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from qlora_trainer.adapters.file_config import PEFT_PREFIX
from qlora_trainer.adapters.tokens.token_modules import STORED_TOKENS
from qlora_trainer.common.dotted_names import ends_in
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.common.units import counted

_StoredIds = list[Annotated[int, Field(ge=0)]]
TokenIndices = _StoredIds | dict[str, _StoredIds]
"""Ids in the order of the rows: of the embedding, or by the ends of paths."""

_ROWS = re.compile(rf"{re.escape(PEFT_PREFIX)}(?P<path>.+)\.{re.escape(STORED_TOKENS)}")
_WHOLE = ".token_adapter.base_layer.weight"


def token_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Find the rows of tokens among an adapter's tensors.

    Args:
        tensors: by PEFT's names.

    Returns:
        (R, H) by the path of the embedding or head.
    """
    return {match["path"]: tensor for name, tensor in tensors.items() if (match := _ROWS.fullmatch(name))}


def is_token_tensor(name: str) -> bool:
    """Return True for the name of rows of tokens.

    Args:
        name: PEFT's.

    Returns:
        True if it is one.
    """
    return _ROWS.fullmatch(name) is not None


def indices_problem(indices: Any) -> str | None:
    """Find what is wrong with trainable_token_indices by itself.

    Args:
        indices: of a file that may hold anything.

    Returns:
        A line, or None.
    """
    lists = list(indices.values()) if isinstance(indices, Mapping) else [indices] if isinstance(indices, list) else []
    if any(not isinstance(each, list) for each in lists):
        return None  # its type is checked elsewhere
    if any(len(set(each)) < len(each) for each in lists if all(isinstance(token, int) for token in each)):
        return "trainable_token_indices names a token twice"
    if any(sorted(each) != sorted(lists[0]) for each in lists[1:]):
        return (
            "trainable_token_indices names other tokens of one matrix than of the other; only the same tokens of "
            "embedding and head can be trained here"
        )
    return None


def sorted_ids(indices: TokenIndices | None) -> tuple[int, ...]:
    """Return the tokens of a file.

    Args:
        indices: without a problem.

    Returns:
        Their ids, ascending; none where there are none.
    """
    if indices is None:
        return ()
    return tuple(sorted(next(iter(indices.values()), []) if isinstance(indices, dict) else indices))


def check_token_tensors(tensors: Mapping[str, Tensor], indices: TokenIndices | None, origin: str) -> None:
    """Check that the rows of tokens are those that the config names.

    Args:
        tensors: all of the adapter, by PEFT's names: of rows of tokens (R, H).
        indices: of the config.
        origin: of the tensors, for the message.

    Raises:
        AdapterError: they are not.
    """
    if whole := next((name for name in tensors if name.endswith(_WHOLE)), None):
        raise AdapterError(
            f"{origin} also holds {whole}, a whole matrix, which PEFT writes where the vocabulary grew. Save the "
            "adapter with save_pretrained(..., save_embedding_layers=False): its rows of tokens are all that is needed."
        )
    found = token_tensors(tensors)
    if bool(found) != bool(indices):
        what = "rows of tokens" if found else "no rows of tokens"
        raise AdapterError(f"{origin} holds {what}, and trainable_token_indices is {indices}; the file is incomplete.")
    for path, rows in found.items():
        ids = _order_of(indices, path)
        if ids is None:
            raise AdapterError(f"{origin} holds rows of tokens of {path}, which trainable_token_indices does not name.")
        if rows.dim() != 2 or len(rows) != len(ids):
            raise AdapterError(
                f"{origin}: the rows of tokens of {path} have shape {tuple(rows.shape)}, and trainable_token_indices "
                f"names {counted(len(ids), 'token')}."
            )


def in_order_of_ids(tensors: Mapping[str, Tensor], indices: TokenIndices | None) -> dict[str, Tensor]:
    """Put rows of tokens in the order of their ids.

    Args:
        tensors: all of the adapter, by PEFT's names, checked.
        indices: of the config, in the order of the rows.

    Returns:
        The tensors.
    """
    found = dict(tensors)
    for path, rows in token_tensors(tensors).items():
        ids = _order_of(indices, path) or []
        order = sorted(range(len(ids)), key=lambda row: ids[row])
        found[f"{PEFT_PREFIX}{path}.{STORED_TOKENS}"] = rows[order]
    return found


def _order_of(indices: TokenIndices | None, path: str) -> list[int] | None:
    """Return the tokens of a matrix in the order of its rows; a list is the embedding's."""
    if isinstance(indices, dict):
        return next((ids for end, ids in indices.items() if ends_in(path, end)), None)
    return indices
