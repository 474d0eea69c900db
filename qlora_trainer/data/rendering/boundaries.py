"""Give a row the tokens of its prompt: those that the prompt has when it is given alone, as to a server.

Tokens are made of whole texts, so the end of a prompt may be joined with what follows: "http:" and "//" are "http" and
"://" in one text. Whether that happened is seen by encoding the end of the prompt alone; such a row is then encoded in
two parts. Left out: which part is trained (encoding.py).
"""

import json
from bisect import bisect_left
from collections.abc import Collection, Sequence
from operator import itemgetter
from typing import NamedTuple

import tokenizers

_WORDS = 9  # of the tokenizer's own splitting; what is farther from the end does not depend on it
_MOST_KNOWN = 4096


class Tokens(NamedTuple):
    """Hold tokens of a text, with the characters that each covers."""

    ids: list[int]
    offsets: Sequence[tuple[int, int]]
    is_stable: bool = True  # they begin with the tokens of each prompt that was asked about


class Boundaries:
    """Keep the tokens of prompts, for one tokenizer.

    Args:
        backend: the tokenizer, without truncation and padding.
        added: ids of its added tokens, at which it cuts texts before anything else.
    """

    def __init__(self, backend: tokenizers.Tokenizer, added: Collection[int]) -> None:
        self._backend = backend
        self._added = added
        self._known: dict[tuple[str, bool], list[int]] = {}  # tokens of ends of prompts
        self._continuing: tokenizers.Tokenizer | None = None

    def keep(
        self,
        text: str,
        encoding: tokenizers.Encoding,
        ends: Sequence[int],  # of prompts in the text, in characters, ascending
    ) -> Tokens:
        """Return the tokens of a text that begins with one or several prompts, each a beginning of the text.

        Those of the longest prompt are kept whatever follows; of the others, and where the rest of the text cannot be
        encoded apart, it is only found whether they were.

        Args:
            text: that was encoded.
            encoding: of the text.
            ends: where its prompts end.

        Returns:
            The tokens.
        """
        ids, offsets = encoding.ids, encoding.offsets  # each a new list at each asking
        are_stable = all(self._is_stable(text, encoding, ids, offsets, end) for end in ends[:-1])
        if not ends or self._is_stable(text, encoding, ids, offsets, ends[-1]):
            return Tokens(ids, offsets, are_stable)
        parts = self._apart(text, ids, ends[-1])
        return Tokens(parts.ids, parts.offsets, are_stable) if parts else Tokens(ids, offsets, is_stable=False)

    def _is_stable(
        self,
        text: str,
        encoding: tokenizers.Encoding,
        ids: Sequence[int],
        offsets: Sequence[tuple[int, int]],
        end: int,
    ) -> bool:
        """Return True if the tokens before `end` are those of the text before it, encoded alone."""
        stop = bisect_left(offsets, end, key=itemgetter(1))  # the first token that reaches the end
        while stop < len(offsets) and offsets[stop][1] == end:
            stop += 1
        if stop < len(offsets) and offsets[stop][0] < end:
            return False
        first, second = self._window(encoding, ids, stop)
        start = offsets[first][0] if first < stop else end
        known = text[start:end], first == second
        alone = self._known.get(known)
        if alone is None:
            found = self._backend.encode(text[start:end], add_special_tokens=False)
            alone = found.ids if first == second else found.ids[_second_word(found.word_ids, 0, len(found.ids)) :]
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[known] = alone
        return alone == ids[second:stop]

    def _window(self, encoding: tokenizers.Encoding, ids: Sequence[int], stop: int) -> tuple[int, int]:
        """Find the tokens before `stop` that are worth encoding again: (from which, from which to compare).

        They begin with an added token, or with a word well before the end; that word itself is not compared, since
        some tokenizers put a blank before the first word of a text.
        """
        for index in range(stop - 1, max(stop - _WORDS, 0) - 1, -1):
            if ids[index] in self._added:
                return index, index
        words = encoding.word_ids
        count = 0
        for index in range(stop - 1, 0, -1):
            if ids[index] in self._added:
                return index, index
            count += words[index] != words[index - 1]
            if count == _WORDS:
                return index, _second_word(words, index, stop)
        return 0, 0

    def _apart(self, text: str, whole: list[int], end: int) -> Tokens | None:
        """Encode a prompt and what follows it; None where the two are not the text again."""
        prompt = self._backend.encode(text[:end], add_special_tokens=False)
        rest = self._continuation().encode(text[end:], add_special_tokens=False)
        ids, offsets = [*prompt.ids], [*prompt.offsets]
        for token, (start, stop) in zip(rest.ids, rest.offsets, strict=True):
            if token in self._added:  # from here on a text is encoded as ever
                end += start
                rest = self._backend.encode(text[end:], add_special_tokens=False)
                ids += rest.ids
                offsets += [(begin + end, stop + end) for begin, stop in rest.offsets]
                break
            ids.append(token)
            offsets.append((start + end, stop + end))
        texts = [self._backend.decode(tokens, skip_special_tokens=False) for tokens in (ids, whole)]
        return Tokens(ids, offsets) if texts[0] == texts[1] else None

    def _continuation(self) -> tokenizers.Tokenizer:
        """Make the tokenizer that encodes what continues a text: it puts no blank before it."""
        if self._continuing is None:
            parts = [self._backend.normalizer, self._backend.pre_tokenizer]
            states = [json.loads(part.__getstate__()) for part in parts if part is not None]
            if states == _unprefixed(states):  # as most: nothing to change, and nothing to build for a second
                self._continuing = self._backend
            else:
                definition = _unprefixed(json.loads(self._backend.to_str()))
                self._continuing = tokenizers.Tokenizer.from_str(json.dumps(definition))
        return self._continuing


def _second_word(words: Sequence[int | None], first: int, stop: int) -> int:
    """Find the first token of the word after the one that `first` is in."""
    return next((index for index in range(first, stop) if words[index] != words[first]), stop)


def _unprefixed(part: object) -> object:
    """Leave out of a tokenizer's definition what it puts before a text."""
    if isinstance(part, list):
        return [_unprefixed(item) for item in part if not (isinstance(item, dict) and item.get("type") == "Prepend")]
    if not isinstance(part, dict):
        return part
    changed = {key: _unprefixed(value) for key, value in part.items()}
    if changed.get("type") == "Metaspace":
        changed["prepend_scheme"] = "never"
    if changed.get("type") == "ByteLevel":
        changed["add_prefix_space"] = False
    if isinstance(normalizer := changed.get("normalizer"), dict) and normalizer.get("type") == "Prepend":
        changed["normalizer"] = None
    return changed | {"post_processor": None} if "post_processor" in changed else changed
