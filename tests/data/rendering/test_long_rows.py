"""A row that is too long ends with a whole answer, is dropped, or is refused; only plain text is cut within."""

from dataclasses import replace

import pytest
from conversations import answer, answers_trained, conversations, one, user
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import FAMILIES, tiny_tokenizer

from qlora_trainer.data.rendering.renderer import CUT_AWAY, Renderer
from qlora_trainer.data.types import Conversation


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20)
@given(data=st.data())
def test_a_cut_conversation_is_its_longest_beginning_that_fits_and_ends_with_a_whole_answer(family, data):
    renderer = Renderer(tiny_tokenizer(family), max_length=10**6)
    row = data.draw(conversations(family))
    whole = one(renderer, row)
    length = len(whole.examples[0].input_ids) if whole.examples else 0
    limit = data.draw(st.integers(8, max(8, length - 1)))
    assume(limit < length)
    answers = [i + 1 for i, message in enumerate(row.messages) if message.role == "assistant"]
    shorter = {end: renderer.render(replace(row, messages=row.messages[:end])) for end in answers[:-1]}
    fitting = [end for end, example in shorter.items() if len(example.input_ids) <= limit]
    cut = one(Renderer(tiny_tokenizer(family), max_length=limit), row)
    assert cut.tokens == length
    if fitting:
        assert cut.truncated
        assert cut.examples == [shorter[max(fitting)]]
        assert cut.rows == [replace(row, messages=row.messages[: max(fitting)])]
        assert cut.examples[0].labels[-3:] != [-100] * 3, "only what a template writes after a turn comes after it"
    else:
        assert (cut.examples, cut.dropped, cut.truncated) == ([], CUT_AWAY, False)


def test_a_cut_keeps_to_the_turns_that_the_whole_row_trains():
    tokenizer = tiny_tokenizer("smollm2")
    row = Conversation((user("a"), answer("b"), user("c"), answer("long " * 60)))
    rendered = one(Renderer(tokenizer, "last", max_length=64), row)
    assert (rendered.examples, rendered.dropped) == ([], CUT_AWAY)
    everything = one(Renderer(tokenizer, "all", max_length=64), row)
    assert everything.rows == [replace(row, messages=row.messages[:2])]
    assert everything.examples[0].labels == everything.examples[0].input_ids
    trailing = replace(row, messages=(*row.messages[:2], user("long " * 60)))
    assert one(Renderer(tokenizer, "last", max_length=64), trailing).rows == everything.rows


def test_a_shorter_conversation_is_rendered_as_it_would_be_met():
    tokenizer = tiny_tokenizer("qwen3")
    row = Conversation((user("a"), answer("b", reasoning="r"), user("c"), answer("long " * 60)))
    rendered = one(Renderer(tokenizer, max_length=64), row)
    assert answers_trained(tokenizer, rendered.examples[0]) == ["<think>\nr\n</think>\n\nb<|im_end|>"]
    assert rendered.warnings == ()
