"""One turn becomes one message, whatever its file calls things; what cannot be trained on is refused by name."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.formats.turns import has_unread_call, read_turn, read_turns, turns_in_text, turns_of
from qlora_trainer.data.types import Message, ToolCall

CALL = ToolCall("f", '{"a": 1}', id="c1")
BOT = {"role": "assistant"}
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=4), st.lists, max_leaves=4)


def turn(**keys):
    return read_turn(keys, "line 1, messages[0]")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"role": "developer", "content": "s"}, Message("system", "s")),
        ({"role": "User", "content": "q"}, Message("user", "q")),
        ({"from": "human", "value": "q"}, Message("user", "q")),
        ({"from": "bot", "value": "a"}, Message("assistant", "a")),
        ({"role": "model", "content": "a"}, Message("assistant", "a")),
        ({"role": "function", "name": "f", "content": "3"}, Message("tool", "3", name="f")),
        ({"role": "ipython", "content": "3"}, Message("tool", "3")),
        ({"from": "observation", "value": {"x": [1, "é"]}}, Message("tool", '{"x": [1, "é"]}')),
        ({"role": "tool", "content": [], "tool_call_id": "c1"}, Message("tool", "[]", tool_call_id="c1")),
        ({**BOT, "content": [{"type": "text", "text": "a"}, "b"]}, Message("assistant", "ab")),
        ({"role": "user", "content": [{"type": "text", "text": "q", "image_url": None}]}, Message("user", "q")),
        ({**BOT, "content": "a", "reasoning_content": "r"}, Message("assistant", "a", reasoning="r")),
        ({**BOT, "content": "a", "thinking": "r", "reasoning_content": None}, Message("assistant", "a", reasoning="r")),
        (
            {**BOT, "content": [{"type": "thinking", "thinking": "r"}, {"type": "text", "text": "a"}]},
            Message("assistant", "a", reasoning="r"),
        ),
        (
            {**BOT, "content": [{"type": "reasoning", "text": "r"}, {"type": "output_text", "text": "a"}], "weight": 1},
            Message("assistant", "a", reasoning="r", learn=True),
        ),
    ],
)
def test_a_turn_is_read_in_any_naming(given, message):
    assert turn(**given) == message


@pytest.mark.parametrize(
    "keys",
    [
        {"tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]},
        {"tool_calls": [{"id": "c1", "name": "f", "arguments": {"a": 1}, "function": None}]},
        {"tool_calls": '[{"id": "c1", "name": "f", "arguments": {"a": 1}}]', "content": None},
        {"tool_calls": [{"id": "c1", "name": "f", "parameters": {"a": 1}}], "content": ""},
    ],
)
def test_calls_are_read_in_every_shape_with_content_null_or_absent(keys):
    assert turn(**BOT, **keys) == Message("assistant", "", tool_calls=(CALL,))


def test_calls_may_follow_text_and_have_no_arguments():
    first = {"function": {"name": "f", "arguments": ""}}
    assert turn(**BOT, content="so", tool_calls=[first, {"name": "g", "arguments": None}]) == Message(
        "assistant", "so", tool_calls=(ToolCall("f", "{}"), ToolCall("g", "{}"))
    )
    assert turn(**BOT, content=None, function_call={"name": "f", "arguments": "{}"}) == Message(
        "assistant", "", tool_calls=(ToolCall("f", "{}"),)
    )


@settings(max_examples=60)
@given(st.lists(st.tuples(st.text(max_size=4), st.dictionaries(st.text(max_size=3), VALUES)), min_size=1, max_size=3))
def test_a_call_written_as_text_is_the_call_whatever_its_arguments(calls):
    """ShareGPT's function_call: one call, or a list of them, as JSON text or as JSON."""
    written = [{"name": name, "arguments": arguments} for name, arguments in calls]
    for value in [json.dumps(written), written] + ([json.dumps(written[0]), written[0]] if len(calls) == 1 else []):
        message = turn(**{"from": "function_call", "value": value})
        assert [(call.name, json.loads(call.arguments)) for call in message.tool_calls] == calls
        assert message.content == ""


@pytest.mark.parametrize(
    "value",
    ["{}", "f(a=1)", '{"name": "Bob"}', '{"name": "f", "arguments": [1]}', "[]", '{"name": "f", "args": {}}', ""],
)
def test_a_call_turn_that_holds_no_json_call_keeps_its_text(value):
    given = {"from": "function_call", "value": value}
    assert turn(**given) == Message("assistant", value)
    assert has_unread_call([given]) == bool(value)


def test_calls_that_are_read_and_text_that_is_meant_are_no_unread_calls():
    call = {"name": "f", "arguments": {}}
    for said in (
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "function_call", "value": call},
        {"role": "function_call", "content": "so", "tool_calls": [call]},
        {"from": "gpt", "value": "{broken"},
        {"from": None},
        "no turn",
    ):
        assert not has_unread_call([said])
    assert not has_unread_call("text")


@pytest.mark.parametrize(
    "text",
    [
        "[1] see below",
        '[{"role": "user", "content": "q"}',
        '[{"role": "robot", "content": "q"}]',
        '[{"role": "user"}]',
        '[{"name": "f", "arguments": {}}]',
        '{"role": "user", "content": "q"}',
        '[{"role": "user", "content": "q"}, 5]',
    ],
)
def test_a_text_that_is_not_the_json_of_turns_stays_text(text):
    assert turns_in_text(text) == text


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"role": "tool"}, r"content is missing; the turn holds role"),
        ({**BOT, "content": None, "tool_calls": []}, r"content is null"),
        ({**BOT, "content": None, "reasoning_content": "r"}, r"content is null"),
        ({**BOT, "tool_calls": [{}]}, r"tool_calls\[0\]: should be an object with name and arguments"),
        ({**BOT, "tool_calls": ["f"]}, r"tool_calls\[0\]: should be an object with name and arguments"),
        ({**BOT, "tool_calls": {"name": "f"}}, r"tool_calls should be a list, and is an object"),
        ({**BOT, "tool_calls": [{"type": "web_search"}]}, r"is of type 'web_search'; only calls of functions"),
        ({**BOT, "tool_calls": [{"name": "f", "arguments": "a=1"}]}, r"arguments should be JSON, and is not"),
        ({**BOT, "tool_calls": [{"name": "f", "arguments": "[1]"}]}, r"should be a JSON object .* and is a list"),
        ({**BOT, "tool_calls": [{"name": "f", "arguments": {"a": float("nan")}}]}, r"cannot be written as JSON"),
        ({**BOT, "tool_calls": [{"name": "f", "arguments": {"a": "\ud800"}}]}, r"half of a character"),
        ({**BOT, "tool_calls": [{"name": "f", "arguments": '{"a": "\\ud800"}'}]}, r"half of a character"),
        ({**BOT, "tool_calls": [{"name": "f", "arguments": '{"a": NaN}'}]}, r"cannot be written as JSON"),
        ({"role": "user", "content": "q", "tool_calls": [{"name": "f"}]}, r"tool_calls in a turn of user"),
        ({"role": "user", "content": "q", "thinking": "t"}, r"reasoning in a turn of user"),
        ({**BOT, "content": [{"type": "image_url", "image_url": {}}]}, r"holds a part of type 'image_url'"),
        ({**BOT, "content": [{"type": "tool_use"}]}, r"tool_calls\[0\]: should be an object with name"),
        (
            {**BOT, "content": [{"type": "text", "cache": 1}]},
            r"a text part of content has no text; it holds type, cache",
        ),
        ({**BOT, "content": [5]}, r"holds a part of type 'the int 5'"),
        (
            {**BOT, "content": [{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "r"}]},
            r"a thinking part after text",
        ),
        ({**BOT, "content": "a", "thinking": "r", "reasoning_content": "s"}, r"two different texts of reasoning"),
        ({"role": "user", "content": "<image>", "images": ["x.png"]}, r"images cannot be trained on, only text"),
        ({"role": "robot", "content": "q"}, r"unknown role 'robot'; known are system, user"),
        ({"content": "q"}, r"role is missing or null"),
    ],
)
def test_a_turn_that_cannot_be_trained_from_says_where_and_why(keys, words):
    with pytest.raises(DataError, match=r"line 1, messages\[0\].*" + words):
        turn(**keys)


def test_turns_given_as_text_are_json():
    assert turns_of(' [{"role": "user"}]', "messages", "line 1") == [{"role": "user"}]
    with pytest.raises(DataError, match=r"line 1: messages should be JSON, and is not.*it begins \"\[{'role'"):
        turns_of("[{'role': 'user'}]", "messages", "line 1")
    with pytest.raises(DataError, match=r"line 1: messages should be a list of turns, and is text"):
        read_turns(turns_of("hi", "messages", "line 1"), "messages", "line 1")
