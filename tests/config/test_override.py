"""A setting in an error message is read back by the shell and YAML as it was, whatever a column is called."""

import shlex

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer.config.override import override

NAMES = st.text(st.characters(codec="utf-8"), max_size=8)
VALUES = st.recursive(
    NAMES | st.booleans() | st.integers() | st.none(), lambda v: st.lists(v) | st.dictionaries(NAMES, v), max_leaves=5
)


@settings(max_examples=40)
@given(VALUES)
def test_any_value_comes_back_through_the_shell_and_yaml(value):
    (word,) = shlex.split(override("data.columns", value))
    key, _, text = word.partition("=")
    assert (key, yaml.safe_load(text)) == ("data.columns", value)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ({"question": "Question", "answer": "replies.0"}, "'data.x={question: Question, answer: replies.0}'"),
        (["score", "messages[].mask", "yes", "a: b"], """'data.x=[score, "messages[].mask", "yes", "a: b"]'"""),
        ({"label": True}, "'data.x={label: true}'"),
        ("text", "'data.x=text'"),
        (["Frage"], "'data.x=[Frage]'"),
        ({"prompt": "{s}\n\n{q}"}, r"""'data.x={prompt: "{s}\n\n{q}"}'"""),
    ],
)
def test_settings_are_written_as_plainly_as_can_be(value, written):
    assert override("data.x", value) == written
