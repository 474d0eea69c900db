"""Compare the tokens of some rows with those that the tokenizer's own file gives.

Left out: reading that file (model/tokenizer.py), and the text that every tokenizer is tried on there.
"""

from collections.abc import Callable, Sequence

import tokenizers

from qlora_trainer.common.errors import DataError, ModelError
from qlora_trainer.data.rendering.spans import Rendering

OwnIds = Callable[[Sequence[str]], Sequence[Sequence[int]]]  # from texts to the ids of each

_ROWS_COMPARED = 32


def refuse_other_ids(texts: Sequence[Rendering | DataError], backend: tokenizers.Tokenizer, own_ids: OwnIds) -> None:
    """Refuse a tokenizer that gives other ids than its own file, for the first of some rows.

    Each row is taken as one text: where its tokens are made to begin with those of a prompt is no matter of the file.

    Args:
        texts: of the rows.
        backend: that tokenizes them.
        own_ids: gives ids by the file.

    Raises:
        ModelError: a row has other ids.
    """
    sound = [text for text in texts if not isinstance(text, DataError)][:_ROWS_COMPARED]
    sample = ["".join(span.text for span in text.spans) for text in sound]
    encoded = backend.encode_batch(sample, add_special_tokens=False)
    for text, ours, own in zip(sample, encoded, own_ids(sample), strict=True):
        if ours.ids != own:
            raise ModelError(
                f"The tokenizer gives other tokens than its own file does, for a row that begins {text[:60]!r}. The "
                "model was trained on those of the file: let tokenizer_config.json name no other class or rules."
            )
