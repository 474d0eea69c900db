"""Suggest which value of a mark the rows to keep have, only where its name and value leave no doubt.

A wrong suggestion trains exactly the rows that were to be left out: `exclude_from_training: true` says the contrary of
`train: true`, `train_on_inputs` is a setting of a run, and a `toxicity_score` is best where it is lowest. So a name
counts only if each of its words is known. Left out: which names are marks (meanings.py).
"""

import math
from typing import Any

from qlora_trainer.data.formats.meanings import MARK_WORDS, VERDICT_WORDS, is_mark, words_of

# Marks of which no one value is known to say that a row is good.
_WITHOUT_A_GOOD_VALUE = frozenset(
    ("mask", "masks", "masked", "chosen", "rejected", "reject", "rank", "ranks", "margin", "logprobs", "dispreferred")
)
# Of these a larger number is better, so that 0 and 1 may be the worst of a scale; and of a loss, a smaller one.
_SCALES = frozenset(("score", "scores", "rating", "ratings", "reward", "rewards", "advantage", "advantages"))
_LOSSES = frozenset(("loss",))
_NEGATIONS = frozenset(
    words_of(
        "exclude excluded excluding exclusion no not non dont never skip skipped skipping ignore ignored ignoring omit "
        "omitted drop dropped discard discarded remove removed untrained untrain undesirable unlearn avoid "
        "incorrect wrong unapproved unverified invalid failed"
    )
)
# What else may be in a name without changing what its values mean.
_HARMLESS = frozenset(
    words_of(
        "is are be to for from in of the this it should use used can may row rows sample samples example examples item "
        "items record records turn data dataset quality overall average mean total final human user kto tag flag value "
        "response answer completion output good"
    )
)
_KNOWN = (MARK_WORDS - _WITHOUT_A_GOOD_VALUE) | VERDICT_WORDS | _NEGATIONS | _HARMLESS
_PAIRS = (("true", "false"), ("1", "0"), ("1.0", "0.0"), ("yes", "no"), ("good", "bad"), ("chosen", "rejected"))


def value_to_keep(name: str, value: Any) -> bool | int | str | None:
    """Suggest the value of a column that the rows to train have.

    Args:
        name: of the column, or of the last key of a path.
        value: of a row, good or bad.

    Returns:
        The value; None if the column is no mark, or no single value is known to be the good one.
    """
    words = frozenset(words_of(name))
    negations = [word for word in words_of(name) if word in _NEGATIONS]
    if not is_mark(name) or not words <= _KNOWN:
        return None
    if len(negations) > 1:
        return None
    if isinstance(value, bool):
        return not negations
    if isinstance(value, str):
        side = 1 if negations else 0
        return next((pair[side] for pair in _PAIRS if value.strip().lower() in pair), None)
    if not isinstance(value, int | float) or not math.isfinite(value) or value != int(value) or value < 0:
        return None
    marks = words & MARK_WORDS
    if value in (0, 1):  # correct: 1 may be the number of an option, and is_correct: 1 is a yes
        is_yes_or_no = bool(marks - _LOSSES) or "is" in words
        return int(not negations) if is_yes_or_no and not marks & _SCALES else None
    return int(value) if marks & _SCALES and not negations else None
