"""Read one turn of a conversation as a Message, whatever its file calls things.

Read are role/content, from/value and Gemini's role/parts, content as text or as a list of parts (parts.py), reasoning
under its several names, tool calls as OpenAI writes them and as ShareGPT writes them into the text, and what a turn
says of being trained. Left out: pictures and sound; a row with them is refused by name, never half read.
"""

import re
from collections.abc import Mapping
from typing import Any

from qlora_trainer.common.errors import DataError
from qlora_trainer.config.override import override
from qlora_trainer.data.formats.calls import read_calls, written_calls
from qlora_trainer.data.formats.meanings import is_empty, key_has_meaning, marks_inside
from qlora_trainer.data.formats.parts import is_data, read_parts, split_results
from qlora_trainer.data.reading.values import from_json_text, json_text, kind, listed, optional_text, text
from qlora_trainer.data.turn_names import ROLE_NAMES, is_turn, naming
from qlora_trainer.data.types import Message

MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_CALL_ROLES = {"function_call", "tool_call", "tool_calls"}
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# True or 1: the turn is trained. OpenAI, LLaMA-Factory, axolotl and ms-swift write these; a key called mask may mean
# either and is not read.
LEARN_KEYS = ("weight", "loss_weight", "train", "training", "trainable", "train_on_turn", "learn", "loss")
_UNLEARN_KEY = "masked"  # torchtune's: true is not trained
_LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{")
_KNOWN_KEYS = {
    "tool_calls",
    "function_call",
    "tool_call_id",
    "name",
    *_REASONING_KEYS,
    *LEARN_KEYS,
    _UNLEARN_KEY,
}


def read_turns(turns: Any, column: str, where: str, roles: Mapping[str, str] = ROLE_NAMES) -> list[Message]:
    """Read a list of turns, each as `read_turn` does; results of tools among the parts of a turn become turns.

    Args:
        turns: the value of a column.
        column: its name, for errors.
        where: file and line, for errors.
        roles: {name in lower case: role}.

    Returns:
        The messages.

    Raises:
        DataError: it is no list.
    """
    if not isinstance(turns, list):
        raise DataError(f"{where}: {column} should be a list of turns, and is {kind(turns)}.")
    messages = []
    for index, turn in enumerate(turns):
        content = turn.get("content") if isinstance(turn, Mapping) else turn
        place = f"{where}, {column}[{index}]"
        if isinstance(content, str):
            messages.append(read_turn(turn, place, roles))
        else:
            given = split_results(turn, naming(turn)[1]) if isinstance(turn, Mapping) else [turn]
            messages += [read_turn(one, place, roles) for one in given]
    return messages


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
    return turns if all(is_turn(turn) for turn in turns) else value


def read_turn(turn: Any, where: str, roles: Mapping[str, str] = ROLE_NAMES) -> Message:
    """Read one turn, in any naming.

    Args:
        turn: an object.
        where: file, line and turn, for errors.
        roles: {name in lower case: role}.

    Returns:
        The message.

    Raises:
        DataError: a role is unknown, a part is of a kind that cannot be trained from, a call is no call, or text is
            missing.
    """
    if not isinstance(turn, Mapping):
        raise DataError(f"{where}: a turn should be an object with role and content, and is {kind(turn)}.")
    speaker, content = naming(turn)
    name = turn.get(speaker)
    if name is None:
        raise DataError(f"{where}: {speaker} is missing or null; the turn holds {listed(turn)}.")
    role = roles.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        line = (
            f" If it is the assistant: {override('data.roles', {name: 'assistant'})}." if isinstance(name, str) else ""
        )
        raise DataError(f"{where}: unknown {speaker} {name!r}; known are {listed(roles)}.{line}")
    check_no_media(turn, where)
    calls, said, of_parts = read_calls(turn, where), "", ""
    if not calls and _may_write_calls(name) and (written := written_calls(turn.get(content))):
        calls = written
    elif isinstance(turn.get(content), list) and not (role == "tool" and is_data(turn[content])):
        found = read_parts(turn[content], content, where)
        said, of_parts = found.said, found.reasoning
        calls += read_calls({"tool_calls": found.calls}, where)
    elif turn.get(content) is not None:
        is_json = role == "tool" and is_data(turn[content])
        said = json_text(turn[content], content, where) if is_json else text(turn[content], content, where)
    elif not calls:
        problem = f"{content} is null" if content in turn else f"{content} is missing"
        raise DataError(f"{where}: {problem}; the turn holds {listed(turn)}.")
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


def unread_keys(turns: Any, roles: Mapping[str, str] = ROLE_NAMES) -> dict[str, bool]:
    """Find the keys with a value that a turn is not read from, such as timestamp.

    Args:
        turns: the value of a column of turns, or of one turn.
        roles: {name in lower case: role}.

    Returns:
        {key of any of the turns: True if formats or trainers give it a meaning}; of an object that is not read, also
        the paths of the marks in it, such as metadata.train.
    """
    found: dict[str, bool] = {}
    for turn in turns if isinstance(turns, list) else (turns,):
        if isinstance(turn, Mapping):
            if len(turn) == 2 and (("role" in turn and "content" in turn) or ("from" in turn and "value" in turn)):
                continue
            unread = turn.keys() - _KNOWN_KEYS - {*naming(turn)}
            for key in sorted(unread | {"name"} if "name" in turn and _is_no_tool(turn, roles) else unread):
                if not is_empty(turn[key]):
                    found[key] = key_has_meaning(key)
                    found |= dict.fromkeys(marks_inside(turn[key], key), True)
    return found


def _is_no_tool(turn: Mapping[str, Any], roles: Mapping[str, str]) -> bool:
    speaker = turn.get(naming(turn)[0])
    return not isinstance(speaker, str) or roles.get(speaker.lower()) != "tool"


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
    speaker, content = naming(turn)
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
        raise DataError(f"{where}: {listed(found)} cannot be trained on, only text.")


def _reasoning(turn: Mapping[str, Any], of_parts: str, where: str) -> str:
    given = {key: text(turn[key], key, where) for key in _REASONING_KEYS if turn.get(key)}
    found = {*given.values(), *([of_parts] if of_parts else [])}
    if len(found) > 1:
        raise DataError(f"{where}: two different texts of reasoning are there ({listed(given)}). Keep one.")
    return found.pop() if found else ""


def _learn(turn: Mapping[str, Any], where: str) -> bool | None:
    """Read what the row itself says of this turn: 0 or 1, false or true."""
    given = {key: turn[key] for key in (*LEARN_KEYS, _UNLEARN_KEY) if key in turn and turn[key] is not None}
    for key, value in given.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            allowed = "0 or 1" if key.endswith("weight") else "true or false"
            raise DataError(f"{where}: {key} is {value!r} and should be {allowed}; fractions are not supported.")
    values = {bool(value) != (key == _UNLEARN_KEY) for key, value in given.items()}
    if len(values) > 1:
        raise DataError(f"{where}: {listed(given)} contradict each other.")
    return values.pop() if values else None
