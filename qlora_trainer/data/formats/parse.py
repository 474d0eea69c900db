"""Read a record of any known format as one Row: a conversation, a prompt with its completion, or a document.

Everything that is to be answered in turns becomes messages, whatever the file calls them; what the tokenizer's template
makes of them is rendering's business. Left out: which format a record has (detect.py), making columns out of others
(columns.py), one turn (turns.py).
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_trainer.common.errors import DataError
from qlora_trainer.config.data_schema import DataFormat
from qlora_trainer.data.formats.calls import read_tools
from qlora_trainer.data.formats.columns import mapped, source_columns
from qlora_trainer.data.formats.detect import COLUMNS, known_columns, missing_columns, resolve_format
from qlora_trainer.data.formats.turns import (
    check_no_media,
    has_unread_call,
    read_turn,
    read_turns,
    turns_in_text,
    turns_of,
    unread_keys,
)
from qlora_trainer.data.reading.values import kind, listed, optional_text, text
from qlora_trainer.data.types import Conversation, Document, Message, PromptCompletion, Row

_TURNS = {"messages", "conversations", "prompt", "completion"}  # columns of ours that may hold turns
CALL_IS_TEXT = (
    "a function_call turn holds no JSON of name and arguments, and is trained as the text that it is, not as a call"
)
TEXT_IS_TURNS = (
    "prompt or completion is the JSON text of turns, and is read as these; to train on it as text: data.template "
    '{prompt: "{prompt}", completion: "{completion}"}'
)


def _ours(
    record: Mapping[str, Any], format: DataFormat, columns: Mapping[str, str], template: Mapping[str, str], where: str
) -> dict[str, Any]:
    """Make our columns of a record, those that its format needs among them."""
    ours = mapped(record, columns, template, where)
    if message := missing_columns(ours, format, where):
        raise message
    check_no_media(ours, where)
    return ours


def _with_turns(ours: Mapping[str, Any], format: DataFormat, template: Mapping[str, str], where: str) -> dict[str, Any]:
    """Parse turns that are given as JSON text, as tables hold them. What a template writes as a prompt is text."""
    parsed = dict(ours)
    for column in _TURNS & known_columns(format):
        if column in ("messages", "conversations"):
            parsed[column] = turns_of(ours[column], column, where)
        elif column not in template:
            parsed[column] = turns_in_text(ours[column])
    return parsed


def _row(record: Mapping[str, Any], format: DataFormat, where: str) -> Row:
    match format:
        case "text":
            return Document(text(record["text"], "text", where))
        case "prompt_completion" if _is_plain(record):
            prompt, completion = (text(record[column], column, where) for column in ("prompt", "completion"))
            return PromptCompletion(prompt, completion)
        case "prompt_completion":
            messages = _prompted(record, where)
        case "alpaca":
            messages = [
                *_history(record.get("history"), where),
                *_asked(record, "instruction", "input", "output", where),
            ]
        case "dolly":
            messages = _asked(record, "instruction", "context", "response", where)
        case "question_answer":
            messages = _asked(record, "question", "", "answer", where)
        case _:
            (column,), _ = COLUMNS[format]
            messages = read_turns(record[column], column, where)
    return _conversation(_with_system(messages, record.get("system"), where), _tools(record, where), where)


class RecordReader:
    """Read the records of one source: all in one format, that of the first where none is named.

    `format` is what was decided so far; `unused` counts the rows that hold each column or key that is not read, and
    `warnings` the rows that are read in a way worth reporting.

    Args:
        format: a format's name, or "auto".
        columns: {our column: path in the record}, see columns.py.
        template: {our column: text with {path} fields}, see columns.py.
    """

    def __init__(self, format: DataFormat, columns: Mapping[str, str], template: Mapping[str, str]) -> None:
        self.format, self.columns, self.template = format, columns, template
        self.unused: Counter[str] = Counter()
        self.warnings: Counter[str] = Counter()

    def read(self, record: Mapping[str, Any], where: str) -> Row:
        """Read one record.

        A ConfigError says that columns or template make what no format has; a DataError, that a column is missing or of
        the wrong type, a role is unknown, nothing is to be trained, or the row is of another format than those before
        it.

        Args:
            record: column name to value.
            where: file and line, for errors.

        Returns:
            The row.
        """
        format = resolve_format(record, self.format, self.columns, where, self.template)
        if self.format == "auto":
            self.format = format
        ours = _ours(record, format, self.columns, self.template, where)
        parsed = _with_turns(ours, format, self.template, where)
        row = _row(parsed, format, where)
        self.unused.update(sorted(self._unused(record, parsed, format)))
        self.warnings.update(_warnings(ours, parsed, format))
        return row

    def _unused(self, record: Mapping[str, Any], parsed: Mapping[str, Any], format: DataFormat) -> set[str]:
        """Find what of a record is not used and not null: columns, and keys of turns as messages[].id."""
        is_plain = format == "prompt_completion" and _is_plain(parsed)
        used = {"prompt", "completion"} if is_plain else known_columns(format)
        used = used | source_columns(record, self.columns, self.template)
        found = {name for name, value in record.items() if name not in used and value is not None}
        for name in _TURNS & known_columns(format):
            found |= {f"{name}[].{key}" for key in unread_keys(parsed[name])}
        return found


def _warnings(ours: Mapping[str, Any], parsed: Mapping[str, Any], format: DataFormat) -> list[str]:
    columns = _TURNS & known_columns(format)
    warnings = [CALL_IS_TEXT] if any(has_unread_call(parsed[column]) for column in columns) else []
    if format == "prompt_completion" and any(ours[column] is not parsed[column] for column in columns):
        warnings.append(TEXT_IS_TURNS)
    return warnings


def _is_plain(record: Mapping[str, Any]) -> bool:
    return not any(isinstance(record[column], list | Mapping) for column in ("prompt", "completion"))


def _asked(record: Mapping[str, Any], instruction: str, context: str, answer: str, where: str) -> list[Message]:
    """Make turns of one question, with its context a blank line below, and its answer."""
    given = [text(record[instruction], instruction, where), optional_text(record.get(context), context, where)]
    asked = "\n\n".join(part for part in given if part)
    return [Message("user", asked), Message("assistant", text(record[answer], answer, where))]


def _history(pairs: Any, where: str) -> list[Message]:
    messages = []
    if pairs and not isinstance(pairs, list):
        raise DataError(f"{where}: history should be a list of [instruction, output] pairs, and is {kind(pairs)}.")
    for pair in pairs or []:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise DataError(f"{where}: history should be a list of [instruction, output] pairs.")
        messages += [
            Message("user", text(pair[0], "history", where)),
            Message("assistant", text(pair[1], "history", where)),
        ]
    return messages


def _prompted(record: Mapping[str, Any], where: str) -> list[Message]:
    """Read a prompt of turns or text, and what answers it. Answers inside the prompt are not trained."""
    context = _turns_or_text(record["prompt"], "prompt", "user", where)
    answer = _turns_or_text(record["completion"], "completion", "assistant", where)
    if answer and answer[0].role in ("system", "user"):
        raise DataError(
            f"{where}: completion begins with a turn of {answer[0].role}, so it seems to hold the prompt too. To train "
            "on the whole conversation's answers: data.columns {messages: NAME of that column}. To train on it as "
            'text: data.template {completion: "{completion}"}.'
        )
    return [_as_context(message) for message in context] + answer


def _as_context(message: Message) -> Message:
    return dataclasses.replace(message, learn=bool(message.learn)) if message.role == "assistant" else message


def _turns_or_text(value: Any, column: str, role: str, where: str) -> list[Message]:
    if isinstance(value, Mapping):
        return [read_turn(value, f"{where}, {column}")]
    return read_turns(value, column, where) if isinstance(value, list) else [Message(role, text(value, column, where))]


def _with_system(messages: list[Message], value: Any, where: str) -> list[Message]:
    system = optional_text(value, "system", where)
    if not system:
        return messages
    if messages and messages[0].role == "system":
        if messages[0].content == system:
            return messages
        raise DataError(f"{where}: there is a system column, and another system turn in the conversation. Keep one.")
    return [Message("system", system), *messages]


def _tools(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    given = {column: record[column] for column in ("tools", "functions") if record.get(column)}
    if len(given) > 1:
        raise DataError(f"{where}: tools and functions are both given. Keep one.")
    return next((read_tools(value, column, where) for column, value in given.items()), ())


def _conversation(messages: Sequence[Message], tools: tuple[str, ...], where: str) -> Conversation:
    if not messages:
        raise DataError(f"{where}: the conversation is empty. Every row needs at least one assistant turn.")
    if not any(message.role == "assistant" for message in messages):
        roles = listed(message.role for message in messages)
        raise DataError(f"{where}: there is no assistant turn to train on, only {roles}.")
    return Conversation(tuple(messages), tools)
