"""Experiments with markers are made once for all conversations of a shape, whatever comes of them."""

from typing import Any

import pytest

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.rendering.dialogue import CONTENT, Dialogue, text_parts
from qlora_trainer.data.rendering.markers import Markers


class Template:
    """Takes the place of a ChatTemplate, and counts its runs; some refuse a dialogue without its answer."""

    def __init__(self, refuses: bool) -> None:
        self.refuses = refuses
        self.runs = 0

    def text(self, dialogue: Dialogue, where: str, generation: bool = False) -> str:
        self.runs += 1
        if generation and self.refuses:
            raise DataError(f"{where}: an answer must come last")
        return "".join(f"[{message['content']}]" for message in dialogue.messages)


@pytest.mark.parametrize(("refuses", "runs"), [(False, 2), (True, 1)])
def test_what_a_template_says_of_prompts_of_a_shape_is_asked_once(refuses: bool, runs: int) -> None:
    template: Any = Template(refuses)
    markers = Markers(template)
    found = []
    for question, answer in (("one", "two"), ("three", "four")):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        dialogue = Dialogue(messages, None)
        found.append(markers.prompt_and_text(dialogue, text_parts(dialogue), (1, CONTENT)))
    assert template.runs == runs
    assert found[0] == found[1]
    assert (found[0] is None) == refuses
