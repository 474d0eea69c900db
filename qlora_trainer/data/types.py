"""Define what a row of any format becomes: a conversation, a prompt with its completion, or a document; and its JSON.

A Message has the parts that today's chat templates know: text, reasoning before it, calls of tools, and which call a
tool's result answers. Left out: reading records into rows (formats/parse.py), and templates (rendering).
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

IGNORED_LABEL = -100  # of a token that carries no loss; the kernels' and transformers' number

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class ToolCall:
    """Hold a function that the assistant asks to be called."""

    name: str
    arguments: str  # a JSON object, as text
    id: str | None = None


@dataclass(frozen=True)
class Message:
    """Hold one turn of a conversation.

    `learn` overrides the run's setting of what is trained for this turn; None leaves it to that.
    """

    role: str  # one of ROLES
    content: str  # empty where an assistant only calls tools
    learn: bool | None = None
    reasoning: str | None = None  # of an assistant, before the content
    tool_calls: tuple[ToolCall, ...] = ()  # of an assistant, after the content
    tool_call_id: str | None = None  # of a tool's result: the call it answers
    name: str | None = None  # of a tool's result: the function that was called


@dataclass(frozen=True)
class Conversation:
    """Hold turns, and the tools that the assistant may call in them."""

    messages: tuple[Message, ...]
    tools: tuple[str, ...] = ()  # the functions that the assistant may call, each a JSON object as text


@dataclass(frozen=True)
class PromptCompletion:
    """Hold plain text without a chat template: the completion and the end-of-text token after it are trained."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Document:
    """Hold plain text, all of it trained."""

    text: str


Row = Conversation | PromptCompletion | Document


def row_to_json(row: Row | Message | ToolCall) -> dict[str, Any]:
    """Write a row as plain JSON, without what is at its default; `row_from_json` is the inverse.

    Args:
        row: a row, or a part of one.

    Returns:
        JSON types only.
    """
    values = [(field, getattr(row, field.name)) for field in fields(row)]
    return {field.name: _plain(value) for field, value in values if field.default is MISSING or value != field.default}


def row_from_json(value: Mapping[str, Any]) -> Row:
    """Read a row from what `row_to_json` wrote.

    Args:
        value: a row's JSON.

    Returns:
        The row.
    """
    if "text" in value:
        return Document(value["text"])
    if "prompt" in value:
        return PromptCompletion(value["prompt"], value["completion"])
    return Conversation(tuple(map(_message, value["messages"])), tuple(value.get("tools", ())))


def _message(value: Mapping[str, Any]) -> Message:
    calls = tuple(ToolCall(**call) for call in value.get("tool_calls", ()))
    return Message(**{**value, "tool_calls": calls})


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return row_to_json(value) if isinstance(value, Message | ToolCall) else value


@dataclass(frozen=True)
class Example:
    """Hold one row as tokens: labels[i] is input_ids[i] where that is trained, else -100; not shifted yet."""

    input_ids: list[int]
    labels: list[int]

    def after(self, leading: Sequence[int]) -> "Example":
        """Put tokens before the row, without labels; so the label tokens stay those of the row alone.

        Args:
            leading: ids.

        Returns:
            The longer example; this one where there are none.
        """
        if not leading:
            return self
        # Nothing is before a row's first token, which so has no part in the loss; nor has it here.
        ignored = [IGNORED_LABEL] * (len(leading) + 1)
        return Example([*leading, *self.input_ids], [*ignored, *self.labels[1:]])

    @property
    def trained_tokens(self) -> int:
        """Count the labels that carry loss. The first token has nothing before it to be predicted from."""
        return len(self.labels[1:]) - self.labels[1:].count(IGNORED_LABEL)


@dataclass(frozen=True)
class PromptTokens:
    """Hold the tokens before an answer, and which tokens end the answer."""

    input_ids: list[int]
    stop_token_ids: list[int]  # rising
