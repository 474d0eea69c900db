"""Write a conversation in the shape that chat templates are written for, and keep its texts apart from control tokens.

The shape is the one transformers documents: tools as JSON schemas under "function", tool calls with their arguments as
an object, reasoning as `reasoning_content` (and `thinking`, which some templates read instead). Control tokens that a
row's own texts spell are given other names here ("shields") before a template sees them, so that in the rendering each
control token is one that the template wrote. Left out: the rendering (templates.py) and finding turns in it (spans.py).
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.types import Conversation, Message, ToolCall

Part = tuple[int, int]  # (turn, part of it)
END_OF_REASONING = "</think>"
REASONING, CONTENT, FIRST_CALL = 0, 1, 2  # parts of a turn that hold text; a call's is the name of its function

_INLINE_REASONING = re.compile(rf"\s*(?:<think>)?(.*?){END_OF_REASONING}\n*", re.DOTALL)


@dataclass(frozen=True)
class Dialogue:
    """Hold what a template is given: plain JSON, not to be changed in place."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None

    def beginning(self, count: int) -> "Dialogue":
        """Keep the first turns.

        Args:
            count: how many.

        Returns:
            A dialogue of these.
        """
        return Dialogue(self.messages[:count], self.tools)


def make_dialogue(conversation: Conversation, where: str, arguments_as_text: bool = False) -> Dialogue:
    """Write a conversation as a template takes it.

    Args:
        conversation: a row.
        where: file and line, for errors.
        arguments_as_text: for templates that want the arguments of a call as text, not as an object.

    Returns:
        The dialogue.

    Raises:
        DataError: a tool or the arguments of a call are no JSON object.
    """
    messages = [_plain(message, index, where, arguments_as_text) for index, message in enumerate(conversation.messages)]
    _name_results(messages)
    try:
        tools = _tools(conversation.tools) if conversation.tools else None
    except ValueError as error:
        raise DataError(f"{where}: {error}. Each tool should be a JSON object with a name and parameters.") from error
    return Dialogue(messages, tools)


def says_something(message: Message) -> bool:
    """Return True if a turn has anything to train on: a blank answer has not.

    Args:
        message: the turn.

    Returns:
        True if it has a call, or text or reasoning that is not blank.
    """
    return bool(message.tool_calls or message.content.strip() or (message.reasoning or "").strip())


def _plain(message: Message, index: int, where: str, arguments_as_text: bool) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        plain |= {"reasoning_content": message.reasoning, "thinking": message.reasoning}
    if message.tool_calls:
        place = f"{where}, turn {index + 1}"
        plain["tool_calls"] = [_call(call, place, arguments_as_text) for call in message.tool_calls]
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _call(call: ToolCall, where: str, arguments_as_text: bool) -> dict[str, Any]:
    try:
        arguments = json.loads(call.arguments or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise DataError(
            f"{where}: the arguments of the call of {call.name} are no JSON object: {call.arguments!r:.80}."
        )
    given = json.dumps(arguments, ensure_ascii=False) if arguments_as_text else arguments
    plain: dict[str, Any] = {"type": "function", "function": {"name": call.name, "arguments": given}}
    return plain if call.id is None else {**plain, "id": call.id}


@lru_cache(maxsize=256)
def _tools(tools: tuple[str, ...]) -> list[dict[str, Any]]:
    """Parse tools once for the many rows that share them; a bare function is put where templates look for it."""
    parsed = []
    for text in tools:
        tool = json.loads(text)
        if not isinstance(tool, dict):
            raise ValueError(f"a tool is no JSON object: {text!r:.80}")
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"a tool has no name: {text!r:.80}")
        parsed.append(tool if "function" in tool else {"type": "function", "function": tool})
    return parsed


def _name_results(messages: Sequence[dict[str, Any]]) -> None:
    """Say of each tool's result which function gave it, where the row leaves that to the order or the id of calls."""
    open_calls: list[dict[str, Any]] = []
    for message in messages:
        open_calls += message.get("tool_calls", ())
        if message["role"] == "tool" and open_calls:
            wanted = message.get("tool_call_id")
            answered = next((call for call in open_calls if wanted is not None and call.get("id") == wanted), None)
            answered = answered or (open_calls[0] if wanted is None else None)
            if answered is not None:
                open_calls.remove(answered)
                message.setdefault("name", answered["function"]["name"])


def with_numbered_ids(dialogue: Dialogue) -> Dialogue | None:
    """Put the same calls under ids of nine digits, for templates that ask for such.

    Args:
        dialogue: with calls, or results of tools.

    Returns:
        The dialogue with other ids; None where nothing is called.
    """
    messages, numbers, unanswered = [], dict[str, str](), list[str]()
    count = 0
    for message in dialogue.messages:
        if "tool_calls" in message:
            calls = []
            for call in message["tool_calls"]:
                number = f"{count:09d}"
                count += 1
                numbers[call.get("id", number)] = number
                unanswered.append(number)
                calls.append({**call, "id": number})
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool":
            known = numbers.get(message.get("tool_call_id", ""))
            number = known or (unanswered[0] if unanswered else f"{count:09d}")
            if number in unanswered:
                unanswered.remove(number)
            message = {**message, "tool_call_id": number}
        messages.append(message)
    has_ids = any("tool_calls" in message or message["role"] == "tool" for message in messages)
    return Dialogue(messages, dialogue.tools) if has_ids else None


def with_reasoning_apart(dialogue: Dialogue) -> Dialogue:
    """Take reasoning that begins an answer's text out of it, for templates that have another place for reasoning.

    An empty block of reasoning is left out: templates write their own.

    Args:
        dialogue: of a row.

    Returns:
        The dialogue; answers that have reasoning of their own already are left as they are.
    """
    messages = []
    for message in dialogue.messages:
        found = _INLINE_REASONING.match(message["content"]) if message["role"] == "assistant" else None
        if found and "reasoning_content" not in message:
            message = {**message, "content": message["content"][found.end() :]}
            if reasoning := found[1].strip("\n"):
                message |= {"reasoning_content": reasoning, "thinking": reasoning}
        messages.append(message)
    return Dialogue(messages, dialogue.tools)


def shielded(dialogue: Dialogue, control: re.Pattern[str]) -> tuple[Dialogue, dict[str, str]]:
    """Replace the control tokens that texts spell by other names.

    Args:
        dialogue: of a row.
        control: matches the tokenizer's control tokens.

    Returns:
        The dialogue with these names, and the control token that each represents.
    """
    if not any(control.search(text) for text in _texts([dialogue.messages, dialogue.tools])):
        return dialogue, {}
    nonce = nonce_for(dialogue)
    names: dict[str, str] = {}

    def shield(match: re.Match[str]) -> str:
        return names.setdefault(match[0], f"Q{nonce}s{len(names)}Q")

    messages = _changed(dialogue.messages, lambda text: control.sub(shield, text))
    tools = _changed(dialogue.tools, lambda text: control.sub(shield, text))
    return Dialogue(messages, tools), {name: token for token, name in names.items()}


def text_parts(dialogue: Dialogue) -> dict[Part, str]:
    """Collect what each turn says.

    Args:
        dialogue: of a row.

    Returns:
        Text by (turn, part); blank parts are left out.
    """
    parts = {}
    for index, message in enumerate(dialogue.messages):
        if message.get("reasoning_content", "").strip():
            parts[index, REASONING] = message["reasoning_content"]
        if message["content"].strip():
            parts[index, CONTENT] = message["content"]
        for number, call in enumerate(message.get("tool_calls", ())):
            parts[index, FIRST_CALL + number] = call["function"]["name"]
    return parts


def with_parts(dialogue: Dialogue, parts: dict[Part, str]) -> Dialogue:
    """Put parts in the place of a dialogue's own.

    Args:
        dialogue: of a row.
        parts: text by (turn, part).

    Returns:
        The changed dialogue.
    """
    messages = []
    for index, message in enumerate(dialogue.messages):
        changed = dict(message)
        if (index, CONTENT) in parts:
            changed["content"] = parts[index, CONTENT]
        if (index, REASONING) in parts:
            changed["reasoning_content"] = changed["thinking"] = parts[index, REASONING]
        if "tool_calls" in message:
            changed["tool_calls"] = [
                {
                    **call,
                    "function": {
                        **call["function"],
                        "name": parts.get((index, FIRST_CALL + number), call["function"]["name"]),
                    },
                }
                for number, call in enumerate(message["tool_calls"])
            ]
        messages.append(changed)
    return Dialogue(messages, dialogue.tools)


def nonce_for(dialogue: Dialogue) -> str:
    """Make a word that no text of a dialogue can hold: their own hash.

    Args:
        dialogue: of a row.

    Returns:
        24 hexadecimal digits.
    """
    return hashlib.sha256("\0".join(_texts([dialogue.messages, dialogue.tools])).encode()).hexdigest()[:24]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """Copy a value with every text changed, names of arguments too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _changed(item, change) for key, item in value.items()}
    return [_changed(item, change) for item in value] if isinstance(value, list) else value
