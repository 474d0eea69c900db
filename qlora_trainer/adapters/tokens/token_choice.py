"""Find which tokens train, and what the rows of new ones begin as.

Left out: adding new tokens to a tokenizer (new_tokens.py), and making the rows (put_tokens.py).

Legend: V rows of the base's matrices.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qlora_trainer.common.errors import AdapterError
from qlora_trainer.common.units import counted
from qlora_trainer.config.schema import AdapterConfig


class TextTokenizer(Protocol):
    """Name what kinds of adapters ask of a tokenizer of transformers."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, Any]:
        """Encode a text.

        Args:
            text: any.
            add_special_tokens: put what begins and ends a text around it.

        Returns:
            {"input_ids": tokens}.
        """
        ...

    def get_vocab(self) -> Mapping[str, int]:
        """Return all tokens, the new ones too.

        Returns:
            Ids by name.
        """
        ...


@dataclass(frozen=True)
class TokenChoice:
    """Say which rows train, and what those of new tokens begin as."""

    ids: tuple[int, ...]  # ascending
    height: int  # rows of the matrices, with new tokens
    existing: int  # tokens before the first new one, of which `mean` is taken
    starts: Mapping[int, tuple[int, ...] | None]  # of each new token: those of its text; None: all that exist


def choose_tokens(settings: AdapterConfig, tokenizer: TextTokenizer | None, vocabulary: int) -> TokenChoice:
    """Find the ids of the settings' tokens.

    Args:
        settings: the config's section `adapter`, which names some.
        tokenizer: of the model, with the settings' new tokens in it.
        vocabulary: V.

    Returns:
        The choice.

    Raises:
        AdapterError: a token does not exist, one is named twice, a text gives no start, or there is no tokenizer.
    """
    if tokenizer is None:
        raise AdapterError(
            "adapter.new_tokens and adapter.trainable_tokens name tokens, and no tokenizer was given that has them."
        )
    vocab = tokenizer.get_vocab()
    new = {token: vocab[token] for token in settings.new_token_texts}
    existing = min(new.values(), default=vocabulary)
    ids = _existing_ids(settings.trainable_tokens, vocab, new, tokenizer)
    if ids and max(ids) >= vocabulary:
        raise AdapterError(
            f"adapter.trainable_tokens names the token {max(ids)}, beyond the {vocabulary} rows of the model's "
            "embedding. The tokenizer is of another model."
        )
    if existing > vocabulary:
        raise AdapterError(
            f"The tokenizer has {counted(existing, 'token')}, and the model's embedding {vocabulary} rows: tokens "
            "without rows are between those and adapter.new_tokens. The tokenizer is of another model."
        )
    starts = {
        vocab[token]: None if text is None else _of_text(token, text, tokenizer, min(existing, vocabulary))
        for token, text in settings.new_token_texts.items()
    }
    every = sorted([*ids, *starts])
    return TokenChoice(tuple(every), max(vocabulary, every[-1] + 1), min(existing, vocabulary), starts)


def _existing_ids(
    names: Sequence[str], vocab: Mapping[str, int], new: Mapping[str, int], tokenizer: TextTokenizer
) -> list[int]:
    """Return the ids of adapter.trainable_tokens, each a name in the vocabulary or the text of one token."""
    found: dict[int, str] = {}
    for name in names:
        token = vocab.get(name)
        if token is None:
            ids = list(tokenizer(name, add_special_tokens=False)["input_ids"])
            if len(ids) != 1:
                raise AdapterError(
                    f"adapter.trainable_tokens names {name!r}, which is no token: the tokenizer makes "
                    f"{counted(len(ids), 'token')} of it. Name it in adapter.new_tokens to add it."
                )
            token = ids[0]
        if token in found:
            raise AdapterError(
                f"adapter.trainable_tokens names the token {token} twice, as {found[token]!r} and {name!r}."
            )
        if token in new.values():
            raise AdapterError(
                f"{name!r} is in adapter.trainable_tokens and adapter.new_tokens; one of them is enough."
            )
        found[token] = name
    return list(found)


def _of_text(token: str, text: str, tokenizer: TextTokenizer, existing: int) -> tuple[int, ...]:
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids or max(ids) >= existing:
        what = f"holds a token without a row in the base ({max(ids)})" if ids else "becomes no tokens"
        raise AdapterError(f"adapter.new_tokens gives {token!r} the text {text!r}, which {what}. Choose another text.")
    return ids
