"""A message suggests to keep the rows with a value only where name and value leave no doubt which rows are good."""

import json
import math

import pytest
from advice import prepared, read, refused, texts, ways

from qlora_trainer.data.formats.mark_values import value_to_keep
from qlora_trainer.data.formats.meanings import is_empty, is_mark

PAIR = {"question": "q", "answer": "a"}


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(
    "name",
    ["exclude_from_training", "noTrain", "untrained", "not-trainable", "skip_training", "undesirable", "DontTrain"],
)
def test_a_negated_mark_keeps_the_rows_that_are_not_marked(tmp_path, name, value):
    line = ways(refused(tmp_path, [{**PAIR, name: value}]))[0]
    found = prepared(tmp_path, [{**PAIR, name: False}, {"question": "q", "answer": "b", name: True}], line)
    assert texts(found) == ["user: q | assistant: a"]


@pytest.mark.parametrize(
    "name",
    [
        *("train_on_inputs", "train_on_prompt", "train_on_responses_only", "mask_history", "train_inputs"),
        *("toxicity_score", "spam_label", "error_rating", "not_excluded_from_training", "label_smoothing"),
    ],
)
@pytest.mark.parametrize("value", [True, False, 0, 1, 5, "yes"])
def test_a_setting_or_a_name_with_an_unknown_word_gets_no_value_to_keep(tmp_path, name, value):
    message = refused(tmp_path, [{**PAIR, name: value}])
    assert "data.keep" not in message
    assert "data.ignore" in message


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        *[("is_trainable", False, True), ("label", 0, 1), ("sampleWeight", 0.0, 1), ("kto_tag", "false", "true")],
        *[("no_train", 1, 0), ("exclude_from_training", "Yes", "no"), ("rating", "bad", "good"), ("score", 4, 4)],
        *[("rating", 1, None), ("label", "harmful", None), ("loss", 0, None), ("reward", -1, None), ("label", 7, None)],
        *[("score", math.inf, None), ("weight", -math.inf, None), ("weight", 0.5, None), ("score", [1], None)],
        *[("question", True, None), ("rejected", True, None)],
    ],
)
def test_the_value_to_keep_is_the_one_of_good_rows_or_none(name, value, kept):
    found = value_to_keep(name, value)
    assert (found, type(found)) == (kept, type(kept))


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        *[("is_correct", False, True), ("correct", "no", "yes"), ("accepted", False, True), ("isCorrect", 0, 1)],
        *[("answer_is_correct", False, True), ("is_accepted_answer", 0, 1), ("is_incorrect", True, False)],
        *[("invalid", "true", "false"), ("human_verified", False, True), ("response_approved", False, True)],
    ],
)
def test_rows_with_a_bad_verdict_are_left_out_by_the_line_that_the_message_gives(tmp_path, name, bad, good):
    rows = [{"question": "q", "answer": "b", name: bad}, {**PAIR, name: good}]
    for row in rows:
        line = ways(refused(tmp_path, [row]))[0]
        assert texts(prepared(tmp_path, rows, line)) == ["user: q | assistant: a"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("correct", 1), ("accepted", 0), ("correctness", 4), ("correct", "B"), ("is_correct", 2)],
)
def test_a_verdict_without_a_value_that_is_surely_good_can_be_left_out_as_the_message_says(tmp_path, name, value):
    message = refused(tmp_path, [{**PAIR, name: value}])
    assert "data.keep" not in message
    assert read(tmp_path, [{**PAIR, name: value}], ways(message)[0]) == ["user: q | assistant: a"]


@pytest.mark.parametrize("name", ["correct_answer", "correct_option", "correct_choice", "wrong_answer", "review"])
def test_what_is_called_the_right_answer_is_no_verdict(name):
    assert not is_mark(name)


def test_not_a_number_says_nothing_and_infinity_stops_with_a_line_to_follow(tmp_path):
    assert is_empty(json.loads("NaN"))
    rows = [{**PAIR, "score": math.nan, "label": math.nan}]
    assert texts(prepared(tmp_path, rows, [])) == ["user: q | assistant: a"]
    for infinite in (json.loads("1e999"), -math.inf):
        message = refused(tmp_path, [{**PAIR, "score": infinite}])
        (line,) = ways(message)
        assert texts(prepared(tmp_path, [{**PAIR, "score": infinite}], line)) == ["user: q | assistant: a"]
