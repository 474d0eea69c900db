"""Read one turn of a conversation as a Message, whatever its file calls things.

Read are role/content and from/value, content as text or as a list of parts, reasoning under its several names, tool
calls as OpenAI writes them and as ShareGPT writes them into the text, and what a turn says of being trained. Left out:
images and other parts that are no text; a row with them is refused by name, never half read.
"""

import re
from collections.abc import Mapping
from typing import Any

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.formats.calls import read_calls, written_calls
from qlora_trainer.data.reading.values import from_json_text, json_text, kind, listed, optional_text, text
from qlora_trainer.data.types import ROLES, Message

ROLE_NAMES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}

MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_CALL_ROLES = {"function_call", "tool_call"}
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_LEARN_KEYS = ("weight", "train", "learn")
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("reasoning", "thinking")
_LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{")
_KNOWN_KEYS = {"tool_calls", "function_call", "tool_call_id", "name", *_REASONING_KEYS, *_LEARN_KEYS}


def read_turns(turns: Any, column: str, where: str) -> list[Message]:
    """Read a list of turns, each as `read_turn` does.

    Args:
        turns: the value of a column.
        column: its name, for errors.
        where: file and line, for errors.

    Returns:
        The messages.

    Raises:
        DataError: it is no list.
    """
    if not isinstance(turns, list):
        raise DataError(f"{where}: {column} should be a list of turns, and is {kind(turns)}.")
    return [read_turn(turn, f"{where}, {column}[{index}]") for index, turn in enumerate(turns)]


def turns_of(value: Any, column: str, where: str) -> Any:
    """Parse a column of turns where it is the text of a JSON list; a DataError says that it is none.

    Args:
        value: of the column.
        column: its name, for errors.
        where: file and line, for errors.

    Returns:
        What the text holds; any other value as it is.
    """
    is_list = isinstance(value, str) and value.lstrip().startswith("[")
    return from_json_text(value, column, where) if is_list else value


def turns_in_text(value: Any) -> Any:
    """Parse text that is the JSON of turns, in a column that may hold either.

    Args:
        value: of the column.

    Returns:
        The turns; any other value as it is.
    """
    if not isinstance(value, str) or not _LIST_OF_OBJECTS.match(value):
        return value
    try:
        turns = from_json_text(value, "", "")
    except DataError:
        return value
    return turns if all(_is_turn(turn) for turn in turns) else value


def _is_turn(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    speaker, content = _naming(value)
    name = value.get(speaker)
    is_known = isinstance(name, str) and name.lower() in ROLE_NAMES
    return is_known and any(value.get(key) is not None for key in (content, "tool_calls", "function_call"))


def read_turn(turn: Any, where: str) -> Message:
    """Read one turn, in either naming.

    Args:
        turn: an object.
        where: file, line and turn, for errors.

    Returns:
        The message.

    Raises:
        DataError: a role is unknown, a part is of a kind that cannot be trained from, a call is no call, or text is
            missing.
    """
    if not isinstance(turn, Mapping):
        raise DataError(f"{where}: a turn should be an object with role and content, and is {kind(turn)}.")
    speaker, content = _naming(turn)
    name = turn.get(speaker)
    if name is None:
        raise DataError(f"{where}: {speaker} is missing or null; the turn holds {listed(turn)}.")
    role = ROLE_NAMES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"{where}: unknown {speaker} {name!r}; known are {listed(ROLE_NAMES)}.")
    check_no_media(turn, where)
    calls, said, of_parts = read_calls(turn, where), "", ""
    if not calls and _may_write_calls(name) and (written := written_calls(turn.get(content))):
        calls = written
    elif turn.get(content) is not None:
        said, of_parts = _content(turn[content], role, content, where)
    elif not calls:
        raise DataError(f"{where}: {content} is missing or null; the turn holds {listed(turn)}.")
    reasoning = _reasoning(turn, of_parts, where)
    for what, given in (("tool_calls", calls), ("reasoning", reasoning)):
        if given and role != "assistant":
            raise DataError(f"{where}: {what} in a turn of {name}; only an assistant's turn can have that.")
    return Message(
        role,
        said,
        learn=_learn(turn, where),
        reasoning=reasoning or None,
        tool_calls=calls,
        tool_call_id=optional_text(turn.get("tool_call_id"), "tool_call_id", where) or None,
        name=(optional_text(turn.get("name"), "name", where) or None) if role == "tool" else None,
    )


def _naming(turn: Mapping[str, Any]) -> tuple[str, str]:
    """Return the keys that say who speaks, and what."""
    return ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")


def unread_keys(turns: Any) -> set[str]:
    """Find the keys with a value that a turn is not read from, such as timestamp.

    Args:
        turns: the value of a column of turns.

    Returns:
        Keys of any of the turns.
    """
    found: set[str] = set()
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, Mapping):
            unread = turn.keys() - _KNOWN_KEYS - {*_naming(turn)}
            found |= {key for key in (unread | {"name"} if _is_no_tool(turn) else unread) if turn.get(key)}
    return found


def _is_no_tool(turn: Mapping[str, Any]) -> bool:
    speaker = turn.get(_naming(turn)[0])
    return not isinstance(speaker, str) or ROLE_NAMES.get(speaker.lower()) != "tool"


def has_unread_call(turns: Any) -> bool:
    """Find a turn that should write a call, as ShareGPT's function_call, but says what is none and so stays text.

    Args:
        turns: the value of a column of turns.

    Returns:
        True if there is one.
    """
    turns = turns if isinstance(turns, list) else []
    return any(isinstance(turn, Mapping) and _is_unread_call(turn) for turn in turns)


def _is_unread_call(turn: Mapping[str, Any]) -> bool:
    speaker, content = _naming(turn)
    said = turn.get(content)
    has_calls = turn.get("tool_calls") or turn.get("function_call")
    return bool(_may_write_calls(turn.get(speaker)) and said and not has_calls and not written_calls(said))


def _may_write_calls(name: Any) -> bool:
    return isinstance(name, str) and name.lower() in _CALL_ROLES


def check_no_media(holder: Mapping[str, Any], where: str) -> None:
    """Refuse a row or turn that comes with pictures or sound: its text alone would be trained wrongly.

    Args:
        holder: a row's columns, or a turn.
        where: file and line, for errors.

    Raises:
        DataError: it holds pictures or sound.
    """
    if found := [name for name in MEDIA if holder.get(name)]:
        raise DataError(
            f"{where}: {listed(found)} cannot be trained from, only text. Take such rows out, or skip them: "
            "data.on_bad_row skip."
        )


def _content(content: Any, role: str, column: str, where: str) -> tuple[str, str]:
    """Read text, and the reasoning that is before it in parts of its own."""
    if role == "tool" and _is_data(content):
        return json_text(content, column, where), ""
    if not isinstance(content, list):
        return text(content, column, where), ""
    said, reasoning = [], []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        name = part.get("type") if isinstance(part, Mapping) else kind(part)
        if name in _TEXT_PARTS:
            said.append(text(part.get("text"), f"a {name} part of {column}", where))
        elif name in _REASONING_PARTS:
            if "".join(said).strip():
                raise DataError(f"{where}: {column} has a {name} part after text; reasoning can only be before it.")
            reasoning.append(text(part.get(name, part.get("text")), f"a {name} part of {column}", where))
        else:
            raise DataError(
                f"{where}: {column} holds a part of type {name!r}; only text and reasoning can be trained from. Take "
                "such rows out, or skip them: data.on_bad_row skip."
            )
    return "".join(said), "".join(reasoning)


def _is_data(content: Any) -> bool:
    """Return True if a tool's result is JSON itself, and not text or parts."""
    parts = content if isinstance(content, list) else [content]
    return not any(isinstance(part, str) or (isinstance(part, Mapping) and "type" in part) for part in parts)


def _reasoning(turn: Mapping[str, Any], of_parts: str, where: str) -> str:
    given = {key: text(turn[key], key, where) for key in _REASONING_KEYS if turn.get(key)}
    found = {*given.values(), *([of_parts] if of_parts else [])}
    if len(found) > 1:
        raise DataError(f"{where}: reasoning is there twice, and not the same: {listed(given)}. Keep one.")
    return found.pop() if found else ""


def _learn(turn: Mapping[str, Any], where: str) -> bool | None:
    """Read what the row itself says of this turn: weight 0 or 1, or train or learn as a boolean."""
    given = {key: turn[key] for key in _LEARN_KEYS if turn.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            allowed = "0 or 1" if key == "weight" else "true or false"
            raise DataError(
                f"{where}: {key} is {value!r} and should be {allowed}; shares in between are not supported."
            )
    values = {bool(value) for value in given.values()}
    if len(values) > 1:
        raise DataError(f"{where}: {listed(given)} contradict each other.")
    return values.pop() if values else None
