"""Write a setting as it is pasted into a shell, such as 'data.columns={question: Question}', for error messages.

Whatever a column is called, the shell and YAML read back the same name. Left out: reading settings (load.py).
"""

import json
import shlex
from functools import lru_cache
from typing import Any


def override(key: str, value: Any) -> str:
    """Write `section.key=value` with the value as YAML on one line, quoted for a shell.

    Args:
        key: of the config.
        value: text, numbers, booleans, null, or lists and mappings of these.

    Returns:
        One word of a shell's command line.
    """
    written = f"{key}={_flow(value)}"
    return shlex.quote(written) if "'" in written else f"'{written}'"


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(name)}: {_flow(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return _scalar(value) if isinstance(value, str) else json.dumps(value)


@lru_cache(maxsize=1024)  # half a millisecond each, and the messages of bad rows ask for the same words again
def _scalar(text: str) -> str:
    """Write text plainly where YAML reads it as that text, in quotes otherwise."""
    escaped = "".join(char if char.isalnum() and char.isascii() else f"\\U{ord(char):08x}" for char in text)
    candidates = (text, json.dumps(text, ensure_ascii=False), f'"{escaped}"')
    return next((written for written in candidates if _is_read_as(written, text)), candidates[-1])


def _is_read_as(written: str, text: str) -> bool:
    import yaml

    try:
        return bool(yaml.safe_load(f"{{{written}: [{written}, a]}}") == {text: [text, "a"]})
    except (yaml.YAMLError, ValueError):
        return False
