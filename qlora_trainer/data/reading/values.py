"""Check values of a row as a user sees them: text that must be text, JSON written as text; and name what was found.

Every error here is about one value of one row; `where` and the column's name come from the caller. Left out: which
columns there are (formats/detect.py), and what a turn is (formats/turns.py).
"""

import json
import math
from collections.abc import Iterable
from typing import Any

from qlora_trainer.common.errors import DataError

MOST_LEVELS = 100  # of lists and objects in each other


def text(value: Any, column: str, where: str) -> str:
    """Return a value that must be text of whole characters.

    Args:
        value: of a column.
        column: its name, for errors.
        where: file and line, for errors.

    Returns:
        The text.

    Raises:
        DataError: it is something else, or holds half of a surrogate pair, which no file can hold as text.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: {column} should be text, and is {kind(value)}.{_way_out(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: {column} holds half of a character (a lone surrogate) at character {error.start}. The text "
                "was cut or converted wrongly there."
            ) from error
    return value


def optional_text(value: Any, column: str, where: str) -> str:
    """Return text that may be absent; a DataError says that it is something else.

    Args:
        value: of a column.
        column: its name, for errors.
        where: file and line, for errors.

    Returns:
        The text; "" for None.
    """
    return "" if value is None else text(value, column, where)


def json_text(value: Any, column: str, where: str) -> str:
    """Write a value as JSON text, not escaped beyond need.

    Args:
        value: of a column.
        column: its name, for errors.
        where: file and line, for errors.

    Returns:
        The text.

    Raises:
        DataError: JSON cannot hold it.
    """
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {column} cannot be written as JSON: {error}.") from error
    return text(written, column, where)


def from_json_text(value: str, column: str, where: str) -> Any:
    """Read what a JSON text says.

    Args:
        value: the text.
        column: its name, for errors.
        where: file and line, for errors.

    Returns:
        The value.

    Raises:
        DataError: it is no JSON, with the place in it.
    """
    try:
        found = json.loads(value)
        check_depth(found, value)
        return found
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {column} should be JSON, and is not: {error}; it begins {value[:60]!r}.") from error


def check_depth(value: Any, text: str, begin: int = 0, end: int | None = None) -> None:
    """Refuse a value of a JSON text that is nested too deeply to be walked through by recursion, as templates do.

    Brackets are counted first, since that is fast and settles most.

    Args:
        value: what the text holds.
        text: JSON.
        begin: the character where the value begins.
        end: the character where it ends; None for the text's end.

    Raises:
        RecursionError: it is.
    """
    brackets = text.count("[", begin, end) + text.count("{", begin, end)
    if brackets > MOST_LEVELS and _is_deeper(value, MOST_LEVELS):
        raise RecursionError(f"lists and objects are nested more than {MOST_LEVELS} deep")


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    return levels == 0 or any(_is_deeper(v, levels - 1) for v in (value.values() if isinstance(value, dict) else value))


def without_nulls(value: Any) -> Any:
    """Leave out null keys: a table gives every struct the keys of all, null where a row has none.

    Args:
        value: nested lists and objects.

    Returns:
        The same without them.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def kind(value: Any) -> str:
    """Say what a value is, in a user's words.

    Args:
        value: of any type.

    Returns:
        Such as "a list", or "the int 5".
    """
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    if name := names.get(type(value)):
        return name
    shown = repr(value[:60] if isinstance(value, bytes) else value)
    return f"the {type(value).__name__} {shown if len(shown) <= 60 else shown[:58] + '...'}"


def listed(names: Iterable[Any]) -> str:
    """List names for an error message.

    Args:
        names: of columns, say.

    Returns:
        Commas between them; "nothing" where there are none.
    """
    return ", ".join(str(name) for name in names) or "nothing"


def shortened(names: Iterable[str], most: int = 6) -> str:
    """List names for a message, the first few of many; one of white space alone is in quotes.

    Args:
        names: of columns, say.
        most: how many are shown.

    Returns:
        Such as "a, b and 3 more".
    """
    shown = [name if name.strip() else repr(name) for name in names]
    more = len(shown) - most
    return listed(shown[:most]) + (f" and {more:,} more" if more > 0 else "")


def _way_out(value: Any) -> str:
    if isinstance(value, float) and math.isnan(value):
        return " Where there is no value, write null or leave the column out."
    return ""
