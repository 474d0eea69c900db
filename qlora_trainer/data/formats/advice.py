"""Suggest the line of settings that makes columns of other names ours, as it is pasted into a shell.

What a column is for is taken from its name, its capitals and signs left aside, and from its value; of two texts of
unknown names, the first is taken to be asked and the second to be answered. Left out: which names there are
(meanings.py), and when a line is printed (detect.py, unread.py).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from qlora_trainer.config.override import override
from qlora_trainer.data.formats.meanings import (
    SLOTS,
    has_meaning,
    is_choices,
    is_class,
    is_empty,
    is_mark,
    is_metadata,
    plain_name,
    slot_of,
    words_of,
)
from qlora_trainer.data.turn_names import SPEAKER_KEYS, is_turn, naming

_Record = Mapping[str, Any]
_TEXT_KEYS = ("text", "content", "value", "answer", "parts")
_MOST_LEVELS = 4


def settings_line(
    columns: Mapping[str, str], template: Mapping[str, str] | None = None, ignore: Iterable[str] = ()
) -> str:
    """Write the settings of columns that belong together.

    Args:
        columns: {our column: path}; those of the same name are left out where others remain.
        template: {our column: text with fields}.
        ignore: columns to leave out.

    Returns:
        One line, of several words for a shell.
    """
    given = [("data.columns", dict(columns)), ("data.template", dict(template or {})), ("data.ignore", list(ignore))]
    return " ".join(override(key, value) for key, value in given if value)


def text_path(name: str, value: Any, depth: int = 0) -> str | None:
    """Find where the text of a column is.

    Args:
        name: of the column, or the path that led here.
        value: at that path.
        depth: of the path.

    Returns:
        The path of a text in it; None where there is none.
    """
    if is_choices(name.rpartition(".")[2]):
        return None  # the first choice is no answer
    if isinstance(value, str):
        return name
    if depth == _MOST_LEVELS:
        return None
    if isinstance(value, list):
        return text_path(f"{name}.0", value[0], depth + 1) if value else None
    if isinstance(value, Mapping):
        keys = [key for key in _TEXT_KEYS if key in value] or (list(value) if len(value) == 1 else [])
        found = (text_path(f"{name}.{key}", value[key], depth + 1) for key in keys)
        return next((path for path in found if path), None)
    return None


def holds_turns(value: Any) -> bool:
    """Return True if a value is a list of turns, in any naming of roles.

    Args:
        value: of a column.

    Returns:
        True if it has turns, and nothing else.
    """
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, Mapping) and any(key in turn for key in SPEAKER_KEYS) for turn in value)
    )


def one_turn(record: _Record) -> str:
    """Say that a row is one turn of a conversation, as in the files of OASST, and what to make of such rows.

    Args:
        record: a row's columns.

    Returns:
        A sentence or two; "" for another row, such as one with an answer, or with more than a name next to its text.
    """
    speaker, content = naming(record)
    if not isinstance(record.get(speaker), str) or is_empty(record.get(content)):
        return ""
    others = [name for name, value in record.items() if name not in (speaker, content) and not is_empty(value)]
    if any(slot_of(name) in ("asked", "answered") and has_meaning(name) for name in others):
        return ""
    if not is_turn(record) and any(not is_metadata(name) and not is_mark(name) for name in others):
        return ""
    parent = next((name for name in record if words_of(name)[:1] == ("parent",)), None)
    tree = f" They are a tree by {parent}: each way from its root to a last answer is a conversation." * bool(parent)
    return (
        f"{speaker} and {content} may be one turn of a conversation, and a row should hold them all: join the turns of "
        f"a conversation into one row with a column messages first.{tree}"
    )


def slots_of(record: _Record, but: Iterable[str] = ()) -> dict[str, str]:
    """Find what the columns of a row are for.

    Args:
        record: a row's columns.
        but: names of columns to leave aside.

    Returns:
        {slot: path}, at most one path a slot: "turns", or a key of meanings.SLOTS.
    """
    left = {name: value for name, value in record.items() if value not in (None, [], {}) and name not in set(but)}
    if turns := next((name for name, value in left.items() if holds_turns(value)), None):
        system = _taken(left, "system")
        return {"turns": turns, **({"system": system} if system else {}), **_tools(left)}
    for name, value in list(left.items()):
        if not is_choices(name):
            left |= _inner_columns(name, value)
    found: dict[str, str] = {}
    for slot in ("asked", "answered", "context", "system"):
        if path := _taken(left, slot):
            found[slot] = path
    if isinstance(left.get("history"), list):
        found["history"] = "history"
    return found | _tools(left)


def _tools(left: dict[str, Any]) -> dict[str, str]:
    name = next((name for name in left if slot_of(name) == "tools"), None)
    return {"tools": name} if name else {}


def _inner_columns(name: str, value: Any, depth: int = 0) -> dict[str, Any]:
    """List the fields of an object, or of the first one of a list, by their paths."""
    if isinstance(value, list) and value and depth < _MOST_LEVELS:
        return _inner_columns(f"{name}.0", value[0], depth + 1)
    if not isinstance(value, Mapping) or depth == _MOST_LEVELS:
        return {}
    inner = {f"{name}.{key}": item for key, item in value.items() if item is not None and not is_choices(key)}
    return inner | {
        path: deep for key, item in inner.items() for path, deep in _inner_columns(key, item, depth + 1).items()
    }


def _taken(left: dict[str, Any], slot: str) -> str | None:
    """Take the first column by the order of a slot's names whose value has text, and return the path of that."""
    plain = {plain_name(name.rpartition(".")[2]): name for name in reversed(left)}
    for usual in SLOTS[slot]:
        name = plain.get(usual)
        if name in left and (path := text_path(name, left[name])):
            del left[name]
            return path
    return None


def chat_columns(slots: Mapping[str, str]) -> dict[str, str]:
    """Map what is asked and answered to the columns of a format that goes through the chat template.

    Args:
        slots: from `slots_of`.

    Returns:
        {our column: path}; nothing where there is no question or no answer.
    """
    if "turns" in slots:
        names = {"turns": "messages", "system": "system", "tools": "tools"}
    elif "asked" not in slots or "answered" not in slots:
        return {}
    elif "context" in slots or "history" in slots:
        names = {"asked": "instruction", "context": "input", "answered": "output"}
    else:
        names = {"asked": "question", "answered": "answer"}
    names |= {"system": "system", "tools": "tools", "history": "history"}
    made = {names[slot]: path for slot, path in slots.items() if slot in names}
    return {ours: path for ours, path in made.items() if ours != path or ours not in ("system", "tools", "history")}


def near_miss(record: _Record, leftover: Iterable[str] = ()) -> str:
    """Write how a row of no known format can be read.

    Args:
        record: a row's columns.
        leftover: columns that have a meaning, of which those that are not read are left out by the line.

    Returns:
        A sentence or two with lines to paste; "" where there is nothing to go by.
    """
    slots = slots_of(record)
    if turn := one_turn(record):
        content = naming(record)[1]
        columns = {"text": text_path(content, record[content]) or content}
        line = settings_line(columns, ignore=_ignored(leftover, columns, slots))
        return f" {turn} If only {content} is to be trained, as plain text: {line}."
    columns, texts = chat_columns(slots), _texts_of(record)
    pair = dict(zip(("question", "answer"), _in_order(texts), strict=True)) if len(texts) == 2 else {}
    choices = [name for name, value in record.items() if is_choices(name) and not is_empty(value)]
    if choices and "turns" not in slots and (asked := columns or pair):
        ignored = [name for name in _ignored(leftover, asked, slots) if name not in choices]
        return f" Write: {settings_line(*with_fields(asked, choices), ignored)}."
    if columns:
        ignored = _ignored(leftover, columns, slots)
        line = settings_line(columns, ignore=ignored)
        if "turns" in slots or {"context", "system", "history", "tools"} & slots.keys():
            return f" Write: {line}."
        plain = settings_line({"prompt": slots["asked"], "completion": slots["answered"]}, ignore=ignored)
        return f" Through the chat template: {line}; as plain text without it: {plain}."
    if pair:
        line = settings_line(pair, ignore=_ignored(leftover, pair, slots))
        return f" If {pair['answer']} answers {pair['question']}: {line}."
    if len(texts) == 1 and slot_of(texts[0]) in (None, "context"):
        columns = {"text": texts[0]}
        return f" If {texts[0]} is plain text: {settings_line(columns, ignore=_ignored(leftover, columns, slots))}."
    return ""


def _texts_of(record: _Record) -> list[str]:
    """List the columns of text that may be asked or answered."""
    texts = [name for name, value in record.items() if isinstance(value, str) and not is_empty(value)]
    texts = [name for name in texts if not is_metadata(name) and not is_choices(name)]
    return [name for name in texts if not is_mark(name) or is_class(name)]


def with_fields(
    columns: Mapping[str, str], fields: Iterable[str], template: Mapping[str, str] | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """Write columns below what is asked, each after a blank line.

    Args:
        columns: {our column: path}, with a question, instruction or prompt.
        fields: names of the columns, which rows may lack.
        template: {our column: text with fields} so far.

    Returns:
        {our column: path} and {our column: text with fields}.
    """
    asked = next(name for name in ("question", "instruction", "prompt") if name in columns)
    before = template or {}
    first = before.get(asked) or f"{{{columns[asked]}}}"
    text = "\n\n".join((first, *(f"{{{name}?}}" for name in fields)))
    return {name: path for name, path in columns.items() if name != asked}, {**before, asked: text}


def _in_order(texts: list[str]) -> list[str]:
    """Put what is asked first, by the names."""
    return sorted(
        texts,
        key=lambda name: {"asked": 0, "context": 0, "answered": 2}.get(
            "answered" if is_class(name) else slot_of(name) or "", 1
        ),
    )


def _ignored(leftover: Iterable[str], columns: Mapping[str, str], slots: Mapping[str, str]) -> list[str]:
    """Choose the columns that a line leaves out: those that are read neither by the mapping nor by their own name."""
    by_name = {slots[slot] for slot in ("system", "tools", "history") if slot in slots and "text" not in columns}
    read = by_name | {path.partition(".")[0] for path in columns.values()} | {*columns.values(), *columns}
    return [name for name in leftover if name not in read]


def preferred_line(record: _Record, chosen: str, leftover: Iterable[str]) -> str:
    """Write how to train on the preferred answer of a row that has one.

    Args:
        record: a row's columns.
        chosen: the column of the preferred answer.
        leftover: other columns that have a meaning.

    Returns:
        One line.
    """
    answer = record[chosen]
    slots = slots_of(record, but=(chosen, *(name for name in leftover if is_mark(name))))
    asked = slots.get("turns") or slots.get("asked")
    if isinstance(answer, list) and (len(answer) > 1 or (not asked and holds_turns(answer))):
        columns = {"messages": chosen}
    elif not asked:
        columns = {"text": text_path(chosen, answer) or chosen}
    elif "turns" in slots or holds_turns(answer) or (isinstance(answer, Mapping) and "value" in answer):
        columns = {"prompt": asked, "completion": chosen}
    else:
        columns = chat_columns({**slots, "answered": text_path(chosen, answer) or chosen})
    return settings_line(columns, ignore=_ignored(leftover, columns, slots))
