"""Compare the tokens of some rows with those that the tokenizer's own file gives.

Left out: reading that file (model/tokenizer.py), and the text that every tokenizer is tried on there.
"""

from collections.abc import Callable, Sequence

from qlora_trainer.common.errors import DataError, ModelError
from qlora_trainer.data.rendering.encoding import Encoded
from qlora_trainer.data.rendering.spans import Rendering

OwnIds = Callable[[Sequence[str]], Sequence[Sequence[int]]]  # from texts to the ids of each

_ROWS_COMPARED = 32


def refuse_other_ids(
    texts: Sequence[Rendering | DataError], encoded: Sequence[Encoded | DataError], own_ids: OwnIds
) -> None:
    """Refuse a tokenizer that gives other ids than its own file, for the first of some rows.

    Rows that spell a control token are left out: in them the spelling stays text, which is no work of the file.

    Args:
        texts: of the rows.
        encoded: tokens of each text that is no error.
        own_ids: gives ids by the file.

    Raises:
        ModelError: a row has other ids.
    """
    sound = [text for text in texts if not isinstance(text, DataError)]
    sample = [
        ("".join(span.text for span in text.spans), tokens.ids)
        for text, tokens in zip(sound, encoded, strict=True)
        if not isinstance(tokens, DataError) and not any(span.ordinary for span in text.spans)
    ][:_ROWS_COMPARED]
    for (text, ids), own in zip(sample, own_ids([text for text, _ in sample]), strict=True):
        if ids != own:
            raise ModelError(
                f"The tokenizer gives other tokens than its own file does, for a row that begins {text[:60]!r}. The "
                "model was trained on those of the file: let tokenizer_config.json name no other class or rules."
            )
