"""What is before a trained answer is compared with the prompt that a server gives, by the template's own rendering."""

import pytest
from tiny_tokenizers import tiny_tokenizer

from qlora_trainer.data.rendering.dialogue import Dialogue, text_parts
from qlora_trainer.data.rendering.encoding import Encoder
from qlora_trainer.data.rendering.markers import Markers
from qlora_trainer.data.rendering.prompts import is_prompt, prompt_of
from qlora_trainer.data.rendering.templates import ChatTemplate

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SAME = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OPENS = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
ALONE = "{% if messages|length > 1 %}Chat\n{% endif %}" + SAME  # a question alone is written otherwise
NEEDS_AN_ANSWER = (
    "{% if not messages|selectattr('role', 'equalto', 'assistant')|list and messages[0].content == 'Capital?' %}"
    "{{ raise_exception('no answer') }}{% endif %}" + SAME
)
TWO = Dialogue([{"role": "user", "content": "Capital?"}, {"role": "assistant", "content": "Rome"}])
FOUR = Dialogue([*TWO.messages, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes!"}])


def template_of(source: str) -> ChatTemplate:
    tokenizer = tiny_tokenizer("smollm2")
    return ChatTemplate(tokenizer, source, Encoder(tokenizer).control_pattern)


def judged(source: str, dialogue: Dialogue, answer: str, has_places: bool, shift: int = 0) -> bool:
    markers = Markers(template_of(source))
    text, parts = markers.template.text(dialogue, "the row"), text_parts(dialogue)
    places = markers.places(dialogue, text, parts) if has_places else None
    assert (places is not None) == has_places
    return is_prompt(markers, dialogue, text, parts, places, text.index(answer) + shift)


@pytest.mark.parametrize("has_places", [True, False])
@pytest.mark.parametrize(
    ("source", "dialogue", "answer", "expected"),
    [
        (SAME, TWO, "Rome", True),
        (SAME, FOUR, "Yes!", True),
        (OPENS, TWO, "Rome", False),
        (OPENS, FOUR, "Yes!", False),
        (ALONE, TWO, "Rome", False),
        (ALONE, FOUR, "Yes!", True),
    ],
)
def test_a_row_begins_with_the_prompt_where_the_template_writes_both_alike(
    source: str, dialogue: Dialogue, answer: str, expected: bool, has_places: bool
) -> None:
    assert judged(source, dialogue, answer, has_places) == expected


@pytest.mark.parametrize("has_places", [True, False])
def test_an_answer_that_begins_before_or_after_the_prompts_end_follows_another_prompt(has_places: bool) -> None:
    assert not judged(SAME, TWO, "Rome", has_places, shift=-1)
    assert not judged(SAME, FOUR, "Yes!", has_places, shift=-1)


@pytest.mark.parametrize("has_places", [True, False])
def test_a_template_that_makes_no_such_prompt_contradicts_nothing(has_places: bool) -> None:
    assert prompt_of(template_of(NEEDS_AN_ANSWER), TWO, 1) is None
    assert judged(NEEDS_AN_ANSWER, TWO, "Rome", has_places)


def test_a_prompt_is_what_is_before_the_answer_with_the_answers_beginning() -> None:
    template = template_of(SAME)
    asked = "<|im_start|>user\nCapital?<|im_end|>\n"
    answered = "<|im_start|>assistant\nRome<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
    assert prompt_of(template, FOUR, 1) == asked + "<|im_start|>assistant\n"
    assert prompt_of(template, FOUR, 3) == asked + answered + "<|im_start|>assistant\n"
    assert prompt_of(template, FOUR, 0) is None
