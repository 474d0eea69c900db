"""Rows become examples: the token ids as the model sees them, and which of them are learned.

Conversations go through the tokenizer's own chat template; prompt and completion, and documents, are plain text that
ends with the end-of-text token. Nothing is cut before it is known what is learned, a row without a learned token is
dropped, and both are reported to the caller, who counts. Leaves out: padding and the shift of labels (packing).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qlora_trainer.data.encoding import Encoded, Encoder, Stretch, Tokenizer
from qlora_trainer.data.examples import IGNORED_LABEL, Example
from qlora_trainer.data.messages import Conversation, Document, Message, PromptCompletion, Row
from qlora_trainer.data.templates import ChatTemplate
from qlora_trainer.errors import DataError

NOTHING_LEARNED = "nothing to learn: no turn is learned, or the answers are empty"
CUT_AWAY = "longer than max_length, and nothing learned within it"
TOO_LONG = "longer than max_length"
PLAIN_FORMAT_USED = "the tokenizer has no chat template: turns are written as ### Instruction: and ### Response:"

Prompt = tuple[Message, ...] | str


@dataclass(frozen=True)
class Rendered:
    """What became of one row: no example (then `dropped` says why), one, or for a long document several.

    `rows` holds for each example what it shows, for display: the row, or a document's part.
    """

    examples: list[Example]
    rows: list[Row]
    dropped: str | None = None
    truncated: bool = False
    notices: tuple[str, ...] = ()


class Renderer:
    """Renders rows for one tokenizer and one choice of what is learned.

    Args:
        learn: "assistant" (all answers), "last" (the last one) or "all" (every token). What a message says of itself
            (Message.learn) comes first; blank answers are never learned.
        max_length: longest example, in tokens.
        too_long: "truncate" (cut the end off), "drop" or "error". Documents are split, whatever this says.

    Raises:
        DataError: the tokenizer is a slow one, or has no end-of-text token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        learn: Literal["assistant", "last", "all"] = "assistant",
        max_length: int = 2048,
        too_long: Literal["truncate", "drop", "error"] = "truncate",
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                "The tokenizer has no end-of-text token, so no answer could be ended. Set eos_token in the model's "
                "tokenizer_config.json, or use its instruct variant."
            )
        self.tokenizer = tokenizer
        self.eos_id = tokenizer.eos_token_id
        self.learn = learn
        self.max_length = max_length
        self.too_long = too_long
        self.encoder = Encoder(tokenizer)
        self._template: ChatTemplate | None = None

    @property
    def template(self) -> ChatTemplate:
        """Made when the first conversation comes: plain text needs none."""
        if self._template is None:
            self._template = ChatTemplate(self.tokenizer, self.encoder.control_pattern)
        return self._template

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end an answer in generation: the template's end of a turn, and the end of text."""
        ids = {self.eos_id}
        if self.template.end_of_turn:
            ids.add(self.tokenizer.convert_tokens_to_ids(self.template.end_of_turn))
        return sorted(ids)

    def render(self, row: Row, where: str = "the row") -> Example:
        """One row; DataError where it would be dropped."""
        rendered = self.render_batch([(where, row)])[0]
        if rendered.dropped:
            raise DataError(f"{where}: {rendered.dropped}.")
        return rendered.examples[0]

    def render_batch(self, rows: Sequence[tuple[str, Row]]) -> list[Rendered]:
        """Many rows, each with its place for errors; tokenised together, which uses all cores.

        Raises:
            DataError: a template refuses a row, or a row is too long and `too_long` is "error".
        """
        texts = [self._stretches(row, where) for where, row in rows]
        encoded = self.encoder.encode([stretches for stretches, _ in texts])
        return [
            self._finished(where, row, tokens, notices)
            for (where, row), tokens, (_, notices) in zip(rows, encoded, texts, strict=True)
        ]

    def render_prompt(self, prompt: Sequence[Message] | str, where: str = "the prompt") -> list[int]:
        """The ids that stand before an answer: exactly those that begin the row in training."""
        if isinstance(prompt, str):
            # As in training, spaces at the end belong to the first word of what follows.
            stretches = self.encoder.as_stretches(prompt.rstrip(" "), learned=False)
            return self.encoder.bos_ids + self.encoder.encode([stretches])[0].ids
        stretches = self.template.render_prompt(prompt, where=where)
        return self._conversation_start() + self.encoder.encode([stretches])[0].ids

    def _stretches(self, row: Row, where: str) -> tuple[list[Stretch], tuple[str, ...]]:
        match row:
            case Document(text):
                return self.encoder.as_stretches(text, learned=True), ()
            case PromptCompletion(prompt, completion):
                context = prompt.rstrip(" ")
                answer = prompt[len(context) :] + completion
                learn_prompt, learn_answer = self.learn == "all", bool(completion.strip())
                stretches = self.encoder.as_stretches(context, learn_prompt and learn_answer)
                return stretches + self.encoder.as_stretches(answer, learn_answer), ()
            case Conversation(messages):
                rendering = self.template.render(
                    messages, self._targets(messages), others=self.learn == "all", where=where
                )
                plain = (PLAIN_FORMAT_USED,) if self.template.is_plain else ()
                return rendering.stretches, rendering.notices + plain

    def _targets(self, messages: Sequence[Message]) -> set[int]:
        """The turns that are learned; with learn="all", those that are not."""
        if self.learn == "all":
            return {index for index, message in enumerate(messages) if message.learn is False}
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        chosen = set(answers if self.learn == "assistant" else answers[-1:])
        chosen |= {index for index, message in enumerate(messages) if message.learn is True}
        return {index for index in chosen if messages[index].learn is not False and messages[index].content.strip()}

    def _finished(self, where: str, row: Row, tokens: Encoded, notices: tuple[str, ...]) -> Rendered:
        start, end = self.encoder.bos_ids, [self.eos_id]
        match row:
            case Document(text):
                return self._windows(text, start + tokens.ids + end)
            case PromptCompletion():
                ids = start + tokens.ids + end
                learned = [False] * len(start) + tokens.learned + [any(tokens.learned)]
            case Conversation():
                start = self._conversation_start()
                ids, learned = start + tokens.ids, [False] * len(start) + tokens.learned
        labels = [token if flag else IGNORED_LABEL for token, flag in zip(ids, learned, strict=True)]
        if Example(ids, labels).learned_tokens == 0:
            return Rendered([], [], dropped=NOTHING_LEARNED, notices=notices)
        if len(ids) <= self.max_length:
            return Rendered([Example(ids, labels)], [row], notices=notices)
        if self.too_long == "error":
            raise DataError(
                f"{where}: the row has {len(ids)} tokens, more than {self.max_length}. Raise data.max_length, shorten "
                "the row, or set data.too_long to truncate or drop."
            )
        if self.too_long == "drop":
            return Rendered([], [], dropped=TOO_LONG, notices=notices)
        example = Example(ids[: self.max_length], labels[: self.max_length])
        if example.learned_tokens == 0:
            return Rendered([], [], dropped=CUT_AWAY, notices=notices)
        return Rendered([example], [row], truncated=True, notices=notices)

    def _conversation_start(self) -> list[int]:
        """A chat template writes its own beginning-of-text token; the plain one does not."""
        return self.encoder.bos_ids if self.template.is_plain else []

    def _windows(self, text: str, ids: list[int]) -> Rendered:
        """A document in parts of nearly equal length, none longer than max_length, so that no tail is tiny."""
        if not text.strip():
            return Rendered([], [], dropped=NOTHING_LEARNED)
        count = -(-len(ids) // self.max_length)
        bounds = [len(ids) * part // count for part in range(count + 1)]
        parts = [ids[begin:end] for begin, end in itertools.pairwise(bounds)]
        rows: list[Row] = [Document(text)] if count == 1 else [Document(self.tokenizer.decode(part)) for part in parts]
        return Rendered([Example(part, list(part)) for part in parts], rows)


def reference_answer(row: Row) -> tuple[Prompt, str] | None:
    """A row's prompt and the answer it should get, for evaluation by generation; None for a document."""
    match row:
        case PromptCompletion(prompt, completion):
            return prompt, completion
        case Conversation(messages):
            answers = [i for i, m in enumerate(messages) if m.role == "assistant" and m.learn is not False]
            if not answers or answers[-1] == 0:
                return None
            return messages[: answers[-1]], messages[answers[-1]].content
        case _:
            return None
