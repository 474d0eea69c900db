"""List what files call a turn's speaker and the keys of a turn, so that a conversation is found by all that is read.

Left out: reading a turn (formats/turns.py), and where in a file conversations are (reading/json_layouts.py).
"""

from collections.abc import Mapping
from typing import Any

from qlora_trainer.data.types import ROLES

# {name of a speaker in lower case: role}
ROLE_NAMES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool_calls": "assistant",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "function_response": "tool",
}
SPEAKER_KEYS = ("role", "from", "speaker")
_CONTENT_KEYS = ("content", "value", "parts", "text", "message")
_CALL_KEYS = ("tool_calls", "function_call")


def naming(turn: Mapping[str, Any]) -> tuple[str, str]:
    """Find the keys that say who speaks, and what.

    Args:
        turn: an object.

    Returns:
        Both keys; the usual ones where the turn has none.
    """
    speaker = next((key for key in SPEAKER_KEYS if key in turn), SPEAKER_KEYS[0])
    content = "value" if speaker == "from" else "content"
    if turn.get(content) is None:
        content = next((key for key in _CONTENT_KEYS if turn.get(key) is not None), content)
    return speaker, content


def is_turn(value: Any) -> bool:
    """Return True if a value is a turn of a conversation, in any naming: someone who is known says or calls something.

    Args:
        value: of JSON.

    Returns:
        True if it is.
    """
    if not isinstance(value, Mapping):
        return False
    speaker, content = naming(value)
    name = value.get(speaker)
    is_known = isinstance(name, str) and name.lower() in ROLE_NAMES
    return is_known and any(value.get(key) is not None for key in (content, *_CALL_KEYS))
