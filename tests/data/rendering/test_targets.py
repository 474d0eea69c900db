"""The turns that are trained are those that the config and the row choose, and no others."""

from dataclasses import replace

import pytest
from conversations import TOOL, answer, answers_trained, call, conversations, one, user, what_is_said
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import FAMILIES, tiny_tokenizer

from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.data.rendering.targets import reference_answer
from qlora_trainer.data.types import Conversation, Message


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15)
@given(data=st.data())
def test_what_a_turn_says_of_itself_is_honored_in_any_conversation(family, data):
    tokenizer = tiny_tokenizer(family)
    row = data.draw(conversations(family))
    said = what_is_said(family, row.messages)
    wishes = [data.draw(st.sampled_from([None, True, False])) for _ in said]
    assume(not any(wish and text is None for wish, text in zip(wishes, said, strict=True)))
    left = iter(wishes)
    messages = tuple(replace(m, learn=next(left)) if m.role == "assistant" else m for m in row.messages)
    last = len(said) - 1
    for train_on, default in (("assistant", lambda index: True), ("last", lambda index: index == last)):
        expected = [
            text
            for index, (text, wish) in enumerate(zip(said, wishes, strict=True))
            if text is not None and (default(index) if wish is None else wish)
        ]
        rendered = one(Renderer(tokenizer, train_on, max_length=10**6), replace(row, messages=messages))
        assert [t for e in rendered.examples for t in answers_trained(tokenizer, e)] == expected


def test_a_list_of_roles_is_trained_with_the_ends_of_their_turns():
    tokenizer = tiny_tokenizer("qwen2_5")
    row = Conversation(
        (user("a"), answer("", tool_calls=(call(),)), Message("tool", "in Italy"), user("c"), answer("d")), (TOOL,)
    )
    calls = f"{FAMILIES['qwen2_5'].call}<|im_end|>"
    result = "in Italy\n</tool_response><|im_end|>"
    assert answers_trained(tokenizer, Renderer(tokenizer, ["tool"]).render(row)) == [result]
    both = answers_trained(tokenizer, Renderer(tokenizer, ["assistant", "tool"]).render(row))
    assert both == [calls, result, "d<|im_end|>"]
    assert answers_trained(tokenizer, Renderer(tokenizer, ["user"]).render(row)) == ["a<|im_end|>", "c<|im_end|>"]


def test_the_reference_answer_of_a_row_that_calls_is_none_and_tools_go_with_the_prompt():
    calling = Conversation((user("a"), answer("", tool_calls=(call(),))), (TOOL,))
    assert reference_answer(calling) is None
    answered = Conversation((*calling.messages, Message("tool", "x"), answer("b")), (TOOL,))
    assert reference_answer(answered) == (Conversation(answered.messages[:3], (TOOL,)), "b")
