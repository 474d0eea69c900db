"""Stop at columns and keys that mean something and would not be read; count the others.

A row says with `label: false` or `loss_weight: 0` that it is not to be trained as it is, and with `system` or `input`
what its answer depends on. Whatever the recognized format does not read of this stops the run, since only the user
knows what is meant; the message has the lines that settle it. A value that is empty says nothing, also where all are:
a table has a cell in every row. Text that the row's turns hold already, such as the whole row written out once more, is
not lost. Left out: which names mean something (meanings.py).
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from qlora_trainer.common.errors import ConfigError
from qlora_trainer.config.data_schema import DataFormat
from qlora_trainer.config.override import override
from qlora_trainer.data.formats.advice import chat_columns, one_turn, settings_line, with_fields
from qlora_trainer.data.formats.columns import paths_of, source_columns
from qlora_trainer.data.formats.detect import COLUMNS, known_columns
from qlora_trainer.data.formats.mark_values import value_to_keep
from qlora_trainer.data.formats.meanings import (
    has_meaning,
    is_class,
    is_context,
    is_empty,
    is_mark,
    is_metadata,
    marks_inside,
    slot_of,
)
from qlora_trainer.data.formats.turns import LEARN_KEYS
from qlora_trainer.data.reading.values import listed, shortened
from qlora_trainer.data.turn_names import SPEAKER_KEYS
from qlora_trainer.data.types import Conversation, Document, PromptCompletion, Row

_OF_TURNS = ("chat", "sharegpt")
_POSITION = re.compile(r"\.-?[0-9]+(?=\.|$)")  # in a list


class UnreadColumns:
    """Check the columns of one source's rows, and count those that are not used in `unused`.

    Args:
        columns: {our column: path}.
        template: {our column: text with fields}.
        kept_by: columns by which rows are kept, which are thereby read.
        ignored: columns and keys that the config leaves out already.
        is_named: whether the config names the source's format, so that it is meant.
    """

    def __init__(
        self,
        columns: Mapping[str, str],
        template: Mapping[str, str],
        kept_by: Collection[str],
        ignored: Sequence[str],
        is_named: bool,
    ) -> None:
        self.columns, self.template, self.kept_by, self.is_named = columns, template, kept_by, is_named
        self.ignored = ignored
        self.unused: Counter[str] = Counter()
        self._shapes: dict[tuple[object, ...], tuple[list[str], list[str], list[str]]] = {}

    def check(
        self,
        record: Mapping[str, Any],
        format: DataFormat,
        is_plain: bool,
        row: Row,
        keys: Mapping[str, bool],
        where: str,
    ) -> None:
        """Check one row.

        Args:
            record: its columns, those to ignore left out.
            format: of the source.
            is_plain: whether prompt and completion are texts, which have no turns.
            row: what was read of it.
            keys: of its turns that are not read, by the name that a report has: whether each has a meaning.
            where: file and line, for errors.

        Raises:
            ConfigError: a column or key that has a meaning is not read.
        """
        shape = (*record, format, is_plain)
        found = self._shapes.get(shape)
        if found is None:
            found = self._shapes[shape] = self._classified(record, format, is_plain, where)
        others, meant, partly = found
        lost = {
            name: record[name]
            for name in meant
            if not is_empty(record[name]) and not _is_read_already(name, record[name], row)
        }
        for name in (*others, *partly):
            if isinstance(record[name], Mapping | list):
                lost |= self._unread_marks(name, record[name])
        if lost:
            raise ConfigError(self._message(record, format, is_plain, lost, where))
        if lost_keys := [key for key, is_meant in keys.items() if is_meant]:
            raise ConfigError(
                f"{where}: {listed(lost_keys)} may say whether a turn is trained, or be a part of what it says, but "
                f"{'is' if len(lost_keys) == 1 else 'are'} not read. Turns to train are marked by one of "
                f"{listed(LEARN_KEYS)}, with 1 or true. To leave {_it(lost_keys)} out: {self._ignoring(lost_keys)}."
            )
        self.unused.update([name for name in others if record[name] is not None])
        self.unused.update([name for name in meant if not is_empty(record[name])])
        self.unused.update(keys.keys())

    def _classified(
        self, record: Mapping[str, Any], format: DataFormat, is_plain: bool, where: str
    ) -> tuple[list[str], list[str], list[str]]:
        """Divide the columns into those that are not read without a meaning, those with one, and those read in part."""
        read = {"prompt", "completion"} if is_plain else known_columns(format)
        made = {**self.columns, **self.template}
        if useless := [name for name in made if name not in read]:
            raise ConfigError(self._useless(record, format, is_plain, useless, where))
        sources = source_columns(record, (*paths_of(self.columns, self.template), *self.kept_by))
        unread = [name for name in record if name not in sources and (name not in read or name in made)]
        meant = [name for name in unread if self._is_meant(name, format)]
        partly = [name for name in record if name in sources and name not in self._read_paths]
        return [name for name in unread if name not in meant], meant, partly

    @cached_property
    def _read_paths(self) -> frozenset[str]:
        """List the paths that settings name, also with [] for the positions in lists, as paths of marks have it."""
        named = {path.removesuffix("?") for path in (*paths_of(self.columns, self.template), *self.kept_by)}
        return frozenset(named | {_POSITION.sub("[]", path) for path in named})

    def _unread_marks(self, name: str, value: Any) -> dict[str, Any]:
        """Find the marks of an object, or of the objects of a list, that is not read, or only in part."""
        return {
            path: mark
            for path, mark in marks_inside(value, name).items()
            if path not in self.ignored
            and not any(f"{path}.".startswith(f"{read}.") or read.startswith(f"{path}.") for read in self._read_paths)
        }

    def _is_meant(self, name: str, format: DataFormat) -> bool:
        if format == "text":
            return has_meaning(name) or not (self._is_text_meant() or is_metadata(name))
        return has_meaning(name) or (is_context(name) and format not in _OF_TURNS)

    def _is_text_meant(self) -> bool:
        """Return True if the config says that the rows are plain text, or of which column."""
        return self.is_named or "text" in self.columns or "text" in self.template

    def _message(
        self, record: Mapping[str, Any], format: DataFormat, is_plain: bool, lost: Mapping[str, Any], where: str
    ) -> str:
        if format == "text" and not self._is_text_meant() and any(name in record for name in lost):
            return self._text_message(record, lost, where)
        ways = []
        for name, value in lost.items():
            kept = value_to_keep(name if name in record else name.rpartition(".")[2], value)
            if kept is not None and (name in record or "[]" not in name):  # items of a list have no value in common
                others = [other for other in lost if other != name]
                line = " ".join([override("data.keep", {name: kept}), *[self._ignoring(others)] * bool(others)])
                ways.append(f"To train only on rows where {name} is {str(kept).lower()}: {line}.")
        has_turns = format in _OF_TURNS or (format == "prompt_completion" and not is_plain)
        ways += self._lines_that_read(record, format, has_turns, lost)
        ways.append(f"To leave {_it(lost)} out: {self._ignoring(lost)}.")
        kind = "plain prompt and completion" if is_plain else f"{format} rows"
        marks, texts = [name for name in lost if is_mark(name)], [name for name in lost if not is_mark(name)]
        meanings = [f"{shortened(marks)} may mark answers to avoid, or say how much a row counts"] * bool(marks)
        meanings += [f"{shortened(texts)} may be what an answer depends on"] * bool(texts)
        are_not = f"{'is' if len(lost) == 1 else 'are'} not read from {kind}"
        return f"{where}: {', and '.join(meanings)}, but {are_not}. {' '.join(ways)}"

    def _ignoring(self, names: Iterable[str]) -> str:
        return override("data.ignore", [*self.ignored, *names])

    def _text_message(self, record: Mapping[str, Any], lost: Collection[str], where: str) -> str:
        """Ask what is meant by a text next to other columns."""
        meant = [name for name in lost if has_meaning(name) or name not in record]
        plain = " ".join([override("data.format", "text"), *[self._ignoring(meant)] * bool(meant)])
        alone = f"If only text is to be trained, as plain text: {plain}."
        if turn := one_turn(record):
            return f"{where}: {turn} {alone}"
        columns_lost = sorted((name for name in lost if name in record), key=SPEAKER_KEYS.__contains__)
        other = next((name for name in columns_lost if slot_of(name) or not is_mark(name)), columns_lost[0])
        other = next((name for name in columns_lost if is_class(name)), other)
        is_asked = slot_of(other) == "asked"
        columns = {"question": other, "answer": "text"} if is_asked else {"question": "text", "answer": other}
        ignored = [name for name in lost if name != other and has_meaning(name)]
        if isinstance(record[other], str):
            line = settings_line(columns, ignore=[*self.ignored, *ignored])
        else:
            line = settings_line({"question": "text"}, {"answer": f"{{{other}}}"}, [*self.ignored, *ignored])
        asked, answer = (other, "text") if is_asked else ("text", other)
        return (
            f"{where}: besides text the row has {shortened(lost)}, not read from rows of plain text. If {answer} is "
            f"the answer to {asked}: {line}. {alone}"
        )

    def _lines_that_read(
        self, record: Mapping[str, Any], format: DataFormat, has_turns: bool, lost: Iterable[str]
    ) -> list[str]:
        """Write the settings with which texts that are not read would be."""
        if format == "text":
            return []
        slots, taken = self._slots(record, format), list[str]()
        contexts = [name for name in lost if is_context(name) and not has_turns]
        for name in () if self.template else lost:
            slot = slot_of(name)
            if slot in ("system", "history", "tools") and slot not in slots and not is_mark(name):
                slots[slot] = name
                taken.append(name)
        taken += contexts
        ignored = [*self.ignored, *(name for name in lost if name not in taken)]
        if not taken or not chat_columns(slots):
            return []
        if self.template:
            first = COLUMNS[format][0][0]
            written = settings_line(*with_fields({first: first, **self.columns}, contexts, self.template), ignored)
            return [f"To have {shortened(taken)} read: {written}."]
        own = next((name for name in COLUMNS[format][1] if slot_of(name) == "context" and name in record), None)
        own = self.columns.get(own, own) if own else None
        alone = chat_columns(slots | {"context": contexts[0]}) if contexts else chat_columns(slots)
        is_one = len(contexts) == 1 and isinstance(record[contexts[0]], str)
        if not contexts or (is_one and not own):
            return [f"To have {shortened(taken)} read: {settings_line(alone, ignore=ignored)}."]
        before = chat_columns({slot: path for slot, path in slots.items() if slot != "context"})
        written = settings_line(*with_fields(before, [own, *contexts] if own else contexts), ignored)
        if not own:
            return [f"To have {shortened(taken)} read: {written}."]
        ways = [f"To have {shortened(taken)} read too, below {own}: {written}."]
        replaced = settings_line(alone, ignore=[*ignored, own])
        return ways + [f"To have {shortened(taken)} read and {own} left out: {replaced}."] * is_one

    def _slots(self, record: Mapping[str, Any], format: DataFormat) -> dict[str, str]:
        """Say by which paths a format is read now."""
        required, optional = COLUMNS[format]
        names = ("turns",) if len(required) == 1 else ("asked", "answered")
        columns = self.columns
        slots = {slot: columns.get(name, name) for slot, name in zip(names, required, strict=True)}
        for name in optional:
            slot = slot_of(name)
            if slot and (name in columns or (format != "prompt_completion" and not is_empty(record.get(name)))):
                slots[slot] = columns.get(name, name)
        return slots

    def _useless(
        self, record: Mapping[str, Any], format: DataFormat, is_plain: bool, useless: Sequence[str], where: str
    ) -> str:
        columns, template = self.columns, self.template
        first, ways = COLUMNS[format][0][0], []
        if not any(name in template for name in (*useless, *COLUMNS[format][0])):
            slots = {} if format == "text" else self._slots(record, format)
            made = chat_columns(slots | {slot_of(name) or name: columns[name] for name in useless if slots})
            if {columns[name] for name in useless} <= set(made.values()):
                ways.append(f"To have it read, through the chat template: {settings_line(made, ignore=self.ignored)}.")
            if format not in _OF_TURNS:
                rest = {name: path for name, path in columns.items() if name not in (first, *useless)}
                fields = [*(columns[name] for name in useless), columns.get(first, first)]
                text = "\n\n".join(f"{{{path}}}" for path in fields)
                ways.append(f"To write it before the {first}: {settings_line(rest, {first: text}, self.ignored)}.")
        rest = {name: path for name, path in columns.items() if name not in useless}
        ignored = [path.partition(".")[0].removesuffix("?") for name, path in columns.items() if name in useless]
        ignored = [name for name in ignored if has_meaning(name)]
        if line := settings_line(
            rest, {name: text for name, text in template.items() if name not in useless}, [*self.ignored, *ignored]
        ):
            ways.append(f"Without it: {line}.")
        kind = "plain prompt and completion" if is_plain else f"{format} rows"
        return (
            f"{where}: {listed(useless)} is made by data.columns or data.template, but {kind} have no place for it. "
            f"{' '.join(ways)}"
        )


def _is_read_already(name: str, value: Any, row: Row) -> bool:
    """Return True if a column repeats what is read: one turn's text, or the whole row written out once more."""
    if is_mark(name) or not (isinstance(value, str) or is_context(name)):
        return False
    match row:
        case Conversation(messages):
            said = [
                ("answered" if message.role == "assistant" else message.role, message.content) for message in messages
            ]
        case PromptCompletion(prompt, completion):
            said = [("user", prompt), ("answered", completion)]
        case Document():
            return False
    if is_context(name):
        return all(any(role != "answered" and one in text for role, text in said) for one in _strings(value))
    stripped = value.strip()
    slot = slot_of(name)
    if slot in ("asked", "answered"):
        return any(role == ("user" if slot == "asked" else slot) and stripped == text.strip() for role, text in said)
    pieces = [piece.strip() for _, text in said for piece in text.split("\n\n")]
    return name.lower() == "text" and stripped.endswith(pieces[-1]) and all(piece in value for piece in pieces)


def _strings(value: Any) -> list[str]:
    """List the texts of a value, those of its lists and objects among them."""
    if isinstance(value, list | Mapping):
        items = value.values() if isinstance(value, Mapping) else value
        return [one for item in items for one in _strings(item)]
    return [str(value).strip()]


def _it(names: Collection[str]) -> str:
    return "it" if len(names) == 1 else "them"
