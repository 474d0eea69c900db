"""Promises of data.template: a text that cannot be cut into fields is a problem of the config."""

from typing import Any

import pytest
from minimal_config import MINIMAL, problems_of

from qlora_trainer.common.errors import ConfigError
from qlora_trainer.config.load import make_config
from qlora_trainer.config.row_template import parts

WRONG = ["{", "}", "{}", "{a:b}", "{a!r}", "{a", "{a!", "{a{b}}"]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_template_that_cannot_be_cut_is_a_problem_of_the_config(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"write {{ and }} for braces"):
        parts(wrong)
    places: dict[str, dict[str, Any]] = {
        "data.template": {"train": "rows.jsonl", "template": {"text": wrong}},
        "data.train.0.template": {"train": [{"path": "rows.jsonl", "template": {"text": wrong}}]},
        "data.eval.template": {"train": "rows.jsonl", "eval": {"path": "rows.jsonl", "template": {"text": wrong}}},
    }
    for place, data in places.items():
        message = problems_of({**MINIMAL, "data": data})
        assert f"  - {place}: data.template has the text {wrong!r}: " in message
        assert "1 problem:" in message


def test_texts_are_cut_at_their_fields() -> None:
    assert parts("{a.b}: {{as is}} {c?}") == [("", "a.b"), (": {", None), ("as is}", None), (" ", "c?")]
    data = {"train": "rows.jsonl", "template": {"text": "{a}"}}
    assert make_config({**MINIMAL, "data": data}).data.template == {"text": "{a}"}
