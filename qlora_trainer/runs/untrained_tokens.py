"""Find control tokens that the rows use and the base never learned, by a few rows of its embedding and LM head.

A reserved token, or one for which the embedding was enlarged, has a row that is zero or like those of its kind. It does
not change in training, unless adapter.trainable_tokens names it, and such a model seldom ends a turn. Only the rows of
the control tokens and of some ordinary ones are read. Left out: tokens whose rows are random, as older tools made them.
"""

from collections.abc import Collection
from typing import Any

import torch

from qlora_trainer.adapters.tokens.token_modules import trained_token_ids
from qlora_trainer.data.preparation.store import ExampleSet
from qlora_trainer.model.load import Base
from qlora_trainer.weights.listing import checkpoint_name
from qlora_trainer.weights.reading import read_rows
from qlora_trainer.weights.tensors import TensorInfo

_ROWS_COMPARED = 64  # of ordinary tokens, and of control tokens that no row uses
_ZERO = 1e-3  # of the norm that a row has in the middle of ordinary ones
_ALIKE = 1e-2  # of a row's norm: trained rows are much further apart, bf16 rounds to a third of it
_MOST_NAMED = 8


def untrained_token_warnings(base: Base, tokenizer: Any, rows: ExampleSet) -> list[str]:
    """Warn of control tokens that the rows use and the base never learned.

    Args:
        base: with or without adapters.
        tokenizer: of the base.
        rows: any set of the run, as all rows of its store are looked at.

    Returns:
        At most one warning.
    """
    names = {token: added.content for token, added in tokenizer.added_tokens_decoder.items()}
    model = base.model
    used, trained = (tokens - {*trained_token_ids(model)} for tokens in map(set, rows.control_tokens))
    found: dict[int, list[str]] = {}
    for module, wanted, what in (
        (model.get_input_embeddings(), used, "embedding"),
        (model.get_output_embeddings(), trained, "LM head"),
    ):
        matrix = _stored(base, module)
        if matrix is not None:
            for token, reason in _untrained(matrix, wanted, names).items():
                found.setdefault(token, []).append(f"{what} {reason}")
    if not found:
        return []
    listed = [f"{names[token]!r} ({', '.join(reasons)})" for token, reasons in sorted(found.items())]
    more = f" and {len(listed) - _MOST_NAMED} more" if len(listed) > _MOST_NAMED else ""
    return [
        f"The base never learned control tokens that the rows use: {', '.join(listed[:_MOST_NAMED])}{more}. Their rows "
        "in the base do not train, so the model may never write them, such as the end of a turn. Train these rows "
        "(adapter.trainable_tokens), take the instruct variant of the base, or put a chat_template.jinja of tokens "
        "that it knows into a copy of its directory."
    ]


def _stored(base: Base, module: Any) -> TensorInfo | None:
    """Find the matrix of the embedding or LM head in the checkpoint; None where it is the other one's."""
    path = next((path for path, each in base.model.named_modules() if each is module), None)
    tensors = base.directory.tensors
    name = checkpoint_name(f"{path}.weight", tensors) or base.fingerprint.stored_as.get(f"{path}.weight")
    return tensors.get(name) if name else None


def _untrained(matrix: TensorInfo, wanted: Collection[int], control: Collection[int]) -> dict[int, str]:
    """Return those of the wanted tokens whose rows were never trained, and how that shows."""
    height = matrix.shape[0]
    tokens = [token for token in sorted(wanted) if token < height]
    if not tokens:
        return {}
    unused = [token for token in sorted(control) if token < height and token not in wanted][:_ROWS_COMPARED]
    step = max(1, height // _ROWS_COMPARED)
    ordinary = [token for token in range(step // 2, height, step) if token not in control]
    usual = read_rows(matrix, torch.tensor(ordinary)).float().norm(dim=1).median() if ordinary else torch.tensor(0.0)
    others = read_rows(matrix, torch.tensor([*tokens, *unused])).float()
    norms = others.norm(dim=1)
    found = {}
    for index, token in enumerate(tokens):
        if norms[index] <= _ZERO * usual:
            found[token] = "zero"
            continue
        near = (others - others[index]).norm(dim=1) <= _ALIKE * norms[index]
        near[index] = False
        if near.any():
            found[token] = "the same as of other tokens"
    return found
