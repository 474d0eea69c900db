"""A row survives its way through JSON, whatever it holds."""

import json

import pytest

from qlora_trainer.data.types import (
    Conversation,
    Document,
    Message,
    PromptCompletion,
    Row,
    ToolCall,
    row_from_json,
    row_to_json,
)

ROWS: list[Row] = [
    Document("text"),
    PromptCompletion("a", ""),
    Conversation((Message("user", "hi"), Message("assistant", "", learn=False, reasoning="because"))),
    Conversation(
        (
            Message("assistant", "", tool_calls=(ToolCall("f", '{"a": 1}', id="1"), ToolCall("g", "{}"))),
            Message("tool", "3", tool_call_id="1", name="f"),
        ),
        tools=('{"name": "f"}',),
    ),
]


@pytest.mark.parametrize("row", ROWS)
def test_a_row_comes_back_from_json_as_it_was(row: Row) -> None:
    assert row_from_json(json.loads(json.dumps(row_to_json(row)))) == row


def test_json_of_a_row_has_no_defaults() -> None:
    assert row_to_json(ROWS[2]) == {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "", "learn": False, "reasoning": "because"},
        ]
    }
