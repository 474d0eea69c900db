"""Rows of every format become messages or texts; a row that cannot says which, why, and what to do."""

import json

import pytest

from qlora_trainer.common.errors import ConfigError, DataError
from qlora_trainer.data.formats.parse import CALL_IS_TEXT, TEXT_IS_TURNS, RecordReader
from qlora_trainer.data.reading.files import open_source
from qlora_trainer.data.types import Conversation, Document, Message, PromptCompletion, ToolCall

ASKED = (Message("user", "q"), Message("assistant", "a"))
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def parse(record, format="auto", columns=None, template=None):
    return RecordReader(format, columns or {}, template or {}).read(record, "rows.jsonl, line 3")


USER = {"role": "user", "content": "q"}
BOT = {"role": "assistant", "content": "a"}


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
        ({"instruction": "q", "output": "a", "text": "### q\n\n### a"}, ASKED),
        ({"instruction": "q", "input": "x", "output": "a"}, (Message("user", "q\n\nx"), ASKED[1])),
        (
            {"instruction": "q", "input": None, "output": "a", "system": "s", "history": [["q0", "a0"]]},
            (Message("system", "s"), Message("user", "q0"), Message("assistant", "a0"), *ASKED),
        ),
        ({"question": "q", "answer": "a"}, ASKED),
        ({"instruction": "q", "context": "", "response": "a", "category": "qa"}, ASKED),
        ({"instruction": "q", "context": "x", "response": "a"}, (Message("user", "q\n\nx"), ASKED[1])),
        ({"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}, ASKED),
        (
            {"system": "s", "messages": [{"role": "system", "content": "s"}, *TURNS]},
            (Message("system", "s"), *ASKED),
        ),
        (
            {"prompt": [USER, BOT, USER], "completion": {"from": "gpt", "value": "b"}},
            (ASKED[0], Message("assistant", "a", learn=False), ASKED[0], Message("assistant", "b")),
        ),
        (
            {"prompt": "q", "completion": [{"role": "assistant", "content": "a", "thinking": "t"}]},
            (Message("user", "q"), Message("assistant", "a", reasoning="t")),
        ),
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
            (Message("user", "q"), ASKED[1]),
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


def test_a_history_and_tools_that_a_table_leaves_empty_are_none():
    given = {"instruction": "q", "output": "a", "history": "", "tools": "null"}
    assert parse(given) == Conversation((Message("user", "q"), Message("assistant", "a")))


def test_plain_texts_stay_plain():
    assert parse({"text": "t"}) == Document("t")
    assert parse({"prompt": "p ", "completion": "c"}) == PromptCompletion("p ", "c")


def test_columns_are_renamed_and_the_renamed_ones_decide_the_format():
    assert parse({"query": "q", "reply": "a"}, columns={"question": "query", "answer": "reply"}) == Conversation(ASKED)
    record = {"text": None, "a": "p", "b": "c"}
    assert parse(record, columns={"prompt": "a", "completion": "b"}) == PromptCompletion("p", "c")
    both = {"messages": [], "q": "q", "r": "a"}
    assert parse(both, columns={"question": "q", "answer": "r"}) == Conversation(ASKED)
    moved = {"input": "q", "output": "a"}
    assert parse(moved, columns={"instruction": "input", "output": "output"}) == Conversation(ASKED)
    swapped = {"prompt": "c", "completion": "p"}
    assert parse(swapped, columns={"prompt": "completion", "completion": "prompt"}) == PromptCompletion("p", "c")


def test_a_named_format_is_used_though_columns_suggest_another():
    reader = RecordReader("text", {}, {}, ignore=["prompt", "completion"])
    assert reader.read({"text": "t", "prompt": "p", "completion": "c"}, "line 1") == Document("t")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert parse({"conversations": turns}, "chat") == parse({"messages": turns}, "sharegpt") == Conversation(ASKED)


@pytest.mark.parametrize(
    ("record", "format", "words"),
    [
        ({"foo": 1, "bar": 2}, "auto", r"columns foo, bar are of no known format.*alpaca \(instruction, output"),
        ({"prompt": "p"}, "prompt_completion", r"completion is missing.*the row has prompt"),
        ({"question": "q", "answer": 72}, "auto", r"answer should be text, and is the int 72"),
        ({"messages": []}, "auto", r"conversation is empty"),
        ({"messages": [USER]}, "auto", r"no assistant turn to train on, only user"),
        ({"messages": "hi"}, "auto", r"messages should be a list of turns, and is text"),
        ({"messages": [USER, "hi"]}, "auto", r"messages\[1\]: a turn should be an object"),
        ({"messages": [{"role": "robot", "content": "q"}, BOT]}, "auto", r"messages\[0\]: unknown role 'robot'; known"),
        ({"messages": [{"role": ["user"], "content": "q"}, BOT]}, "auto", r"unknown role \['user'\]"),
        ({"messages": [{"role": "user"}, BOT]}, "auto", r"messages\[0\]: content is missing"),
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
        ({"messages": [USER, BOT | {"weight": 0.5}]}, "auto", r"weight is 0.5 and should be 0 or 1"),
        ({"messages": [USER, BOT | {"weight": 0, "train": True}]}, "auto", r"weight, train contradict"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "auto", r"history should be a list of"),
        ({"instruction": "q", "output": "a", "history": 5}, "auto", r"history should be a list of"),
        ({"messages": [USER, BOT], "tools": 5}, "auto", r"tools should be a list of functions, and is the int 5"),
        ({"messages": [USER, BOT], "tools": "true"}, "auto", r"tools should be a list .* and is true or false"),
        ({"prompt": "p", "completion": "c", "image": "x.png"}, "auto", r"image cannot be trained on"),
        ({"text": "a cat", "image": {"bytes": "x"}}, "auto", r"image cannot be trained on"),
        ({"prompt": None, "completion": "c"}, "auto", r"completion is there, but prompt is null"),
        ({"prompt": {"a": 1}, "completion": "c"}, "auto", r"prompt: role is missing or null; the turn holds a"),
        ({"prompt": "q", "completion": [USER, BOT]}, "auto", r"begins with a turn of user.*{messages: completion}"),
        ({"messages": [USER, BOT], "images": ["a.png"]}, "auto", r"images cannot be trained on"),
        ({"messages": [{"role": "system", "content": "x"}, USER, BOT], "system": "s"}, "auto", r"another system turn"),
        ({"messages": [USER, BOT], "tools": [{"name": "f"}], "functions": [{"name": "g"}]}, "auto", r"both given"),
        ({"instruction": "q", "input": float("nan"), "output": "a"}, "auto", r"and is NaN. .* write null"),
        ({"question": "q", "answer": ["a"]}, "auto", r"a list. .*'data.columns={answer: answer.0}'"),
        ({"prompt": 3, "completion": [BOT]}, "auto", r"prompt should be text, and is the int 3"),
        ({"text": "half \ud800 pair"}, "auto", r"text holds half of a character .* at character 5"),
    ],
)
def test_a_row_that_cannot_be_used_says_where_and_why(record, format, words):
    with pytest.raises(DataError, match=f"(?s)rows.jsonl, line 3.*{words}"):
        parse(record, format)


def test_wrong_column_mappings_are_named():
    with pytest.raises(DataError, match=r"data.columns prompt takes query, but the row has q"):
        parse({"q": "x"}, columns={"prompt": "query"}, format="prompt_completion")
    with pytest.raises(ConfigError, match=r"data.columns makes promt, which no format has; known are"):
        parse({"q": "x"}, columns={"promt": "q"}, format="prompt_completion")
    with pytest.raises(ConfigError, match=r"data.template makes reply, which no format has"):
        parse({"q": "x"}, template={"reply": "{q}"})
    with pytest.raises(ConfigError, match=r"both make prompt"):
        parse({"q": "x"}, columns={"prompt": "q"}, template={"prompt": "{q}"})
    for ignored in ([], ["id"]):
        with pytest.raises(ConfigError, match=r"data.template has the text '{q': expected '}'"):
            RecordReader("auto", {}, {"text": "{q"}, ignore=ignored).read({"q": "x", "id": 1}, "rows.jsonl, line 3")


def test_tools_are_kept_in_one_shape_from_a_list_or_json():
    bare, whole = '{"name": "f", "parameters": {"a": {"type": "é"}}}', '{"type": "function", "function": {"name": "g"}}'
    kept = ('{"type": "function", "function": ' + bare + "}", whole)
    for tools in (f"[{bare}, {whole}]", json.loads(f"[{bare}, {whole}]"), [bare, whole]):
        for column in ("tools", "functions"):
            row = parse({"messages": TURNS, column: tools})
            assert row == Conversation(ASKED, kept)
    assert parse({"messages": TURNS, "tools": ""}) == parse({"messages": TURNS, "tools": []}) == Conversation(ASKED)
    for wrong in ("[{]", [{"description": "x"}], [5]):
        with pytest.raises(DataError, match=r"line 3: tools"):
            parse({"messages": TURNS, "tools": wrong})


def test_all_rows_of_a_source_have_the_first_ones_format():
    reader = RecordReader("auto", {}, {})
    reader.read({"question": "q", "answer": "a", "id": 1}, "line 1")
    assert reader.read({"question": "q", "answer": "a", "text": None, "system": None}, "line 2") == Conversation(ASKED)
    with pytest.raises(DataError, match=r"line 3: .*missing.*By its columns it is of the format chat, but all"):
        reader.read({"messages": TURNS}, "line 3")
    with pytest.raises(DataError, match=r"line 4: answer is null\."):
        reader.read({"question": "q", "answer": None}, "line 4")
    assert (reader.format, reader.unused) == ("question_answer", {"id": 1})


def test_a_row_of_no_format_decides_nothing():
    reader = RecordReader("auto", {}, {})
    with pytest.raises(DataError):
        reader.read({"foo": 1}, "line 1")
    assert reader.read({"text": "t"}, "line 2") == Document("t")


def reading(record, format="auto", columns=None, template=None):
    reader = RecordReader(format, columns or {}, template or {})
    return reader.read(record, "line 1"), reader


def test_a_call_turn_that_is_trained_as_text_is_counted():
    reader = RecordReader("auto", {}, {})
    good, broken, other = '{"name": "f", "arguments": {}}', '{"name": "f", "argum', '{"name": "f", "input": {}}'
    for said in ([good], [broken, other], [good, other]):
        turns = [{"from": "human", "value": "q"}, *({"from": "function_call", "value": value} for value in said)]
        reader.read({"conversations": turns}, "line 1")
        reader.read({"conversations": json.dumps(turns)}, "line 2")
    assert reader.warnings == {CALL_IS_TEXT: 4}, "rows, not turns"


def test_a_prompt_and_completion_of_turns_as_json_text_are_turns_and_it_is_reported():
    asked, answered = [USER | {"id": 3}], [BOT]
    for prompt, completion in ((asked, answered), ("q", answered), (asked, "a")):
        given = {"prompt": prompt, "completion": completion}
        as_text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
        (expected, plain), (found, reader) = reading(given), reading(as_text)
        assert found == expected == Conversation(ASKED)
        assert reader.unused == plain.unused
        assert (plain.warnings, reader.warnings) == ({}, {TEXT_IS_TURNS: 1})


def test_json_of_turns_stays_text_where_a_template_writes_it():
    given = {"prompt": "Write a dialogue.", "completion": json.dumps(TURNS)}
    with pytest.raises(
        DataError, match=r"begins with a turn of user.*To train on it as text: 'data.template={completion"
    ):
        reading(given)
    row, reader = reading(given, template={"completion": "{completion}"})
    assert row == PromptCompletion("Write a dialogue.", json.dumps(TURNS))
    assert not reader.warnings


def test_what_is_not_read_is_named_columns_and_keys_of_turns_alike():
    turns = [TURNS[0] | {"name": "Ada", "time": 5, "value": ""}, TURNS[1] | {"id": None}]
    for given in (turns, json.dumps(turns)):
        assert unused({"messages": given, "id": 7, "x": None}) == {
            "id",
            "messages[].name",
            "messages[].time",
        }
    columns, template = {"answer": "replies.0"}, {"question": "{title} {body}"}
    record = {"title": "a", "body": "b", "replies": ["c"], "votes": 3}
    assert unused(record, "question_answer", columns, template) == {"votes"}
    assert unused({"prompt": "p", "completion": "c", "system": ""}) == set()


def unused(*given):
    return reading(*given)[1].unused.keys()


def read(path, format="auto", columns=None, template=None, ignore=(), **how):
    reader = RecordReader(format, columns or {}, template or {}, ignore=ignore)
    rows = []
    for where, record in open_source(str(path), **how).records():
        assert isinstance(record, dict)
        rows.append(reader.read(record, where))
    return rows, reader


REAL = {
    "alpaca_en_demo/alpaca_en_demo.json": ("alpaca", 999),
    "c4_demo/c4_demo.jsonl": ("text", 300),
    "e2e/train.jsonl": ("prompt_completion", 547),
    "e2e_facts/train.jsonl": ("chat", 600),
    "fastchat_dummy/dummy_conversation.json": ("sharegpt", 300),
    "glaive_toolcall_en/glaive_toolcall_en_demo.json": ("sharegpt", 150),
    "gsm8k/test.jsonl": ("question_answer", 300),
    "identity/identity.json": ("alpaca", 91),
    "snips_intent/test.jsonl": ("chat", 140),
    "snips_json/test.jsonl": ("chat", 140),
    "tinyshakespeare/input.txt": ("text", 1),
    "torchtune_tiny/alpaca_tiny.json": ("alpaca", 100),
    "wikisql/test.jsonl": ("prompt_completion", 100),
    "wikitext2/test.txt": ("text", 1),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_read_whole_by_their_columns(shared_data, name):
    rows, reader = read(shared_data(name))
    assert (reader.format, len(rows)) == REAL[name]


def test_real_tool_calls_become_calls_and_their_results_tool_turns(shared_data):
    path = shared_data("glaive_toolcall_en/glaive_toolcall_en_demo.json")
    rows, _ = read(path)
    turns = [turn for row in json.loads(path.read_text()) for turn in row["conversations"]]
    written = [json.loads(turn["value"]) for turn in turns if turn["from"] == "function_call"]
    calls = [call for row in rows for message in row.messages for call in message.tool_calls]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [
        (call["name"], call["arguments"]) for call in written
    ]
    results = [message.content for row in rows for message in row.messages if message.role == "tool"]
    assert results == [turn["value"] for turn in turns if turn["from"] == "observation"]
    assert sum(len(row.tools) for row in rows) == 110  # objects in the tools columns, counted with jq
    assert rows[0].messages[3] == Message(
        "assistant",
        "",
        tool_calls=(ToolCall("search_recipes", '{"ingredients": ["chicken", "bell peppers", "rice"]}'),),
    )


def test_real_nested_rows_are_read_as_the_config_says(shared_data):
    rows, reader = read(
        shared_data("self_instruct/seed_tasks.jsonl"),
        columns={"output": "instances.0.output", "input": "instances.0.input"},
    )
    assert (len(rows), reader.format) == (175, "alpaca")
    assert rows[1].messages[0].content == (
        "What is the relation between the given pairs?\n\nNight : Day :: Right : Left"
    )


def test_a_real_table_without_names_is_read_as_the_config_says(shared_data):
    rows, _ = read(
        shared_data("poem_sentiment/train.tsv"),
        columns={"completion": "label"},
        template={"prompt": "Verse: {verse}\nSentiment: "},
        header=["id", "verse", "label"],
    )
    assert len(rows) == 892
    assert rows[57] == PromptCompletion('Verse: "what did you hear, for instance?" willis said.\nSentiment: ', "0")


def test_real_preferences_are_read_as_the_config_says(shared_data):
    rows, _ = read(
        shared_data("dpo_en_demo/dpo_en_demo.json"),
        columns={"prompt": "conversations", "completion": "chosen"},
        ignore=["rejected"],
    )
    assert [message.role for message in rows[0].messages] == ["user", "assistant"]
    assert len(rows) == 300
