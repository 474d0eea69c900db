"""A column that means something is read or stops the run; the lines that the message gives settle it when followed."""

import pytest
from advice import prepared, read, refusal, refused, ways

from qlora_trainer.common.errors import ConfigError
from qlora_trainer.data.formats.meanings import SLOTS, has_meaning, is_metadata, key_has_meaning, marks_inside
from qlora_trainer.data.formats.parse import RecordReader

USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT = {"messages": [USER, BOT]}
PAIR = {"question": "q", "answer": "a"}
PLAIN = {"prompt": "q", "completion": "a"}
DOLLY = {"instruction": "q", "response": "a"}
ALPACA = {"instruction": "q", "output": "a"}


@pytest.mark.parametrize(
    "name",
    [
        *("label", "score", "rating", "weight", "loss_weight", "mask", "loss", "train", "trainable", "train_on_turn"),
        *("kto_tag", "quality_score", "sampleWeight", "Loss-Mask", "LABELS", "reward", "chosen_score", "is_trainable"),
    ],
)
@pytest.mark.parametrize("value", [False, 0, 0.0, True, "no"])
def test_a_mark_stops_the_run_whatever_its_value(name, value):
    for row in (CHAT, PAIR, PLAIN, DOLLY, ALPACA):
        with pytest.raises(ConfigError, match=f"{name} may mark answers to avoid"):
            RecordReader("auto", {}, {}).read({**row, name: value}, "line 1")
        assert RecordReader("auto", {}, {}, ignore=[name]).read({**row, name: value}, "line 1")


@pytest.mark.parametrize(
    ("row", "names"),
    [
        (CHAT, ("context", "input", "prompt", "question", "history", "rejected", "chosen", "documents")),
        (PAIR, ("context", "input", "prompt", "history", "System_Prompt", "completion", "passage")),
        (PLAIN, ("context", "input", "system", "tools", "history", "instruction", "response")),
        (DOLLY, ("input", "prompt", "history", "inputs")),
        (ALPACA, ("context", "prompt", "system_message", "thinking", "reasoning_content")),
    ],
)
def test_a_text_that_another_format_reads_stops_the_run(row, names):
    for name in names:
        with pytest.raises(ConfigError, match=f"{name} may "):
            RecordReader("auto", {}, {}).read({**row, name: [{"role": "user"}] if name == "history" else "x"}, "line 1")


def test_what_is_empty_in_all_rows_says_nothing_and_a_value_in_one_row_stops(tmp_path):
    values: list[object] = [None, "", " \n", [], {}]
    for empty in values:
        row = {**PAIR, "score": empty, "context": empty}
        assert prepared(tmp_path, [row] * 3, []).report.sources[0].unused_columns == {}
    message = refused(tmp_path, [{**PAIR, "score": None}, {**PAIR, "score": 0}])
    assert "line 2: score may mark" in message


def test_bad_rows_that_are_skipped_do_not_hide_a_column_that_means_something(tmp_path):
    assert "label may mark" in refusal(tmp_path, [{**PAIR, "label": False}], ["data.on_bad_row=skip"])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({**DOLLY, "input": "i"}, ["user: q\n\ni | assistant: a", "user: q | assistant: a"]),
        ({**ALPACA, "context": "c"}, ["user: q\n\nc | assistant: a", "user: q | assistant: a"]),
        ({**PAIR, "passage": "c"}, ["user: q\n\nc | assistant: a", "user: q | assistant: a"]),
        ({**PLAIN, "system": "s"}, ["system: s | user: q | assistant: a", "q -> a"]),
        (
            {**ALPACA, "input": "i", "system_prompt": "s"},
            ["system: s | user: q\n\ni | assistant: a", "user: q\n\ni | "],
        ),
        ({**PAIR, "history": [["h", "r"]]}, ["user: h | assistant: r | user: q | assistant: a", "user: q | assistant"]),
        ({**PAIR, "context": "c", "score": 3}, ["user: q | assistant: a", "user: q\n\nc | assistant: a", "user: q | "]),
        ({**CHAT, "label": True}, ["user: q | assistant: a"] * 2),
        ({**PLAIN, "label": 0}, ["q -> a"]),
        ({**PAIR, "rejected_response": "b"}, ["user: q | assistant: a"]),
        ({**PAIR, "rating": "bad"}, ["user: q | assistant: a"]),
    ],
)
def test_every_line_of_the_message_settles_it(tmp_path, row, expected):
    good = {name: {"label": 1, "rating": "good"}.get(name, value) for name, value in row.items()}
    rows = [{**good, "label": True} if row.get("label") is True else good]
    lines = ways(refused(tmp_path, [row]))
    assert lines
    for line, said in zip(lines, expected, strict=False):
        (found,) = read(tmp_path, rows, line)
        assert found.startswith(said)


def test_rows_are_kept_by_their_values_and_those_left_out_are_counted(tmp_path):
    rows = [{**PAIR, "label": value} for value in (True, False, True, 1, "true", "False", None)]
    found = prepared(tmp_path, rows, ["data.keep={label: true}"])
    assert (len(found.train), sum(found.report.sources[0].dropped.values())) == (3, 4)
    (warning,) = [line for line in found.report.warnings if "data.keep" in line]
    assert warning == "rows.jsonl: 4 of 7 rows are left out: data.keep leaves the row out (lines 2, 4, 6, …)"
    ratings = [{**PAIR, "meta": {"rating": n}} for n in range(6)]
    assert len(prepared(tmp_path, ratings, ["data.keep={meta.rating: [4, 5]}"]).train) == 2


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "chosen": "a"}, "user: q | assistant: a"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 5.0}, "user: q | assistant: a"),
        ({"question": "q", "response_j": "a", "response_k": "b"}, "user: q | assistant: a"),
        ({"chosen": [USER, BOT], "rejected": [USER, BOT]}, "user: q | assistant: a"),
        ({"prompt": [USER], "chosen": [BOT], "rejected": [BOT]}, "user: q | assistant: a"),
        (
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            "user: q | assistant: a",
        ),
        ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, "system: s | user: q | assistant: a"),
    ],
)
def test_preferences_are_refused_with_a_line_that_takes_the_better_answer(tmp_path, row, expected):
    message = refused(tmp_path, [row])
    assert "preferences" in message
    for line in ways(message):
        assert read(tmp_path, [row], line) == [expected]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "t", "label": "l"}, ["user: t | assistant: l", "t"]),
        ({"text": "t", "label": 3, "id": 7}, ["user: t | assistant: 3", "t"]),
        ({"text": "t", "summary": "s"}, ["user: t | assistant: s", "t"]),
        ({"prompt": "p", "text": "t"}, ["user: p | assistant: t", "t"]),
        ({"text": "t", "sentiment": "l", "score": 0.5}, ["user: t | assistant: l", "t"]),
        ({"text": "t", "stars": "5"}, ["user: t | assistant: 5", "t"]),
        ({"role": "user", "text": "t", "completion": "s"}, ["user: t | assistant: s", "t"]),
        ({"speaker": "Alice", "text": "t", "stars": "5"}, ["user: t | assistant: 5", "t"]),
    ],
)
def test_a_text_next_to_another_column_asks_what_is_meant(tmp_path, row, expected):
    lines = ways(refused(tmp_path, [row]))
    assert [read(tmp_path, [row], line)[0] for line in lines] == expected


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"role": "prompter", "text": "t", "parent_id": None, "rank": 0, "labels": {"toxicity": 0.1}}, "role and text"),
        ({"role": "user", "content": "t", "score": 3}, "role and content"),
        ({"from": "gpt", "value": "t"}, "from and value"),
        ({"speaker": "Alice", "text": "t", "id": 3}, "speaker and text"),
    ],
)
def test_a_row_that_is_one_turn_is_called_so_and_only_its_text_is_offered(tmp_path, row, names):
    message = refused(tmp_path, [row])
    assert f"{names} may be one turn of a conversation" in message
    assert "messages" in message
    assert ("tree" in message) == ("parent_id" in row)
    (line,) = ways(message)
    assert read(tmp_path, [row], line) == ["t"]


@pytest.mark.parametrize("name", ["prompt", "system", "label", "score", "rejected", "context", "instruction"])
@pytest.mark.parametrize(
    "settings", [["data.format=text"], ["data.columns={text: body}"], ["data.template={text: '{body}'}"]]
)
def test_a_column_with_a_meaning_next_to_a_text_that_the_config_names_stops_and_is_ignored(tmp_path, name, settings):
    row = {"text" if settings == ["data.format=text"] else "body": "t", name: "x", "summary": "s"}
    message = refused(tmp_path, [row], settings)
    assert f"{name} may " in message
    line = ways(message)[-1]
    assert line == [f"data.ignore=[{name}]"]
    assert read(tmp_path, [row], [*settings, *line]) == ["t"]


def test_a_text_next_to_what_says_where_it_is_from_is_read():
    row = {"text": "t", "url": "u", "meta": {"a": 1}, "timestamp": "now", "title": "T", "doc_id": 3, "token_count": 5}
    assert all(is_metadata(name) for name in row if name != "text")
    reader = RecordReader("auto", {}, {})
    reader.read(row, "line 1")
    assert reader.unused.keys() == row.keys() - {"text"}


def test_a_column_that_repeats_what_is_read_is_not_lost_and_one_that_differs_is():
    whole = {**ALPACA, "text": "Below is a task.\n### q\n### a"}
    asked = {**CHAT, "prompt": "q"}
    for row in (whole, asked):
        reader = RecordReader("auto", {}, {})
        reader.read(row, "line 1")
        assert len(reader.unused) == 1
        name = "text" if "text" in row else "prompt"
        with pytest.raises(ConfigError, match=f"{name} may be what an answer depends on"):
            reader.read({**row, name: "something else"}, "line 2")


@pytest.mark.parametrize(
    ("made", "row", "expected"),
    [
        (
            "data.columns={prompt: q, completion: a, system: s}",
            {"q": "Q", "a": "A", "s": "S"},
            ["system: S | user: Q | assistant: A", "S\n\nQ -> A", "Q -> A"],
        ),
        (
            "data.columns={question: q, answer: a, context: s}",
            {"q": "Q", "a": "A", "s": "S"},
            ["user: Q\n\nS | assistant: A", "user: S\n\nQ | assistant: A", "user: Q | assistant: A"],
        ),
        ("data.columns={text: q, system: s}", {"q": "Q", "s": "S"}, ["S\n\nQ", "Q"]),
    ],
)
def test_a_mapped_column_that_has_no_place_is_refused_and_each_line_settles_it(tmp_path, made, row, expected):
    message = refused(tmp_path, [row], [made])
    assert "is made by data.columns" in message
    assert [read(tmp_path, [row], line)[0] for line in ways(message)] == expected


def test_a_column_that_a_mapped_one_takes_the_name_of_is_not_lost(tmp_path):
    row = {"question": "title", "body": "b", "answer": "a"}
    assert "question may be" in refused(tmp_path, [row], ["data.columns={question: body}"])


@pytest.mark.parametrize(
    "key",
    [
        *("mask", "loss_mask", "loss_scale", "isTrainable", "score", "label", "content", "train_detail"),
        *("input", "history", "documents", "context", "think", "tool_plan", "prefix", "thoughts", "response"),
    ],
)
@pytest.mark.parametrize("value", [0, False, True, "x"])
def test_a_key_of_a_turn_that_means_something_stops_the_run_and_the_line_settles_it(tmp_path, key, value):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", key: value, "time": 3}]
    message = refused(tmp_path, [{"conversations": turns}])
    assert f"conversations[].{key} may say" in message
    (line,) = ways(message)
    assert read(tmp_path, [{"conversations": turns}], line) == ["user: q | assistant: a"]


@pytest.mark.parametrize(
    ("settings", "row", "path"),
    [
        ([], {**PAIR, "metadata": {"loss_weight": 0}}, "metadata.loss_weight"),
        ([], {**CHAT, "meta": {"id": 3, "label": False}}, "meta.label"),
        ([], {**PLAIN, "info": {"quality": {"human": {"score": 0.5}}}}, "info.quality.human.score"),
        ([], {"text": "t", "meta": {"url": "u", "train": False}}, "meta.train"),
        (["data.columns={messages: data.turns}"], {"data": {"turns": CHAT["messages"], "weight": 0}}, "data.weight"),
        (["data.keep={meta.id: 3}"], {**PAIR, "meta": {"id": 3, "mask": True}}, "meta.mask"),
        ([], {**PAIR, "notes": [{"by": "a"}, {"by": "b", "score": 0}]}, "notes[].score"),
        ([], {**PAIR, "notes": [[{"x": [{"score": 0}]}]]}, "notes[][].x[].score"),
        ([], {**CHAT, "meta": {"notes": ["a", 1, {"weight": 0}]}}, "meta.notes[].weight"),
        (
            ["data.columns={question: ask, answer: replies.0.text}"],
            {"ask": "q", "replies": [{"text": "a", "score": 3}, {"text": "b", "score": 9}]},
            "replies[].score",
        ),
        ([], {"messages": [USER, {**BOT, "notes": [{"train": False}]}]}, "messages[].notes[].train"),
        ([], {"messages": [USER, {**BOT, "metadata": {"train": False}}]}, "messages[].metadata.train"),
        ([], {"prompt": "q", "completion": {**BOT, "meta": {"x": {"weight": 0}}}}, "completion[].meta.x.weight"),
    ],
)
def test_a_mark_inside_an_object_that_is_not_read_stops_and_its_path_is_ignored(tmp_path, settings, row, path):
    message = refused(tmp_path, [row], settings)
    assert f"{path} may " in message
    line = ways(message)[-1]
    assert line[-1] == f"data.ignore=[{path}]" or line[-1] == f'data.ignore=["{path}"]'
    (found,) = read(tmp_path, [row], [*settings, *line])
    assert found in ("user: q | assistant: a", "q -> a", "t")


def test_what_is_read_of_a_list_is_not_lost_and_no_value_of_its_items_is_to_be_kept(tmp_path):
    columns = "data.columns={question: ask, answer: replies.0.score}"
    assert read(tmp_path, [{"ask": "q", "replies": [{"score": "a"}]}], [columns]) == ["user: q | assistant: a"]
    columns = "data.columns={question: ask, answer: replies.-1}"
    assert read(tmp_path, [{"ask": "q", "replies": ["a", "b"]}], [columns]) == ["user: q | assistant: b"]
    assert "data.keep" not in refused(tmp_path, [{**PAIR, "notes": [{"trainable": False}]}])


def test_lists_are_searched_for_marks_within_bounds():
    deep: object = [{"score": 0}]
    for _ in range(40):
        deep = [deep, deep, {"a": 1}]
    wide = [[[{"n": n} for n in range(300)]] * 300] * 300
    for value in (deep, wide, [0.5] * 10**6):
        assert marks_inside(value, "notes") == {}
    assert marks_inside([{"n": n, "score": n} for n in range(300)], "notes") == {"notes[].score": 0}


def test_rows_are_kept_by_a_mark_inside_an_object(tmp_path):
    (keep, _) = ways(refused(tmp_path, [{**PAIR, "metadata": {"trainable": False}}]))
    rows = [{**PAIR, "metadata": {"trainable": value}} for value in (True, False, True)]
    assert len(prepared(tmp_path, rows, keep).train) == 2


@pytest.mark.parametrize("name", [name for names in SLOTS.values() for name in names if has_meaning(name)])
def test_a_key_of_a_turn_has_a_meaning_where_a_column_of_its_name_has(name):
    assert key_has_meaning(name)


def test_columns_without_a_meaning_are_one_line(tmp_path):
    row = {**PAIR, " ": 1, **{f"feature_{n}": n for n in range(300)}}
    (warning,) = prepared(tmp_path, [row], []).report.warnings
    assert warning == "rows.jsonl: not used: ' ', feature_0, feature_1, feature_2, feature_3 and 296 more"
    assert not has_meaning("feature_1")


def test_a_column_without_a_name_is_no_context(tmp_path):
    assert read(tmp_path, [{**PAIR, "": "0"}], []) == ["user: q | assistant: a"]


def test_lines_keep_what_the_config_ignores_already(tmp_path):
    row = {**PAIR, "score": 3, "label": "x"}
    message = refused(tmp_path, [row], ["data.ignore=[score]"])
    assert read(tmp_path, [row], ways(message)[-1]) == ["user: q | assistant: a"]


@pytest.mark.parametrize(
    ("row", "own", "other"), [(DOLLY, "context", "input"), (ALPACA, "input", "context"), (DOLLY, "context", "passage")]
)
def test_of_two_contexts_both_one_or_the_other_are_read_as_the_message_says(tmp_path, row, own, other):
    rows = [{**row, own: "first", other: "second"}, {**row, own: "first", other: "x", "system": "s"}]
    message = refused(tmp_path, rows)
    assert f"{other} may be what an answer depends on" in message
    both, second, first = ways(message)
    said = [read(tmp_path, rows, overrides) for overrides in (both, second, first)]
    assert [lines[0] for lines in said] == [
        "user: q\n\nfirst\n\nsecond | assistant: a",
        "user: q\n\nsecond | assistant: a",
        "user: q\n\nfirst | assistant: a",
    ]
    assert [lines[1].startswith("system: s | user: q\n\n") for lines in said] == [True] * 3
    assert ways(refused(tmp_path, [{**rows[0], own: ""}])) == [both, second, first]
