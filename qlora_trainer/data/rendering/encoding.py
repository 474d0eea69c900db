"""Tokenize a text as a whole, with a flag for each token that is trained.

Pieces that are encoded apart tokenize differently from the whole, so trained spans are marked in the text and found
again through the tokenizer's offsets. Only where a prompt ends, tokens are those of the prompt alone (boundaries.py).
Control tokens come from the template alone: where a row's own text says "<|im_start|>", that stays text. Left out:
tokenizers without offsets (slow ones), which are refused.
"""

import hashlib
import itertools
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Protocol

import tokenizers

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.rendering.boundaries import Boundaries


class Tokenizer(Protocol):
    """Name what is used of a transformers tokenizer, so that this module need not import it."""

    is_fast: bool
    backend_tokenizer: tokenizers.Tokenizer
    added_tokens_decoder: Mapping[int, tokenizers.AddedToken]
    all_special_tokens: list[str]
    special_tokens_map: Mapping[str, Any]
    chat_template: Any
    eos_token: str | None
    eos_token_id: int | None
    unk_token_id: int | None

    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]:
        """Encode text.

        Args:
            text: one or several.
            **options: of transformers.

        Returns:
            Lists of values, such as input_ids.
        """
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens.

        Args:
            ids: of the tokens.

        Returns:
            The text.
        """
        ...

    def convert_tokens_to_ids(self, token: str) -> int:
        """Look up a token.

        Args:
            token: its text.

        Returns:
            Its id; the unknown token's if there is none.
        """
        ...

    def get_vocab(self) -> Mapping[str, int]:
        """Return all tokens.

        Returns:
            Ids by name.
        """
        ...

    def get_chat_template(self, chat_template: str | None = None, tools: list[dict] | None = None) -> str:
        """Choose the chat template.

        Args:
            chat_template: a name or a template; None: the tokenizer's own.
            tools: of the conversation, for which a tokenizer may have another template.

        Returns:
            The template's text.
        """
        ...


@dataclass(frozen=True)
class Span:
    """Hold a piece of text.

    `ordinary` text spells a control token and must not become one. `after_prompt`: all text before it is a prompt that
    is given alone when the model is used.
    """

    text: str
    trained: bool
    ordinary: bool = False
    after_prompt: bool = False


@dataclass(frozen=True)
class Encoded:
    """Hold tokens, and which of them are trained: [begin, end) of each unbroken run, in order.

    `begins_with_prompts`: the tokens begin with those that each of its prompts has when it is given alone.
    """

    ids: list[int]
    trained: list[tuple[int, int]]
    begins_with_prompts: bool = True


class Encoder:
    """Encode text for one fast tokenizer.

    `bos_ids` is what the tokenizer itself puts before a text (nothing, for many); chat templates write it themselves.

    Args:
        tokenizer: of transformers.

    Raises:
        DataError: the tokenizer is a slow one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"The tokenizer {type(tokenizer).__name__} is a slow one, which cannot say where its tokens lie in the "
                "text, so trained tokens cannot be found. Use a model with a tokenizer.json, or convert it with "
                "transformers (AutoTokenizer with use_fast=True)."
            )
        self.tokenizer = tokenizer
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.control_tokens = tuple(sorted(added | set(tokenizer.all_special_tokens), key=lambda t: (-len(t), t)))
        self.control_pattern = re.compile("|".join(map(re.escape, self.control_tokens)) or r"(?!)")
        self.control_ids = frozenset(tokenizer.convert_tokens_to_ids(token) for token in self.control_tokens)
        self.bos_ids = self._leading_ids()
        self._boundaries = Boundaries(tokenizer.backend_tokenizer, frozenset(tokenizer.added_tokens_decoder))
        self._escaping: _EscapingTokenizer | None = None

    def encode(self, texts: Sequence[Sequence[Span]]) -> list[Encoded | DataError]:
        """Tokenize texts; a token is trained if any of its characters is.

        Args:
            texts: each given as its spans.

        Returns:
            Tokens of each; an error in the place of a text in which a control token cannot be kept as text.
        """
        plain = [index for index, text in enumerate(texts) if not any(span.ordinary for span in text)]
        results: dict[int, Encoded | DataError] = {}
        if plain:
            # The tokenizer underneath, as transformers' wrapper turns its results into lists that are not needed here.
            backend = self.tokenizer.backend_tokenizer
            if backend.padding or backend.truncation:  # left on by another caller; changed only then, as another
                backend.no_padding()  # thread may be encoding
                backend.no_truncation()
            joined = ["".join([span.text for span in texts[index]]) for index in plain]
            encodings = backend.encode_batch(joined, add_special_tokens=False)
            for index, whole, encoding in zip(plain, joined, encodings, strict=True):
                ids, offsets, is_stable = self._boundaries.keep(whole, encoding, _prompt_ends(texts[index]))
                runs = trained_runs(texts[index], ids, offsets, self.control_ids)
                results[index] = Encoded(ids, runs, is_stable)
        for index, spans in enumerate(texts):
            if index not in results:
                try:
                    results[index] = self._escaping_tokenizer(spans).encode(spans)
                except DataError as error:
                    results[index] = error
        return [results[index] for index in range(len(texts))]

    def as_spans(self, text: str, trained: bool, after_prompt: bool = False) -> list[Span]:
        """Make spans of a row's own text, in which nothing is a control token.

        Args:
            text: of the row.
            trained: whether it is.
            after_prompt: whether it follows a prompt.

        Returns:
            The same text in pieces.
        """
        spans = list(_split(self.control_pattern, text, trained))
        return [replace(spans[0], after_prompt=after_prompt), *spans[1:]] if spans else []

    def _leading_ids(self) -> list[int]:
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a")["input_ids"]
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start]
        return []

    def _escaping_tokenizer(self, text: Sequence[Span]) -> "_EscapingTokenizer":
        joined = "".join(span.text for span in text)
        found = self._escaping
        while found is None or found.nonce in joined:
            previous = found.nonce if found else ""
            found = _EscapingTokenizer(self.tokenizer, self.control_tokens, self.control_pattern, previous)
        self._escaping = found
        return found


class _EscapingTokenizer:
    """Wrap a tokenizer, with its control tokens under secret names, so that their usual spelling is plain text.

    The text is still encoded whole: splitting it at such places would change the tokens around them.

    Args:
        tokenizer: of transformers.
        control_tokens: of the tokenizer.
        pattern: matches them.
        previous: a nonce that a text held, so that another is needed; "" at first.
    """

    def __init__(
        self, tokenizer: Tokenizer, control_tokens: Sequence[str], pattern: re.Pattern[str], previous: str
    ) -> None:
        self.pattern = pattern
        self.nonce = hashlib.sha256(f"control tokens {previous}".encode()).hexdigest()[:16]
        definition = json.loads(tokenizer.backend_tokenizer.to_str())
        known = {token["content"] for token in definition["added_tokens"]}
        secret = (f"\uf8ff{self.nonce}.{index}\uf8ff" for index in itertools.count())
        self.names = {token: next(secret) for token in control_tokens if token in known}
        definition |= {"truncation": None, "padding": None, "post_processor": None}
        own_ids = {}
        for token in definition["added_tokens"]:
            token["content"] = self.names.get(token["content"], token["content"])
            own_ids[token["content"]] = token["id"]
        self.backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
        self.ids = {self.backend.token_to_id(content): token_id for content, token_id in own_ids.items()}
        self.boundaries = Boundaries(self.backend, frozenset(token for token in self.ids if token is not None))
        self.control_ids = {own_ids[name] for name in self.names.values()}
        self.control_ids.discard(tokenizer.unk_token_id)

    def encode(self, text: Sequence[Span]) -> Encoded:
        """Tokenize one text.

        Args:
            text: as its spans.

        Returns:
            Its tokens, in the original tokenizer's ids.

        Raises:
            DataError: the tokenizer makes a control token of the row's own text.
        """
        renamed = [
            span
            if span.ordinary
            else replace(span, text=self.pattern.sub(lambda match: self.names.get(match[0], match[0]), span.text))
            for span in text
        ]
        joined = "".join(span.text for span in renamed)
        encoding = self.backend.encode(joined, add_special_tokens=False)
        own, offsets, is_stable = self.boundaries.keep(joined, encoding, _prompt_ends(renamed))
        ids = [self.ids.get(token, token) for token in own]
        wanted = sum(span.text.count(self.nonce) for span in renamed)
        found = sum(token in self.control_ids for token in ids)
        if found > wanted:
            spelled = next(span.text for span in text if span.ordinary)
            raise DataError(f"this tokenizer makes a control token of {spelled!r} in a row's own text. Take it out.")
        return Encoded(ids, trained_runs(renamed, ids, offsets, self.control_ids), is_stable)


def _prompt_ends(text: Iterable[Span]) -> list[int]:
    """Find where the prompts in a text end, in characters."""
    ends = []
    position = 0
    for span in text:
        if span.after_prompt:
            ends.append(position)
        position += len(span.text)
    return ends


def _split(pattern: re.Pattern[str], text: str, trained: bool) -> Iterator[Span]:
    position = 0
    for match in pattern.finditer(text):
        if match.start() > position:
            yield Span(text[position : match.start()], trained)
        yield Span(match[0], trained, ordinary=True)
        position = match.end()
    if position < len(text):
        yield Span(text[position:], trained)


def trained_runs(
    text: Iterable[Span],
    ids: Sequence[int],  # (tokens,)
    offsets: Sequence[tuple[int, int]],  # (tokens,) characters of each
    control: Collection[int],
) -> list[tuple[int, int]]:
    """Find the runs of tokens of which any character is trained.

    Of a control token the first character counts: some swallow blanks after them. Whitespace that a tokenizer trims
    from its offsets counts to the token after it. Bounds are searched for, since rows have few spans and many tokens.

    Args:
        text: as its spans.
        ids: of its tokens.
        offsets: where each token is in the text.
        control: ids of control tokens.

    Returns:
        [begin, end) of each unbroken run, in order.
    """
    runs: list[tuple[int, int]] = []
    position = 0
    for span in text:
        start, position = position, position + len(span.text)
        if not span.trained or start == position:
            continue
        begin = bisect_right(offsets, start, key=itemgetter(1))
        if begin < len(ids) and offsets[begin][0] < start and ids[begin] in control:
            begin += 1
        end = bisect_left(offsets, position, lo=begin, key=itemgetter(0))
        if begin <= end < len(ids) and ids[end] not in control and (offsets[end - 1][1] if end else 0) < position:
            end += 1
        if runs and begin <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(end, runs[-1][1]))
        elif begin < end:
            runs.append((begin, end))
    return runs
