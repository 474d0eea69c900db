"""Read the tools that a row offers, and the calls of them, in OpenAI's, Anthropic's, Gemini's and ShareGPT's shapes.

Left out: which turn may call (turns.py), and what a template makes of tools and calls (rendering).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.reading.values import from_json_text, json_text, kind, optional_text, text
from qlora_trainer.data.types import ToolCall


def read_tools(value: Any, column: str, where: str) -> tuple[str, ...]:
    """Read the functions an assistant may call, from a list, an object or JSON text.

    Args:
        value: of the column.
        column: its name, for errors.
        where: file and line, for errors.

    Returns:
        Each as JSON text in OpenAI's shape, {"type": "function", "function": {name, description, parameters}}.

    Raises:
        DataError: it is no list of objects with a name.
    """
    if isinstance(value, str):
        value = from_json_text(value, column, where) if value.strip() else []
    given = [value] if isinstance(value, Mapping) else [] if value is None else value
    if not isinstance(given, list):
        raise DataError(f"{where}: {column} should be a list of functions, and is {kind(value)}.")
    tools = []
    for place, tool in _each_tool(given, column, where):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}: {place} should be an object with name, description and parameters.")
        whole = tool if "function" in tool else {"type": "function", "function": tool}
        tools.append(json_text(whole, place, where))
    return tuple(tools)


def _each_tool(given: Sequence[Any], column: str, where: str) -> Iterator[tuple[str, Any]]:
    """Give each tool with its place: Gemini lists several in one object, Bedrock wraps each in another."""
    for index, tool in enumerate(given):
        place = f"{column}[{index}]"
        tool = from_json_text(tool, place, where) if isinstance(tool, str) else tool
        declared = tool.get("functionDeclarations") if isinstance(tool, Mapping) else None
        for one in declared if isinstance(declared, list) else [tool]:
            inner = one.get("toolSpec", one) if isinstance(one, Mapping) else one
            yield place, _with_parameters(inner) if isinstance(inner, Mapping) else inner


def _with_parameters(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Put the schema of a tool's arguments where OpenAI has it: Anthropic and Bedrock call it otherwise."""
    key = next((key for key in ("input_schema", "inputSchema") if key in tool and "parameters" not in tool), None)
    if key is None:
        return tool
    schema = tool[key]
    schema = schema["json"] if isinstance(schema, Mapping) and schema.keys() == {"json"} else schema
    return {**{name: value for name, value in tool.items() if name not in (key, "cache_control")}, "parameters": schema}


def read_calls(turn: Mapping[str, Any], where: str) -> tuple[ToolCall, ...]:
    """Read the calls of tools that a turn makes.

    Args:
        turn: an object with tool_calls, or OpenAI's older function_call.
        where: file, line and turn, for errors.

    Returns:
        The calls; none where it makes none.

    Raises:
        DataError: a call has no name, arguments that are no JSON object, or is of another type than a function's.
    """
    given = turn.get("tool_calls") or []
    if isinstance(given, str):
        given = from_json_text(given, "tool_calls", where)
    if not isinstance(given, list):
        raise DataError(f"{where}: tool_calls should be a list, and is {kind(given)}.")
    if turn.get("function_call"):  # OpenAI's older name, of a single call
        given = [*given, turn["function_call"]]
    calls = []
    for index, call in enumerate(given):
        place = f"{where}, tool_calls[{index}]"
        if isinstance(call, Mapping) and call.get("type") not in (None, "function"):
            raise DataError(f"{place}: is of type {call['type']!r}; only calls of functions can be trained on.")
        function = call.get("function") or call if isinstance(call, Mapping) else {}
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{place}: should be an object with name and arguments, or with these in function.")
        call_id = optional_text(call.get("id"), "id", place) or None
        calls.append(ToolCall(text(function["name"], "name", place), _arguments(function, place), call_id))
    return tuple(calls)


def _arguments(function: Mapping[str, Any], where: str) -> str:
    given = function.get("arguments", function.get("parameters"))
    if given is None or given == "":
        return "{}"
    value = from_json_text(text(given, "arguments", where), "arguments", where) if isinstance(given, str) else given
    written = json_text(value, "arguments", where)  # also of what was text: escapes may hide what is none
    if not isinstance(value, dict):
        raise DataError(f"{where}: arguments should be a JSON object of names and values, and is {kind(value)}.")
    return given if isinstance(given, str) else written


def written_calls(value: Any) -> tuple[ToolCall, ...]:
    """Read a text as calls, as ShareGPT's function_call turns hold them.

    Args:
        value: what the turn says.

    Returns:
        The calls; none where it is anything else.
    """
    if isinstance(value, str):
        try:
            value = from_json_text(value, "value", "")
        except DataError:
            return ()
    try:
        return tuple(ToolCall(text(call["name"], "name", ""), _arguments(call, "")) for call in _as_calls(value))
    except DataError:
        return ()


def _as_calls(value: Any) -> Sequence[Mapping[str, Any]]:
    """Return the value as calls, if it is one or a list of nothing else."""
    values = value if isinstance(value, list) else [value]
    return values if all(_as_call(item) for item in values) else []


def _as_call(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("name"), str)
        and value.keys() in ({"name", "arguments"}, {"name", "parameters"})
    )
