import pytest

from qlora_trainer.data.formats import parse_record
from qlora_trainer.data.messages import Conversation, Document, Message, PromptCompletion
from qlora_trainer.errors import DataError

ASKED = (Message("user", "q"), Message("assistant", "a"))


def parse(record, format="auto", columns=None):
    return parse_record(record, format, columns or {}, "rows.jsonl, line 3")


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, ASKED),
        ({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, ASKED),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ASKED),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            (Message("system", "s"), *ASKED),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": "{}"},
                    {"from": "observation", "value": "r"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            (Message("user", "q"), Message("assistant", "{}"), Message("tool", "r"), Message("assistant", "a")),
        ),
        ({"instruction": "q", "input": "", "output": "a"}, ASKED),
        ({"instruction": "q", "output": "a", "text": "whole"}, ASKED),
        ({"instruction": "q", "input": "x", "output": "a"}, (Message("user", "q\n\nx"), ASKED[1])),
        (
            {"instruction": "q", "input": None, "output": "a", "system": "s", "history": [["q0", "a0"]]},
            (Message("system", "s"), Message("user", "q0"), Message("assistant", "a0"), *ASKED),
        ),
        ({"question": "q", "answer": "a"}, ASKED),
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
            (Message("user", "q", learn=False), ASKED[1]),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]},
                          {"role": "assistant", "content": "a", "weight": 0}, {"role": "assistant", "content": "b",
                                                                              "train": True}]},
            (Message("user", "q!"), Message("assistant", "a", learn=False), Message("assistant", "b", learn=True)),
        ),
    ],
)  # fmt: skip
def test_every_chat_like_format_becomes_messages(record, messages):
    assert parse(record) == Conversation(messages)


def test_plain_texts_stay_plain():
    assert parse({"text": "t"}) == Document("t")
    assert parse({"prompt": "p ", "completion": "c"}) == PromptCompletion("p ", "c")


def test_columns_are_renamed_and_the_renamed_ones_decide_the_format():
    assert parse({"query": "q", "reply": "a"}, columns={"question": "query", "answer": "reply"}) == Conversation(ASKED)
    record = {"text": "t", "a": "p", "b": "c"}
    assert parse(record, columns={"prompt": "a", "completion": "b"}) == PromptCompletion("p", "c")
    both = {"messages": [], "q": "q", "r": "a"}
    assert parse(both, columns={"question": "q", "answer": "r"}) == Conversation(ASKED)
    moved = {"input": "q", "output": "a"}
    assert parse(moved, columns={"instruction": "input", "output": "output"}) == Conversation(ASKED)
    swapped = {"prompt": "c", "completion": "p"}
    assert parse(swapped, columns={"prompt": "completion", "completion": "prompt"}) == PromptCompletion("p", "c")


def test_a_named_format_is_used_though_columns_suggest_another():
    assert parse({"text": "t", "prompt": "p", "completion": "c"}, "text") == Document("t")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert parse({"conversations": turns}, "chat") == parse({"messages": turns}, "sharegpt") == Conversation(ASKED)


USER = {"role": "user", "content": "q"}
BOT = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("record", "format", "words"),
    [
        ({"foo": 1, "bar": 2}, "auto", r"columns foo, bar are of no known format.*alpaca \(instruction, output"),
        ({"prompt": "p"}, "prompt_completion", r"completion is missing or null.*the row has prompt"),
        ({"question": "q", "answer": 72}, "auto", r"answer should be text, and is the int 72"),
        ({"messages": []}, "auto", r"conversation is empty"),
        ({"messages": [USER]}, "auto", r"no assistant turn to learn from, only user"),
        ({"messages": "hi"}, "auto", r"messages should be a list of turns, and is text"),
        ({"messages": [USER, "hi"]}, "auto", r"messages\[1\]: a turn should be an object"),
        ({"messages": [{"role": "robot", "content": "q"}, BOT]}, "auto", r"messages\[0\]: unknown role 'robot'; known"),
        ({"messages": [{"role": ["user"], "content": "q"}, BOT]}, "auto", r"unknown role \['user'\]"),
        ({"messages": [{"role": "user"}, BOT]}, "auto", r"messages\[0\]: content is missing or null"),
        (
            {"messages": [USER, {"role": "assistant", "content": 5}]},
            "auto",
            r"content should be text, and is the int 5",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, BOT]},
            "auto",
            r"part of type 'image_url'",
        ),
        (
            {"messages": [USER, BOT | {"content": None, "tool_calls": [{}]}]},
            "auto",
            r"tool_calls cannot be rendered yet",
        ),
        ({"messages": [USER, BOT | {"weight": 0.5}]}, "auto", r"weight is 0.5 and should be 0 or 1"),
        ({"messages": [USER, BOT | {"weight": 0, "train": True}]}, "auto", r"weight, train contradict"),
        ({"messages": [USER, BOT], "label": False}, "auto", r"look like preferences"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "auto", r"chosen and rejected hold preferences"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "auto", r"history should be a list of"),
        ({"prompt": {"a": 1}, "completion": "c"}, "auto", r"prompt should be text, and is an object"),
        ({"prompt": 3, "completion": [BOT]}, "auto", r"prompt should be text, and is the int 3"),
        ({"text": "half \ud800 pair"}, "auto", r"text holds half of a surrogate pair at character 5"),
    ],
)
def test_a_row_that_cannot_be_used_says_where_and_why(record, format, words):
    with pytest.raises(DataError, match=f"(?s)rows.jsonl, line 3.*{words}"):
        parse(record, format)


def test_wrong_column_mappings_are_named():
    with pytest.raises(DataError, match=r"data.columns wants query, but the row has q"):
        parse({"q": "x"}, columns={"prompt": "query"}, format="prompt_completion")
    with pytest.raises(DataError, match=r"data.columns names promt, which no format has; known are"):
        parse({"q": "x"}, columns={"promt": "q"}, format="prompt_completion")
