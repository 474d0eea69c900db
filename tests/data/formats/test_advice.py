"""Suggested settings name the column or the path that holds what they say, each column once."""

from typing import Any

import pytest

from qlora_trainer.data.formats.advice import (
    chat_columns,
    holds_turns,
    near_miss,
    one_turn,
    preferred_line,
    settings_line,
    slots_of,
    text_path,
    with_fields,
)

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("words", "x"),
        (["words", "more"], "x.0"),
        ({"text": ["words"]}, "x.text.0"),
        ({"start": 3, "value": "words"}, "x.value"),
        ({"only": {"answer": "words"}}, "x.only.answer"),
        ({"a": "words", "b": "more"}, None),  # either may be meant
        ([[[["words"]]]], "x.0.0.0.0"),
        ([[[[["too deep"]]]]], None),
        *[(3, None), ([], None), ({}, None), (None, None), ([3], None)],
    ],
)
def test_the_path_leads_to_the_text_of_a_column(value: Any, path: str | None) -> None:
    assert text_path("x", value) == path


def test_what_a_question_offers_is_no_answer() -> None:
    assert text_path("choices", ["a", "b"]) is None
    assert text_path("row.options", "a") is None


@pytest.mark.parametrize("key", ["role", "from", "speaker"])
def test_turns_are_a_list_of_objects_that_all_say_who_speaks(key: str) -> None:
    assert holds_turns([{key: "x"}, {key: "y"}])
    for other in ([], {key: "x"}, [{key: "x"}, {}], [{key: "x"}, "y"], None):
        assert not holds_turns(other)


@pytest.mark.parametrize(
    ("row", "slots"),
    [
        ({"Query": "q", "Reply": "a"}, {"asked": "Query", "answered": "Reply"}),
        ({"dialog": TURNS, "sys": "s", "answer": "a"}, {"turns": "dialog", "system": "sys"}),
        ({"question": "q", "passage": "p"}, {"asked": "question", "context": "passage"}),
        ({"question": "q", "answers": {"text": ["a"]}}, {"asked": "question", "answered": "answers.text.0"}),
        ({"data": {"question": "q", "answer": "a"}}, {"asked": "data.question", "answered": "data.answer"}),
        ({"question": "q", "answer": None}, {"asked": "question"}),
        ({"question": "q", "history": [["a", "b"]]}, {"asked": "question", "history": "history"}),
        ({"question": "q", "history": "text", "functions": "[]"}, {"asked": "question", "tools": "functions"}),
    ],
)
def test_a_column_is_for_what_its_name_and_value_say(row: dict[str, Any], slots: dict[str, str]) -> None:
    assert slots_of(row) == slots


def test_columns_left_aside_are_for_nothing() -> None:
    assert slots_of({"question": "q", "answer": "a"}, but=["answer"]) == {"asked": "question"}


@pytest.mark.parametrize(
    ("slots", "columns"),
    [
        ({"asked": "q", "answered": "a"}, {"question": "q", "answer": "a"}),
        ({"asked": "q", "answered": "a", "context": "c"}, {"instruction": "q", "input": "c", "output": "a"}),
        (
            {"asked": "q", "answered": "a", "history": "history"},
            {"instruction": "q", "output": "a"},  # a column of its own name needs no setting
        ),
        ({"turns": "t", "system": "s"}, {"messages": "t", "system": "s"}),
        ({"asked": "q", "answered": "a", "tools": "functions"}, {"question": "q", "answer": "a", "tools": "functions"}),
        ({"asked": "q"}, {}),
        ({"answered": "a", "context": "c"}, {}),
    ],
)
def test_what_is_asked_and_answered_becomes_the_columns_of_a_format(
    slots: dict[str, str], columns: dict[str, str]
) -> None:
    assert chat_columns(slots) == columns


def test_fields_are_written_below_what_is_asked() -> None:
    made = with_fields({"question": "q", "answer": "a"}, ["options", "hint"])
    assert made == ({"answer": "a"}, {"question": "{q}\n\n{options?}\n\n{hint?}"})


def test_a_line_holds_the_settings_that_are_given_and_no_others() -> None:
    assert settings_line({"text": "body"}) == "'data.columns={text: body}'"
    assert settings_line({}, ignore=["score"]) == "'data.ignore=[score]'"
    assert settings_line({"answer": "a"}, {"question": "{q}"}, ["x", "y"]).split(" 'data.") == [
        "'data.columns={answer: a}'",
        'template={question: "{q}"}\'',
        "ignore=[x, y]'",
    ]


def test_of_two_texts_without_known_names_the_first_is_asked_and_a_class_answers() -> None:
    assert "If right answers left: 'data.columns={question: left, answer: right}'" in near_miss(
        {"left": "a", "right": "b"}
    )
    found = near_miss({"intent": "a", "right": "b", "id": "3"}, ["intent"])
    assert found == " If intent answers right: 'data.columns={question: right, answer: intent}'."
    assert near_miss({"a1": "x", "b1": "y", "c1": "z"}) == ""


def test_a_row_with_an_answer_is_no_single_turn() -> None:
    assert one_turn({"role": "user", "content": "q"})
    assert one_turn({"role": "user", "content": "q", "rank": 1, "model": "m"})
    for other in ({"response": "a"}, {"question": "q"}):
        assert one_turn({"role": "user", "content": "q", **other}) == ""
    for row in ({"role": 3, "content": "q"}, {"role": "user", "content": ""}, {"content": "q"}, {"role": "user"}):
        assert one_turn(row) == ""


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            "'data.columns={question: prompt, answer: chosen}' 'data.ignore=[rejected]'",
        ),
        ({"chosen": TURNS, "rejected": TURNS}, "'data.columns={messages: chosen}' 'data.ignore=[rejected]'"),
        ({"chosen": "a", "rejected": "b"}, "'data.columns={text: chosen}' 'data.ignore=[rejected]'"),
        (
            {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": TURNS[1:]},
            "'data.columns={prompt: prompt, completion: chosen}' 'data.ignore=[rejected]'",
        ),
    ],
)
def test_the_better_answer_is_trained_and_the_worse_one_left_out(row: dict[str, Any], line: str) -> None:
    assert preferred_line(row, "chosen", ["rejected"]) == line
