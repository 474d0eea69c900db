"""A record of any known format becomes one Row: a conversation, a prompt with its completion, or a document.

Formats are recognised by their columns, or named in the config. Everything that is to be answered in turns becomes
messages, whatever the file calls them; what the tokenizer's template makes of them is rendering's business. Leaves
out: tool calls as structures, images, reasoning parts; such rows are refused by name, never half read.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qlora_trainer.data.messages import ROLES, Conversation, Document, Message, PromptCompletion, Row
from qlora_trainer.errors import DataError
from qlora_trainer.settings import DataFormat

_ROLE_NAMES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}

# The columns each format must have, in the order they are tried, and those it may have.
_COLUMNS: dict[DataFormat, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "chat": (("messages",), ("system",)),
    "sharegpt": (("conversations",), ("system",)),
    "prompt_completion": (("prompt", "completion"), ()),
    "alpaca": (("instruction", "output"), ("input", "system", "history")),
    "question_answer": (("question", "answer"), ("system",)),
    "text": (("text",), ()),
}


def detect_format(columns: Collection[str]) -> DataFormat | None:
    """The format that rows with these columns have, or None."""
    for name, (required, _) in _COLUMNS.items():
        if all(column in columns for column in required):
            return name
    return None


def known_columns(format: DataFormat) -> frozenset[str]:
    """The columns that rows of a format are read from; what else a row holds is not used."""
    required, optional = _COLUMNS[format]
    return frozenset(required + optional)


def resolve_format(record: Mapping[str, Any], format: DataFormat, columns: Mapping[str, str], where: str) -> DataFormat:
    """The format of a record: the one named, or for "auto" the one its columns show, renamed columns first.

    Raises:
        DataError: no format fits, or the record is of a kind that supervised training cannot use.
    """
    if format in ("chat", "sharegpt"):
        # Two names of one thing: turns are read in either naming, under either column.
        return detect_format({*record, *columns} & {"messages", "conversations"}) or format
    if format != "auto":
        return format
    found = [name for name, value in record.items() if value is not None]
    if {"chosen", "rejected"} <= set(found) and not columns:
        raise DataError(
            f"{where}: columns chosen and rejected hold preferences, and this trains on answers. To learn the chosen "
            "ones, name the columns, such as data.columns {prompt: prompt, completion: chosen}."
        )
    if "messages" in found and isinstance(record.get("label"), bool) and not columns:
        raise DataError(
            f"{where}: messages with a label of true or false look like preferences, some rows of which are answers "
            "to avoid. Keep the good rows only; to learn from every row all the same, set data.format to chat."
        )
    detected = detect_format(columns) or detect_format({*found, *columns})
    if detected is None:
        raise DataError(f"{where}: the columns {_listed(record)} are of no known format. {_KNOWN}")
    return detected


def parse_record(record: Mapping[str, Any], format: DataFormat, columns: Mapping[str, str], where: str) -> Row:
    """Read one record.

    Args:
        record: column name to value.
        format: a format's name, or "auto".
        columns: {our name: the file's name} of columns to rename.
        where: file and line, for errors.

    Raises:
        DataError: a column is missing or of the wrong type, a role is unknown, or nothing is to be learned.
    """
    format = resolve_format(record, format, columns, where)
    record = _renamed(record, columns, where)
    required, _ = _COLUMNS[format]
    missing = [column for column in required if record.get(column) is None]
    if missing:
        raise DataError(
            f"{where}: {_listed(missing)} is missing or null, which {format} rows need; the row has {_listed(record)}. "
            f"{_KNOWN}"
        )
    match format:
        case "text":
            return Document(_text(record["text"], "text", where))
        case "prompt_completion":
            return _prompt_completion(record["prompt"], record["completion"], where)
        case "alpaca":
            messages = _alpaca(record, where)
        case "question_answer":
            messages = [
                Message("user", _text(record["question"], "question", where)),
                Message("assistant", _text(record["answer"], "answer", where)),
            ]
        case _:
            messages = _turns(record[required[0]], required[0], where)
    if record.get("system"):
        messages = [Message("system", _text(record["system"], "system", where)), *messages]
    return _conversation(messages, where)


def _conversation(messages: Sequence[Message], where: str) -> Conversation:
    if not messages:
        raise DataError(f"{where}: the conversation is empty. Every row needs at least one assistant turn.")
    if not any(message.role == "assistant" for message in messages):
        roles = _listed(message.role for message in messages)
        raise DataError(f"{where}: there is no assistant turn to learn from, only {roles}.")
    return Conversation(tuple(messages))


def _alpaca(record: Mapping[str, Any], where: str) -> list[Message]:
    messages = []
    for pair in record.get("history") or []:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise DataError(f"{where}: history should be a list of [instruction, output] pairs.")
        messages += [
            Message("user", _text(pair[0], "history", where)),
            Message("assistant", _text(pair[1], "history", where)),
        ]
    instruction = _text(record["instruction"], "instruction", where)
    context = _text(record.get("input") or "", "input", where)
    messages.append(
        Message("user", f"{instruction}\n\n{context}" if context and instruction else instruction or context)
    )
    messages.append(Message("assistant", _text(record["output"], "output", where)))
    return messages


def _prompt_completion(prompt: Any, completion: Any, where: str) -> Row:
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return PromptCompletion(_text(prompt, "prompt", where), _text(completion, "completion", where))
    context = _turns_or_text(prompt, "prompt", "user", where)
    answer = _turns_or_text(completion, "completion", "assistant", where)
    # Answers inside the prompt are context; only the completion is learned.
    return _conversation([Message(m.role, m.content, bool(m.learn)) for m in context] + answer, where)


def _turns_or_text(value: Any, column: str, role: str, where: str) -> list[Message]:
    return _turns(value, column, where) if isinstance(value, list) else [Message(role, _text(value, column, where))]


def _turns(turns: Any, column: str, where: str) -> list[Message]:
    if not isinstance(turns, list):
        raise DataError(f"{where}: {column} should be a list of turns, and is {_kind(turns)}.")
    return [_turn(turn, f"{where}, {column}[{index}]") for index, turn in enumerate(turns)]


def _turn(turn: Any, where: str) -> Message:
    """One turn, in either naming: role and content, or from and value."""
    if not isinstance(turn, Mapping):
        raise DataError(f"{where}: a turn should be an object with role and content, and is {_kind(turn)}.")
    speaker, text = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise DataError(
            f"{where}: tool_calls cannot be rendered yet. Write the call as text in {text}, as the model should say it."
        )
    missing = [key for key in (speaker, text) if turn.get(key) is None]
    if missing:
        raise DataError(f"{where}: {_listed(missing)} is missing or null; the turn holds {_listed(turn)}.")
    role = _ROLE_NAMES.get(turn[speaker]) if isinstance(turn[speaker], str) else None
    if role is None:
        raise DataError(f"{where}: unknown {speaker} {turn[speaker]!r}; known are {_listed(_ROLE_NAMES)}.")
    return Message(role, _content(turn[text], text, where), _learn(turn, where))


def _content(content: Any, column: str, where: str) -> str:
    if not isinstance(content, list):
        return _text(content, column, where)
    texts = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type") == "text":
            texts.append(_text(part.get("text"), f"a text part of {column}", where))
        else:
            kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
            raise DataError(f"{where}: {column} holds a part of type {kind!r}; only text parts can be learned from.")
    return "".join(texts)


def _learn(turn: Mapping[str, Any], where: str) -> bool | None:
    """What the row itself says of this turn: weight 0 or 1, or train or learn as a boolean."""
    given = {key: turn[key] for key in ("weight", "train", "learn") if turn.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            allowed = "0 or 1" if key == "weight" else "true or false"
            raise DataError(
                f"{where}: {key} is {value!r} and should be {allowed}; shares in between are not supported."
            )
    values = {bool(value) for value in given.values()}
    if len(values) > 1:
        raise DataError(f"{where}: {_listed(given)} contradict each other.")
    return values.pop() if values else None


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {column} should be text, and is {_kind(value)}.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: {column} holds half of a surrogate pair at character {error.start}, which is no text. "
                "The file was cut or converted wrongly there."
            ) from error
    return value


def _renamed(record: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    known = {column for required, optional in _COLUMNS.values() for column in required + optional}
    if unknown := [ours for ours in columns if ours not in known]:
        raise DataError(
            f"data.columns names {_listed(unknown)}, which no format has; known are {_listed(sorted(known))}."
        )
    if absent := [theirs for theirs in columns.values() if theirs not in record]:
        raise DataError(f"{where}: data.columns wants {_listed(absent)}, but the row has {_listed(record)}.")
    others = {name: value for name, value in record.items() if name not in columns.values()}
    return others | {ours: record[theirs] for ours, theirs in columns.items()}


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value)) or f"the {type(value).__name__} {value!r}"


def _listed(names: Any) -> str:
    return ", ".join(str(name) for name in names) or "nothing"


_KNOWN = (
    "Known formats: "
    + "; ".join(
        f"{name} ({', '.join(required + tuple(f'{column}?' for column in optional))})"
        for name, (required, optional) in _COLUMNS.items()
    )
    + ". data.columns renames columns, such as {prompt: query}."
)
