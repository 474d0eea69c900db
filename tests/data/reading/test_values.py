"""Values are reported in a user's words, and nothing that is no text passes for text."""

import pytest

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.reading.values import from_json_text, kind, listed, optional_text, text, without_nulls


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (5, r"should be text, and is the int 5"),
        (True, r"and is true or false"),
        (float("nan"), r"and is NaN. Where there is no value, write null"),
        (None, r"and is null"),
        ({"a": 1}, r"and is an object"),
        ([1], r"and is a list"),
        ("ok \udfff", r"half of a character .* at character 3"),
    ],
)
def test_what_is_no_text_is_reported(value, words):
    with pytest.raises(DataError, match=f"line 1: answer .*{words}"):
        text(value, "answer", "line 1")


def test_text_passes_as_it_is():
    assert text("\u2028\x00é\U0001f600", "x", "") == "\u2028\x00é\U0001f600"
    assert (optional_text(None, "x", ""), optional_text("a", "x", "")) == ("", "a")
    assert (kind("a"), kind(2.5), listed([])) == ("text", "the float 2.5", "nothing")


def test_a_value_of_any_size_is_reported_in_a_few_words():
    assert kind(b"x" * 9999) == f"the bytes b'{'x' * 56}..."


def test_json_text_that_is_nested_deeper_than_programs_can_follow_is_refused():
    with pytest.raises(DataError, match=r"line 1: tools should be JSON, and is not: .*nested more than 100 deep"):
        from_json_text("[" * 150 + "]" * 150, "tools", "line 1")


def test_null_keys_are_left_out_at_every_depth_and_null_items_stay():
    nested = {"a": None, "b": [None, {"c": None, "d": {"e": None}}], "f": False}
    assert without_nulls(nested) == {"b": [None, {"d": {}}], "f": False}
