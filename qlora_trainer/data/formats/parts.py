"""Read a turn's content that is a list of parts: text, reasoning, calls of tools and their results.

The parts are those of OpenAI, Anthropic (tool_use, tool_result), Gemini (functionCall, functionResponse) and Bedrock
(toolUse, toolResult), text also as LLaMA-Factory writes it ({type: text, value}). Left out: parts that are no text; a
turn with them is refused by name, never half read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.reading.values import json_text, kind, listed, text
from qlora_trainer.data.turn_names import SPEAKER_KEYS

_TEXT_TYPES = ("text", "input_text", "output_text")
_REASONING_TYPES = ("reasoning", "thinking")
_TEXT_KEYS = ("text", "value", "content")
_CALLS = ("tool_use", "toolUse", "functionCall", "function_call")
_RESULTS = ("tool_result", "toolResult", "functionResponse", "function_response")
_NAMED = frozenset((*_CALLS, *_RESULTS))


@dataclass(frozen=True)
class PartsContent:
    """Hold what the parts of one turn say."""

    said: str
    reasoning: str
    calls: list[dict[str, Any]]  # as calls.read_calls takes them


def read_parts(parts: Sequence[Any], column: str, where: str) -> PartsContent:
    """Read the parts of a turn.

    Args:
        parts: of the turn's content; results of tools are taken out before (`split_results`).
        column: the content's key, for errors.
        where: file, line and turn, for errors.

    Returns:
        Text, the reasoning before it, and the calls after it.

    Raises:
        DataError: a part is of a kind that cannot be trained from, holds no text, or is out of order.
    """
    said: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        name = _type_of(part)
        if name in _CALLS:
            calls.append(_call(_inner(part, name)))
        elif name in _REASONING_TYPES:
            if "".join(said).strip():
                raise DataError(f"{where}: {column} has a {name} part after text; reasoning can only be before it.")
            reasoning.append(_text(part, name, (name, *_TEXT_KEYS), column, where))
        elif name in _TEXT_TYPES:
            more = _text(part, name, _TEXT_KEYS, column, where)
            if calls and more.strip():
                raise DataError(f"{where}: {column} has text after a call of a tool; text can only be before it.")
            said.append(more)
        else:
            raise DataError(f"{where}: {column} holds a part of type {name!r}; only text can be trained on.")
    return PartsContent("".join(said), "".join(reasoning), calls)


def split_results(turn: Any, column: str) -> list[Any]:
    """Take results of tools out of a turn of parts: each is a turn of its own, before what else the turn says.

    Args:
        turn: as its file has it.
        column: the key of its content.

    Returns:
        The turns; any other turn alone, as it is.
    """
    parts = turn.get(column) if isinstance(turn, Mapping) else None
    if not isinstance(parts, list) or not any(_type_of(part) in _RESULTS for part in parts):
        return [turn]
    rest = [part for part in parts if _type_of(part) not in _RESULTS]
    others = {key: value for key, value in turn.items() if key not in (column, "name", *SPEAKER_KEYS)}
    turns: list[Any] = [
        {**others, **_result(_inner(part, _type_of(part)))} for part in parts if _type_of(part) in _RESULTS
    ]
    return [*turns, {**turn, column: rest}] if rest else turns


def is_data(content: Any) -> bool:
    """Return True if a tool's result is JSON itself, and not text or parts.

    Args:
        content: of the turn.

    Returns:
        True if it is.
    """
    parts = content if isinstance(content, list) else [content]
    return not any(isinstance(part, str) or (isinstance(part, Mapping) and "type" in part) for part in parts)


def _type_of(part: Any) -> str:
    """Return the type of a part; of one without, the key that says it."""
    if not isinstance(part, Mapping):
        return kind(part)
    name = part.get("type")
    if name is None:
        if "text" in part:
            return "thinking" if part.get("thought") is True else "text"
        name = next((key for key in part if key in _NAMED), None) or listed(part)
    return name if isinstance(name, str) else kind(name)


def _inner(part: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    inner = part.get(name)
    return inner if isinstance(inner, Mapping) else part


def _text(part: Mapping[str, Any], name: str, keys: Sequence[str], column: str, where: str) -> str:
    key = next((key for key in keys if part.get(key) is not None), None)
    if key is None:
        raise DataError(f"{where}: a {name} part of {column} has no text; it holds {listed(part)}.")
    return text(part[key], f"a {name} part of {column}", where)


def _call(given: Mapping[str, Any]) -> dict[str, Any]:
    arguments: Any = next((given[key] for key in ("input", "args", "arguments") if given.get(key) is not None), {})
    call_id = given.get("id") or given.get("toolUseId")
    return {"name": given.get("name"), "arguments": arguments, **({"id": call_id} if call_id else {})}


def _result(given: Mapping[str, Any]) -> dict[str, Any]:
    content = next((given[key] for key in ("content", "response", "output") if given.get(key) is not None), "")
    if isinstance(content, list) and all(isinstance(part, Mapping) and "json" in part for part in content):
        content = "\n".join(json_text(part["json"], "json", "") for part in content)
    elif isinstance(content, list):
        content = [
            {"type": "text", **part} if isinstance(part, Mapping) and "text" in part else part for part in content
        ]
    call_id = given.get("tool_use_id") or given.get("toolUseId") or given.get("id")
    name = {"name": given["name"]} if given.get("name") else {}
    return {"role": "tool", "content": content, **({"tool_call_id": call_id} if call_id else {}), **name}
