"""Our columns are made from any others: by paths into them, and by text around them."""

from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.formats.columns import look_up, mapped, paths_of, source_columns

ROW = {
    "task": {"title": "t", "points": [1.5, True, None]},
    "instances": [{"input": "i0", "output": "o0"}, {"input": "i1"}],
    "a.b": "dotted",
    "a": {"b": "nested"},
    "what?": "asked",
    "empty": None,
    "day": date(2024, 5, 6),
}
KEYS = st.text(st.characters(codec="utf-8", exclude_characters=".?{}:!"), min_size=1, max_size=3).filter(
    lambda key: not key.strip("-").isdecimal()
)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("task.title", "t"),
        ("instances.0.input", "i0"),
        ("instances.-1.input", "i1"),
        ("instances.1", {"input": "i1"}),
        ("a.b", "dotted"),
        ("what?", "asked"),
        ("empty", None),
        ("empty.deeper", None),
        ("instances.1.output?", None),
        ("nowhere?", None),
        ("task.title?", "t"),
    ],
)
def test_a_path_leads_to_its_value(path, value):
    assert look_up(ROW, path, "data.columns x", "line 1") == value


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("titel", r"line 1: data.columns x takes titel, but the row has task, instances, .* write titel\? instead"),
        ("task.titel", r"takes task.titel, but task has title, points"),
        ("instances.1.output", r"takes instances.1.output, but instances.1 has input"),
        ("instances.2.input", r"but instances has a list of 2"),
        ("instances.first", r"but instances has a list of 2"),
        ("task.title.0", r"but task.title has text"),
    ],
)
def test_a_path_that_leads_nowhere_says_how_far_it_came(path, words):
    with pytest.raises(DataError, match=words):
        look_up(ROW, path, "data.columns x", "line 1")


@settings(max_examples=60)
@given(st.lists(KEYS | st.integers(0, 3), min_size=1, max_size=4), st.text(max_size=3))
def test_whatever_is_nested_is_found_by_its_path(steps, value):
    steps = [str(step) if index == 0 else step for index, step in enumerate(steps)]
    nested = value
    for step in reversed(steps):
        nested = [None] * step + [nested] if isinstance(step, int) else {step: nested}
    assert look_up(nested, ".".join(map(str, steps)), "", "") == value


def test_a_template_writes_text_around_fields():
    template = {
        "question": "{task.title}: {instances.0.input} {{as is}}{nowhere?}",
        "answer": "{task.points} on {day}, {task.points.1}",
    }
    assert mapped(ROW, {}, template, "line 1") == {
        "a.b": "dotted",
        "a": {"b": "nested"},
        "what?": "asked",
        "empty": None,
        "question": "t: i0 {as is}",
        "answer": "[1.5, true, null] on 2024-05-06, true",
    }
    paths = paths_of({"text": "a.b"}, template)
    assert source_columns(ROW, paths) == {"task", "instances", "nowhere", "day", "a.b"}


def test_a_field_without_text_is_reported():
    with pytest.raises(
        DataError, match=r"data.template text takes empty, which is null. If it may be empty, write empty\?"
    ):
        mapped(ROW, {}, {"text": "{empty}"}, "line 1")
    with pytest.raises(DataError, match=r"data.template text: x holds bytes, not text"):
        mapped({"x": b"y"}, {}, {"text": "{x}"}, "line 1")
    with pytest.raises(DataError, match=r"x cannot be written as JSON"):
        mapped({"x": float("nan")}, {}, {"text": "{x}"}, "line 1")


def test_columns_that_ours_are_made_from_are_no_longer_there_and_may_change_places():
    record = {"prompt": "c", "completion": "p", "id": 1}
    made = {"prompt": "completion", "completion": "prompt"}
    assert mapped(record, made, {}, "") == {"prompt": "p", "completion": "c", "id": 1}
