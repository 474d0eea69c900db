"""Render rows as examples: the token ids as the model sees them, and which of them are trained.

Conversations go through the tokenizer's own chat template; prompt and completion, and documents, are plain text that
ends with the end-of-text token. A conversation that is too long loses whole turns from its end, and is rendered anew
without them, as a model would meet it; nothing is cut before it is known what is trained, a row without a trained token
is dropped, and all of it is reported to the caller, who counts. Left out: padding and the shift of labels (packing).
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qlora_trainer.common.errors import DataError, first_line
from qlora_trainer.common.units import counted
from qlora_trainer.data.rendering.encoding import Encoded, Encoder, Tokenizer
from qlora_trainer.data.rendering.pieces import cut_evenly
from qlora_trainer.data.rendering.spans import Rendering, SpanFinder
from qlora_trainer.data.rendering.targets import Prompt, TrainOn, chosen_turns
from qlora_trainer.data.rendering.templates import ChatTemplate
from qlora_trainer.data.types import (
    IGNORED_LABEL,
    Conversation,
    Document,
    Example,
    Message,
    PromptCompletion,
    PromptTokens,
    Row,
)

NOTHING_TRAINED = "nothing to train on: no turn is trained, or the answers are empty"
CUT_AWAY = "longer than max_length, and not even the first answer fits in"
TOO_LONG = "longer than max_length"
COMPLETION_CUT = "the completion was cut at max_length: its end and the end-of-text token are not trained"
PROMPT_TOKENS_DIFFER = "the tokenizer joins a prompt's end with its answer, which follows other tokens in generation"
PLAIN_FORMAT_USED = "the tokenizer has no chat template: turns are written as ### Instruction: and ### Response:"


@dataclass(frozen=True)
class Rendered:
    """Report what became of one row: no example (then `dropped` says why), one, or for a long document several.

    `rows` holds for each example what it shows, for display: the row, what was left of a conversation, or a document's
    part. `tokens` is the length of the row before anything was cut.
    """

    examples: list[Example]
    rows: list[Row]
    dropped: str | None = None
    truncated: bool = False
    warnings: tuple[str, ...] = ()
    tokens: int = 0


class Renderer:
    """Render rows for one tokenizer and one choice of what is trained.

    Args:
        tokenizer: of transformers.
        train_on: as of `chosen_turns`.
        max_length: longest example, in tokens.
        too_long: "truncate" (turns off the end, or a completion's end), "drop" or "error". Documents are always split.
        template_date: the date that a chat template writes as today's; None for today.
        model_stops: tokens that end a text by the model's own settings, in addition to those found here.
        leading_tokens: virtual tokens that are put before each example later, and count in its length.

    Raises:
        DataError: the tokenizer is a slow one, or has no end-of-text token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        train_on: TrainOn = "assistant",
        max_length: int = 2048,
        too_long: Literal["truncate", "drop", "error"] = "truncate",
        template_date: datetime.date | None = None,
        model_stops: Sequence[int] = (),
        leading_tokens: int = 0,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                "The tokenizer has no end-of-text token, so no answer could be ended. Set eos_token in the model's "
                "tokenizer_config.json, or use its instruct variant."
            )
        self.tokenizer, self.eos_id = tokenizer, tokenizer.eos_token_id
        self.train_on = train_on
        self.max_length, self._leading = max_length - leading_tokens, leading_tokens
        self.too_long = too_long
        self.encoder = Encoder(tokenizer)
        self._date, self._end_of_text = template_date, {*model_stops, tokenizer.eos_token_id}
        self._finders: dict[str | None, SpanFinder] = {}

    @property
    def stop_token_ids(self) -> list[int]:
        """Return the tokens that end an answer: the template's ends of an answer and of a call, the end of text."""
        templates = [self._finder(tools).template for tools in self._choices()]
        ends = {end for template in templates for end in (template.end_of_turn, template.end_of_call) if end}
        return sorted({*self._end_of_text, *map(self.tokenizer.convert_tokens_to_ids, ends)})

    @property
    def template_date(self) -> datetime.date | None:
        """Return the date that the chat template writes into its texts; None if it writes none."""
        try:
            dates = [self._finder(tools).template.written_date for tools in self._choices()]
        except DataError:
            return None  # reported where a conversation needs the template
        return next((date for date in dates if date), None)

    def _choices(self) -> list[tuple[str, ...]]:
        """Find offers of tools that lead to each of the templates that there are."""
        named = self.tokenizer.chat_template
        return [(), ("any",)] if isinstance(named, dict) and {"default", "tool_use"} <= named.keys() else [()]

    def render(self, row: Row, where: str = "the row") -> Example:
        """Render one row.

        Args:
            row: of any kind.
            where: file and line, for errors.

        Returns:
            Its first example.

        Raises:
            DataError: it is refused, or would be dropped.
        """
        rendered = self.render_batch([(where, row)])[0]
        if isinstance(rendered, DataError):
            raise DataError(str(rendered)) from rendered
        if rendered.dropped:
            raise DataError(f"{where}: {rendered.dropped}.")
        return rendered.examples[0]

    def render_batch(self, rows: Sequence[tuple[str, Row]]) -> list[Rendered | DataError]:
        """Render many rows, tokenized together, which uses all cores.

        Args:
            rows: each with its place for errors.

        Returns:
            What became of each; in the place of a row that its template refuses, the error.
        """
        texts = self.texts(rows)
        return self.examples(rows, texts, self.encode(texts))

    def texts(self, rows: Sequence[tuple[str, Row]]) -> list[Rendering | DataError]:
        """Write rows as text: the first part of `render_batch`.

        Args:
            rows: each with its place for errors.

        Returns:
            A text for each, or the error.
        """
        return [self._text(row, where) for where, row in rows]

    def encode(self, texts: Sequence[Rendering | DataError]) -> list[Encoded | DataError]:
        """Tokenize texts: the second part of `render_batch`, which may have its own thread.

        Args:
            texts: from `texts`.

        Returns:
            Tokens of each text that is no error.
        """
        return self.encoder.encode([text.spans for text in texts if isinstance(text, Rendering)])

    def examples(
        self,
        rows: Sequence[tuple[str, Row]],
        texts: Sequence[Rendering | DataError],
        encoded: Sequence[Encoded | DataError],
    ) -> list[Rendered | DataError]:
        """Make examples of rows: the last part of `render_batch`.

        Args:
            rows: as given to `texts`.
            texts: from `texts`.
            encoded: from `encode`.

        Returns:
            What became of each row, or the error.
        """
        tokens_of = iter(encoded)
        results: list[Rendered | DataError] = []
        for (where, row), text in zip(rows, texts, strict=True):
            if isinstance(text, DataError):
                results.append(text)
                continue
            tokens = next(tokens_of)
            if isinstance(tokens, DataError):
                results.append(DataError(f"{where}: {tokens}"))
            else:
                warnings = text.warnings if tokens.begins_with_prompts else (*text.warnings, PROMPT_TOKENS_DIFFER)
                results.append(self._finished(where, row, tokens, warnings))
        return results

    def render_prompt(self, prompt: Prompt | Sequence[Message], where: str = "the prompt") -> PromptTokens:
        """Render what is before an answer: the tokens that begin the row in training, and that a server gives.

        Args:
            prompt: plain text to continue, or turns to answer.
            where: names the prompt in an error message.

        Returns:
            The tokens, with those that end an answer: of plain text the end of text alone.

        Raises:
            DataError: the template refuses the turns, or a control token in a text cannot be kept as text.
        """
        if isinstance(prompt, str):
            start, spans = self.encoder.bos_ids, self.encoder.as_spans(prompt, trained=False)
        else:
            conversation = prompt if isinstance(prompt, Conversation) else Conversation(tuple(prompt))
            finder = self._finder(conversation.tools)
            start, spans = self._start(finder.template), finder.render_prompt(conversation, where=where)
        encoded = self.encoder.encode([spans])[0]
        if isinstance(encoded, DataError):
            raise DataError(f"{where}: {encoded}") from encoded
        ends = self._end_of_text if isinstance(prompt, str) else self.stop_token_ids
        return PromptTokens(start + encoded.ids, sorted(ends))

    def _finder(self, tools: Sequence[str]) -> SpanFinder:
        """Find the template as transformers does: of several named ones, "tool_use" where a row offers tools."""
        source = None
        if self.tokenizer.chat_template is not None:
            try:
                source = self.tokenizer.get_chat_template(tools=[] if tools else None)
            except Exception as error:  # transformers', of whatever kind
                raise DataError(f"The tokenizer's chat template cannot be chosen: {first_line(error)}") from error
        if source not in self._finders:
            template = ChatTemplate(self.tokenizer, source, self.encoder.control_pattern, self._date)
            self._finders[source] = SpanFinder(template)
        return self._finders[source]

    def _text(self, row: Row, where: str) -> Rendering | DataError:
        match row:
            case Document(text):
                return Rendering(self.encoder.as_spans(text, trained=True))
            case PromptCompletion(prompt, completion):
                trains_prompt, trains_answer = self.train_on == "all", bool(completion.strip())
                spans = self.encoder.as_spans(prompt, trains_prompt and trains_answer)
                return Rendering(spans + self.encoder.as_spans(completion, trains_answer, after_prompt=True))
            case Conversation():
                return self._conversation(row, chosen_turns(row.messages, self.train_on), where)

    def _conversation(self, row: Conversation, targets: set[int], where: str) -> Rendering | DataError:
        finder = self._finder(row.tools)
        wanted = {index for index in targets if row.messages[index].learn is True}
        try:
            rendering = finder.render(row, targets, others=self.train_on == "all", wanted=wanted, where=where)
        except DataError as error:
            return error
        return replace(rendering, warnings=rendering.warnings + self._template_warnings(row, finder.template))

    def _template_warnings(self, row: Conversation, template: ChatTemplate) -> tuple[str, ...]:
        if template.is_plain:
            return (PLAIN_FORMAT_USED,)
        named = self.tokenizer.chat_template
        if isinstance(named, dict):
            name = "tool_use" if row.tools and "tool_use" in named else "default"
            return (f"of the tokenizer's chat templates ({', '.join(sorted(named))}), {name} is used",)
        return ()

    def _finished(self, where: str, row: Row, tokens: Encoded, warnings: tuple[str, ...]) -> Rendered | DataError:
        if isinstance(row, Document):
            return self._windows(row.text, self.encoder.bos_ids + tokens.ids + [self.eos_id])
        example = self._example(row, tokens)
        length = len(example.input_ids)
        if example.trained_tokens == 0:
            return Rendered([], [], dropped=NOTHING_TRAINED, warnings=warnings, tokens=length)
        if length <= self.max_length:
            return Rendered([example], [row], warnings=warnings, tokens=length)
        if self.too_long == "error":
            virtual = f", with {self._leading} virtual ones" if self._leading else ""
            raise DataError(
                f"{where}: the row has {counted(length + self._leading, 'token')}{virtual}, more than "
                f"{self.max_length + self._leading}. Raise data.max_length, shorten the row, or set data.too_long to "
                "truncate or drop."
            )
        if self.too_long == "drop":
            return Rendered([], [], dropped=TOO_LONG, warnings=warnings, tokens=length)
        if isinstance(row, Conversation):
            cut = self._shortened(row, where)
        else:
            start = Example(example.input_ids[: self.max_length], example.labels[: self.max_length])
            cut = Rendered([start], [row], truncated=True, warnings=(*warnings, COMPLETION_CUT))
            if start.trained_tokens == 0:
                cut = Rendered([], [], dropped=CUT_AWAY, warnings=warnings)
        return cut if isinstance(cut, DataError) else replace(cut, tokens=length)

    def _example(self, row: Row, tokens: Encoded) -> Example:
        if isinstance(row, Conversation):
            start, end = self._start(self._finder(row.tools).template), []
        else:
            start, end = self.encoder.bos_ids, [self.eos_id]
        ids = start + tokens.ids + end
        labels = [IGNORED_LABEL] * len(ids)
        for begin, stop in tokens.trained:
            labels[len(start) + begin : len(start) + stop] = tokens.ids[begin:stop]
        if end and tokens.trained:
            labels[-1] = self.eos_id
        return Example(ids, labels)

    def _shortened(self, row: Conversation, where: str) -> Rendered | DataError:
        """Keep the most turns from the beginning that fit and end with a trained one, as a conversation of their own.

        Which turns are trained is decided in the whole conversation. Where not even the first trained turn fits, the
        row is dropped: half an answer would teach to stop in mid-sentence, or never.
        """
        targets = chosen_turns(row.messages, self.train_on)
        trained = [i for i, m in enumerate(row.messages) if (i in targets) != (self.train_on == "all")]
        if self.train_on == "all":
            trained = [index for index in trained if row.messages[index].role == "assistant"]
        ends = [index + 1 for index in trained if index + 1 < len(row.messages)]
        found = Rendered([], [], dropped=CUT_AWAY)
        # Templates that drop the reasoning of earlier turns may make a longer conversation shorter: then all are tried.
        has_reasoning = any(message.reasoning or "</think>" in message.content for message in row.messages)
        low, high = 0, len(ends)
        while low < high:
            middle = high - 1 if has_reasoning else (low + high) // 2
            shorter = Conversation(row.messages[: ends[middle]], row.tools)
            text = self._conversation(shorter, {index for index in targets if index < ends[middle]}, where)
            if isinstance(text, DataError):
                return text
            encoded = self.encoder.encode([text.spans])[0]
            if isinstance(encoded, DataError):
                return DataError(f"{where}: {encoded}")
            example = self._example(shorter, encoded)
            if len(example.input_ids) <= self.max_length:
                low = middle + 1
                if example.trained_tokens:
                    found = Rendered([example], [shorter], truncated=True, warnings=text.warnings)
            else:
                high = middle
        return found

    def _start(self, template: ChatTemplate) -> list[int]:
        """Return the beginning-of-text token where the template does not write its own: the plain one does not."""
        return self.encoder.bos_ids if template.is_plain else []

    def _windows(self, text: str, ids: list[int]) -> Rendered:
        if not text.strip():
            return Rendered([], [], dropped=NOTHING_TRAINED, tokens=len(ids))
        parts = cut_evenly(ids, self.max_length)
        texts = [text] if len(parts) == 1 else [self.tokenizer.decode(part) for part in parts]
        rows: list[Row] = [Document(part) for part in texts]
        return Rendered([Example(part, list(part)) for part in parts], rows, tokens=len(ids))
