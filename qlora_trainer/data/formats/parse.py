"""Read a record of any known format as one Row: a conversation, a prompt with its completion, or a document.

Everything that is to be answered in turns becomes messages, whatever the file calls them; what the tokenizer's template
makes of them is rendering's business. Left out: which format a record has (detect.py), making columns out of others
(columns.py), one turn (turns.py).
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qlora_trainer.common.errors import DataError
from qlora_trainer.config.data_schema import DataFormat, Scalar
from qlora_trainer.config.override import override
from qlora_trainer.data.formats.advice import settings_line, text_path
from qlora_trainer.data.formats.calls import read_tools
from qlora_trainer.data.formats.columns import is_kept, lists_cut, mapped, paths_of, without_ignored
from qlora_trainer.data.formats.detect import COLUMNS, missing_columns, resolve_format
from qlora_trainer.data.formats.turns import (
    check_no_media,
    has_unread_call,
    read_turn,
    read_turns,
    turns_in_text,
    turns_of,
    unread_keys,
)
from qlora_trainer.data.formats.unread import UnreadColumns
from qlora_trainer.data.reading.values import kind, listed, optional_text, text
from qlora_trainer.data.turn_names import ROLE_NAMES
from qlora_trainer.data.types import Conversation, Document, Message, PromptCompletion, Row

# Columns of ours that may hold turns.
TURNS: dict[DataFormat, tuple[str, ...]] = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": (),
    "dolly": (),
    "question_answer": (),
    "text": (),
}
CALL_IS_TEXT = (
    "a function_call turn holds no JSON of name and arguments, and is trained as the text that it is, not as a call"
)
TEXT_IS_TURNS = (
    "prompt or completion is the JSON text of turns, and is read as these; to train on it as text: "
    + override("data.template", {"prompt": "{prompt}", "completion": "{completion}"})
)
NOT_KEPT = "data.keep leaves the row out"
EMPTY_PROMPT = "the prompt is empty"
EMPTY_ANSWER = "the answer is empty"
EMPTY_TURN = "a turn of the user or the assistant is empty"


class LeftOutError(DataError):
    """Report a row that can be read and is not used; it is counted with its place, and never stops the run."""


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
    for column in TURNS[format]:
        if column in ("messages", "conversations"):
            parsed[column] = turns_of(ours[column], column, where)
        elif column not in template:
            parsed[column] = turns_in_text(ours[column])
    return parsed


def _row(record: Mapping[str, Any], format: DataFormat, roles: Mapping[str, str], where: str) -> Row:
    match format:
        case "text":
            return Document(_text(record, "text", where))
        case "prompt_completion" if _is_plain(record):
            prompt, completion = (_text(record, column, where) for column in ("prompt", "completion"))
            for said, reason in ((prompt, EMPTY_PROMPT), (completion, EMPTY_ANSWER)):
                if not said or said.isspace():
                    raise LeftOutError(reason)
            return PromptCompletion(prompt, completion)
        case "prompt_completion":
            messages = _prompted(record, roles, where)
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
            messages = read_turns(record[column], column, where, roles)
    given = _with_system(messages, record.get("system"), where)
    check_no_empty_turn(given, is_pair=format in ("alpaca", "dolly", "question_answer"))
    return _conversation(given, _tools(record, where), where)


def check_no_empty_turn(messages: Sequence[Message], is_pair: bool = False) -> None:
    """Leave out a row with a turn that says nothing: neither what is asked nor what is answered may be empty.

    Args:
        messages: of a conversation.
        is_pair: whether the last two are a row's prompt and answer, and named so.

    Raises:
        LeftOutError: a turn of the user or the assistant is empty.
    """
    for index, message in enumerate(messages):
        content = message.content
        if message.role not in ("user", "assistant") or (content and not content.isspace()):
            continue
        if not message.tool_calls and not (message.reasoning or "").strip():
            if not is_pair or index < len(messages) - 2:
                raise LeftOutError(EMPTY_TURN)
            raise LeftOutError(EMPTY_PROMPT if message.role == "user" else EMPTY_ANSWER)


def _text(record: Mapping[str, Any], column: str, where: str) -> str:
    """Return the text of a column; for another value, say by which line it is written or where a text is in it."""
    value = record[column]
    if isinstance(value, str):
        return text(value, column, where)
    line = ""
    if isinstance(value, list | Mapping):
        path = text_path(column, value)
        line = f" If a part of it is meant: {override('data.columns', {column: path})}." if path else ""
    elif isinstance(value, float) and math.isnan(value):
        return text(value, column, where)  # which raises
    elif isinstance(value, int | float):
        line = f" To have it written as text: {override('data.template', {column: f'{{{column}}}'})}."
    raise DataError(f"{where}: {column} should be text, and is {kind(value)}.{line}")


class RecordReader:
    """Read the records of one source: all in one format, that of the first where none is named.

    `format` is what was decided so far; `unused` counts the rows that hold each column or key that is not read, and
    `warnings` the rows that are read in a way worth reporting.

    Args:
        format: a format's name, or "auto".
        columns: {our column: path in the record}, see columns.py.
        template: {our column: text with {path} fields}, see columns.py.
        ignore: columns, and keys of turns as messages[].id, that are read as if they were not there.
        keep: {path: value or values} of the rows that are kept.
        roles: {name of a speaker: role}, next to those that are known.
        is_named: whether the format is named by the config; None: where it is not "auto".
    """

    def __init__(
        self,
        format: DataFormat,
        columns: Mapping[str, str],
        template: Mapping[str, str],
        *,
        ignore: Collection[str] = (),
        keep: Mapping[str, Scalar | list[Scalar]] | None = None,
        roles: Mapping[str, str] | None = None,
        is_named: bool | None = None,
    ) -> None:
        self.format, self.columns, self.template, self.keep = format, columns, template, keep or {}
        self.warnings: Counter[str] = Counter()
        is_named = format != "auto" if is_named is None else is_named
        self._unread = UnreadColumns(columns, template, self.keep, list(ignore), is_named)
        self._ignored = frozenset(ignore)
        self._ignored_keys = {
            column: frozenset(name[len(column) + 3 :] for name in ignore if name.startswith(f"{column}[]."))
            for columns in TURNS.values()
            for column in columns
        }
        self._roles = {**ROLE_NAMES, **{name.lower(): role for name, role in (roles or {}).items()}}

    @property
    def unused(self) -> Counter[str]:
        """Return the rows that hold each column or key that is not read."""
        return self._unread.unused

    def read(self, record: Mapping[str, Any], where: str) -> Row:
        """Read one record.

        A ConfigError says that columns or template make what no format has, or that a column has a meaning and is not
        read; a DataError, that a column is missing or of the wrong type, a role is unknown, nothing is to be trained,
        or the row is of another format than those before it.

        Args:
            record: column name to value.
            where: file and line, for errors.

        Returns:
            The row.

        Raises:
            LeftOutError: the row is not to be kept, or a prompt, an answer or a turn is empty.
        """
        record, format = self.recognize(record, where)
        ours = _ours(record, format, self.columns, self.template, where)
        parsed = self._without_ignored(_with_turns(ours, format, self.template, where), format)
        row = _row(parsed, format, self._roles, where)
        is_plain = format == "prompt_completion" and _is_plain(parsed)
        keys: dict[str, bool] = {}
        for column in () if is_plain else TURNS[format]:
            unread = unread_keys(parsed[column], self._roles)
            named = {f"{column}[].{key}": is_meant for key, is_meant in unread.items()}
            keys |= {name: is_meant for name, is_meant in named.items() if name not in self._ignored}
        self._unread.check(record, format, is_plain, row, keys, where)
        cut = lists_cut(record, paths_of(self.columns, self.template))
        self.warnings.update(_warnings(ours, parsed, format))
        self.warnings.update(f"{path} holds more items than are read of it" for path in cut)
        return row

    def recognize(self, record: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], DataFormat]:
        """Find the format of what the config keeps of a record; where none is named, the source has that one from now.

        A ConfigError or DataError says that there is none.

        Args:
            record: column name to value.
            where: file and line, for errors.

        Returns:
            The record without the columns to ignore, and its format.

        Raises:
            LeftOutError: the row is not to be kept.
        """
        if not is_kept(record, self.keep, where):
            raise LeftOutError(NOT_KEPT)
        if self._ignored:
            record = without_ignored(record, self._ignored, paths_of(self.columns, self.template))
        format = resolve_format(record, self.format, self.columns, where, self.template)
        if self.format == "auto":
            self.format = format
        return record, format

    def _without_ignored(self, parsed: dict[str, Any], format: DataFormat) -> dict[str, Any]:
        """Leave out the keys of turns that the config ignores."""
        for column in TURNS[format]:
            ignored, turns = self._ignored_keys[column], parsed[column]
            if ignored and isinstance(turns, list):
                parsed[column] = [_without_keys(turn, ignored) for turn in turns]
            elif ignored:
                parsed[column] = _without_keys(turns, ignored)
        return parsed


def _without_keys(turn: Any, ignored: Collection[str]) -> Any:
    is_turn = isinstance(turn, Mapping)
    return {key: value for key, value in turn.items() if key not in ignored} if is_turn else turn


def _warnings(ours: Mapping[str, Any], parsed: Mapping[str, Any], format: DataFormat) -> list[str]:
    columns = TURNS[format]
    warnings = [CALL_IS_TEXT] if any(has_unread_call(parsed[column]) for column in columns) else []
    if format == "prompt_completion" and any(ours[column] is not parsed[column] for column in columns):
        warnings.append(TEXT_IS_TURNS)
    return warnings


def _is_plain(record: Mapping[str, Any]) -> bool:
    return not any(isinstance(record[column], list | Mapping) for column in ("prompt", "completion"))


def _asked(record: Mapping[str, Any], instruction: str, context: str, answer: str, where: str) -> list[Message]:
    """Make turns of one question, with its context a blank line below, and its answer."""
    given = [_text(record, instruction, where), optional_text(record.get(context) if context else None, context, where)]
    asked = "\n\n".join(part for part in given if part)
    return [Message("user", asked), Message("assistant", _text(record, answer, where))]


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


def _prompted(record: Mapping[str, Any], roles: Mapping[str, str], where: str) -> list[Message]:
    """Read a prompt of turns or text, and what answers it. Answers inside the prompt are not trained."""
    context = _turns_or_text(record["prompt"], "prompt", "user", roles, where)
    answer = _turns_or_text(record["completion"], "completion", "assistant", roles, where)
    if answer and answer[0].role in ("system", "user"):
        raise DataError(
            f"{where}: completion begins with a turn of {answer[0].role}, so it seems to hold the prompt too. To train "
            f"on the whole conversation's answers: {settings_line({'messages': 'completion'}, ignore=['prompt'])}. To "
            f"train on it as text: {settings_line({}, {'completion': '{completion}'})}."
        )
    return [_as_context(message) for message in context] + answer


def _as_context(message: Message) -> Message:
    return dataclasses.replace(message, learn=bool(message.learn)) if message.role == "assistant" else message


def _turns_or_text(value: Any, column: str, role: str, roles: Mapping[str, str], where: str) -> list[Message]:
    if isinstance(value, Mapping):
        return [read_turn(value, f"{where}, {column}", roles)]
    if isinstance(value, list):
        return read_turns(value, column, where, roles)
    return [Message(role, text(value, column, where))]


def _with_system(messages: list[Message], value: Any, where: str) -> list[Message]:
    system = optional_text(value, "system", where)
    if not system:
        return messages
    if messages and messages[0].role == "system":
        if messages[0].content == system:
            return messages
        raise DataError(
            f"{where}: the system column says something else than another system turn in the conversation. Keep one."
        )
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
