"""Contents in parts are read in every shape: text under its several keys, calls of tools and their results."""

import json

import pytest

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.formats.calls import read_tools
from qlora_trainer.data.formats.turns import read_turns
from qlora_trainer.data.types import Message, ToolCall

CALL = ToolCall("get_weather", '{"city": "Paris"}', "t1")
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


def turns(*given):
    return read_turns(list(given), "messages", "line 1")


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "text", "text": "hi"}],
        [{"type": "text", "value": "hi"}],
        [{"type": "text", "content": "hi"}],
        [{"text": "hi"}],
        [{"text": "h"}, "i"],
        [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}],
        [{"type": "input_text", "text": "hi"}],
    ],
)
def test_text_is_read_from_every_shape_of_a_part(parts):
    assert turns({"role": "user", "content": parts}, {"role": "user", "parts": parts}) == [Message("user", "hi")] * 2


@pytest.mark.parametrize(
    ("call", "result"),
    [
        (
            {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Paris"}},
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "15 degrees"}]},
        ),
        (
            {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Paris"}},
            {"type": "tool_result", "tool_use_id": "t1", "content": "15 degrees"},
        ),
        (
            {"toolUse": {"toolUseId": "t1", "name": "get_weather", "input": {"city": "Paris"}}},
            {"toolResult": {"toolUseId": "t1", "content": [{"text": "15 degrees"}], "status": "success"}},
        ),
    ],
)
def test_calls_and_results_among_the_parts_are_calls_and_turns_of_tools(call, result):
    assert turns(
        {"role": "assistant", "content": [{"type": "text", "text": "I look."}, call]},
        {"role": "user", "content": [result, {"type": "text", "text": "And now?"}], "train": False},
    ) == [
        Message("assistant", "I look.", tool_calls=(CALL,)),
        Message("tool", "15 degrees", tool_call_id="t1", learn=False),
        Message("user", "And now?", learn=False),
    ]


def test_geminis_calls_and_results_are_read():
    assert turns(
        {"role": "model", "parts": [{"functionCall": {"name": "f", "args": {"a": 1}}}]},
        {"role": "user", "parts": [{"functionResponse": {"name": "f", "response": {"b": 2}}}]},
        {"role": "model", "parts": [{"text": "so", "thought": True}, {"text": "done"}]},
    ) == [
        Message("assistant", "", tool_calls=(ToolCall("f", '{"a": 1}'),)),
        Message("tool", '{"b": 2}', name="f"),
        Message("assistant", "done", reasoning="so"),
    ]


@pytest.mark.parametrize(
    "tool",
    [
        {"name": "f", "description": "d", "input_schema": SCHEMA},
        {"toolSpec": {"name": "f", "description": "d", "inputSchema": {"json": SCHEMA}}},
        {"functionDeclarations": [{"name": "f", "description": "d", "parameters": SCHEMA}]},
    ],
)
def test_tools_of_other_makers_have_the_one_shape(tool):
    (found,) = read_tools([tool], "tools", "line 1")
    function = {"name": "f", "description": "d", "parameters": SCHEMA}
    assert json.loads(found) == {"type": "function", "function": function}


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "text", "words": "hi"}, "a text part of content has no text; it holds type, words"),
        ({"type": "image", "source": {}}, "content holds a part of type 'image'; only text can be trained on"),
        ({"inlineData": {}}, "content holds a part of type 'inlineData'"),
        ({"type": "text", "text": 5}, "a text part of content should be text, and is the int 5"),
    ],
)
def test_a_part_that_is_no_text_is_named(part, words):
    with pytest.raises(DataError, match=words):
        turns({"role": "assistant", "content": [part]})


def test_text_after_a_call_is_refused():
    parts = [{"type": "tool_use", "id": "t", "name": "f", "input": {}}, {"type": "text", "text": "so"}]
    with pytest.raises(DataError, match="text after a call of a tool"):
        turns({"role": "assistant", "content": parts})


@pytest.mark.parametrize(
    "key", ["weight", "loss_weight", "train", "training", "trainable", "train_on_turn", "loss", "learn"]
)
def test_what_a_turn_says_of_its_training_is_read_under_every_certain_name(key):
    for value, learn in ((0, False), (0.0, False), (False, False), (1, True), (1.0, True), (True, True), (None, None)):
        assert turns({"role": "assistant", "content": "a", key: value}) == [Message("assistant", "a", learn=learn)]
    with pytest.raises(DataError, match=f"{key} is 0.5 and should be"):
        turns({"role": "assistant", "content": "a", key: 0.5})


def test_a_masked_turn_is_not_trained():
    assert [turn.learn for turn in turns(*({"role": "user", "content": "q", "masked": m} for m in (True, False)))] == [
        False,
        True,
    ]
