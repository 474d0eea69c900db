"""The place of each turn in a rendering is found: trained is all that the assistant says, and nothing else."""

from dataclasses import replace
from functools import cache

import pytest
from conversations import (
    KINDS,
    TOOL,
    answer,
    answers_trained,
    blocks_of,
    call,
    chat,
    conversations,
    one,
    outcome,
    user,
    what_is_said,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import FAMILIES, tiny_tokenizer, trained_texts

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.data.rendering.spans import (
    END_ADDED,
    LAST_TURN_ONLY,
    PROMPT_DIFFERS,
    REASONING_LEFT_OUT,
    REASONING_NOT_SHOWN,
)
from qlora_trainer.data.types import Conversation

WITH_CALLS = [family for family, facts in FAMILIES.items() if facts.call]
REWRITING = (
    "{% for m in messages %}{{ m.content if m.role == 'user' else m.content | upper }}{{ eos_token }}{% endfor %}"
)


@cache
def shared_renderer(family: str, kind: str) -> Renderer:
    """One for all conversations of a test, as in preparation: what it keeps of one must not show in another."""
    return Renderer(tiny_tokenizer(family, kind), max_length=10**6)


@pytest.mark.parametrize(("family", "kind"), KINDS)
@settings(max_examples=20)
@given(data=st.data())
def test_masks_cover_exactly_what_the_assistant_says_in_any_conversation(family, kind, data):
    tokenizer = tiny_tokenizer(family, kind)
    row = data.draw(conversations(family))
    said = [text for text in what_is_said(family, row.messages) if text is not None]
    rendered = one(shared_renderer(family, kind), row)
    assert not isinstance(rendered, DataError)
    assert LAST_TURN_ONLY not in rendered.warnings
    assert answers_trained(tokenizer, rendered.examples[0]) == said


@pytest.mark.parametrize("family", WITH_CALLS)
def test_a_turn_of_calls_alone_begins_where_generation_begins_it(family):
    renderer = Renderer(tiny_tokenizer(family))
    prompt = Conversation((user("Where?"),), (TOOL,))
    example = renderer.render(replace(prompt, messages=(*prompt.messages, answer("", tool_calls=(call(),)))))
    ids = renderer.render_prompt(prompt).input_ids
    assert example.input_ids[: len(ids)] == ids
    assert example.labels[: len(ids)] == [-100] * len(ids)
    assert example.labels[len(ids)] != -100
    assert FAMILIES[family].call in tiny_tokenizer(family).decode(example.input_ids[len(ids) :])


def test_reasoning_of_earlier_turns_is_left_out_unless_the_row_wants_it_trained():
    tokenizer = tiny_tokenizer("qwen3")
    row = Conversation((user("a"), answer("b", reasoning="r"), user("c"), answer("d", reasoning="s")))
    rendered = one(Renderer(tokenizer), row)
    assert rendered.warnings == (REASONING_LEFT_OUT,)
    assert answers_trained(tokenizer, rendered.examples[0]) == ["<think>\ns\n</think>\n\nd<|im_end|>"]
    wanted = replace(row, messages=(row.messages[0], replace(row.messages[1], learn=True), *row.messages[2:]))
    assert "wants turn 2 trained" in str(outcome(Renderer(tokenizer), wanted))
    unwanted = replace(row, messages=(row.messages[0], replace(row.messages[1], learn=False), *row.messages[2:]))
    assert one(Renderer(tokenizer), unwanted).warnings == (REASONING_NOT_SHOWN,)


def test_turns_that_cannot_be_placed_and_that_the_row_names_are_refused():
    rewriting = "{% for m in messages %}{{ m.content | upper }}{{ eos_token }}{% endfor %}"
    row = Conversation((user("a"), answer("one", learn=True), user("b"), answer("c")))
    assert "names turns to train" in str(outcome(Renderer(tiny_tokenizer("qwen3", template=rewriting)), row))


def test_a_generation_prompt_that_goes_on_beyond_the_row_is_reported():
    template = blocks_of("{{- m.content + '<|im_end|>' }}").replace("assistant\n", "assistant\n<think>\n")
    tokenizer = tiny_tokenizer("smollm2", template=template)
    row = Conversation((user("a"), answer("b")))
    assert one(Renderer(tokenizer), row).warnings == (PROMPT_DIFFERS,)
    thinking = Conversation((user("a"), answer("<think>\nhm</think>b")))
    assert one(Renderer(tokenizer), thinking).warnings == ()


def test_qwen3_trains_the_last_turn_where_earlier_reasoning_is_dropped():
    tokenizer = tiny_tokenizer("qwen3")
    row = chat("1?", "<think>\nhm\n</think>\n\none", "2?", "<think>\nso\n</think>\n\ntwo")
    rendered = one(Renderer(tokenizer), row)
    assert rendered.warnings == (REASONING_LEFT_OUT,)
    assert trained_texts(tokenizer, rendered.examples[0]) == ["<think>\nso\n</think>\n\ntwo<|im_end|>"]


@pytest.mark.parametrize(
    "hiding",
    [
        REWRITING,
        "{{ messages | length }}{% for m in messages %}{{ m.content | length ~ m.content ~ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}",
    ],
    ids=["answer rewritten", "beginning depends on the end"],
)
def test_a_template_that_hides_the_answer_is_refused(hiding):
    with pytest.raises(DataError, match=r"rows.jsonl, line 3.*hides where the last answer is"):
        Renderer(tiny_tokenizer("smollm2", template=hiding)).render(chat("a", "b"), "rows.jsonl, line 3")


def test_answers_of_which_a_template_trims_newlines_only_are_found():
    tokenizer = tiny_tokenizer("qwen3")
    rendered = one(Renderer(tokenizer), chat("a", "\n dog "))
    assert rendered.warnings == ()
    assert trained_texts(tokenizer, rendered.examples[0]) == ["<think>\n\n</think>\n\n dog <|im_end|>"]


def test_a_template_without_ends_of_turns_gets_an_end_of_text():
    bare = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    tokenizer = tiny_tokenizer("smollm2", template=bare)
    rendered = one(Renderer(tokenizer), chat("a", "b", "c", "d"))
    assert trained_texts(tokenizer, rendered.examples[0]) == [" b", " d<|im_end|>"]
    assert END_ADDED in rendered.warnings


def test_excluded_turns_that_the_template_hides_are_refused():
    row = chat("1?", "one", "2?", "two")
    row = Conversation((row.messages[0], replace(row.messages[1], learn=False), *row.messages[2:]))
    with pytest.raises(DataError, match="excludes turns from training"):
        Renderer(tiny_tokenizer("smollm2", template=REWRITING), "all").render(row)
