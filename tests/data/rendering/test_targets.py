"""The turns that are trained are those that the config and the row choose, and no others."""

from dataclasses import replace

import pytest
from conversations import TOOL, answer, answers_trained, call, chat, conversations, one, user, what_is_said
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import FAMILIES, tiny_tokenizer, trained_texts

from qlora_trainer.data.formats.parse import RecordReader
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.data.rendering.targets import reference_answer
from qlora_trainer.data.types import Conversation, Document, Message, PromptCompletion


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


@pytest.mark.parametrize("prompt", ["What?", [{"role": "user", "content": "What?"}]])
def test_training_on_every_token_takes_a_prompt_in_turns_like_one_in_text(prompt):
    tokenizer = tiny_tokenizer("llama3")
    completion = "A fox." if isinstance(prompt, str) else [{"role": "assistant", "content": "A fox."}]
    row = RecordReader("auto", {}, {}).read({"prompt": prompt, "completion": completion}, "row 1")
    example = Renderer(tokenizer, train_on="all").render(row)
    start = len(Renderer(tokenizer).encoder.bos_ids) if isinstance(prompt, str) else 0
    assert example.labels[start:] == example.input_ids[start:]
    (answer,) = trained_texts(tokenizer, Renderer(tokenizer).render(row))
    assert answer == "A fox.<|eot_id|>"


def test_last_and_all_and_the_rows_own_wishes():
    tokenizer = tiny_tokenizer("smollm2")
    row = chat("a", "b", "c", "d")
    assert trained_texts(tokenizer, Renderer(tokenizer, "last").render(row)) == ["d<|im_end|>"]
    everything = Renderer(tokenizer, "all").render(row)
    assert everything.labels == everything.input_ids
    untrained = Conversation((row.messages[0], Message("assistant", "b", learn=False), *row.messages[2:]))
    assert trained_texts(tokenizer, Renderer(tokenizer).render(untrained)) == ["d<|im_end|>"]
    texts = trained_texts(tokenizer, Renderer(tokenizer, "all").render(untrained))
    assert len(texts) == 2
    assert texts[0].endswith("<|im_start|>assistant\n")
    assert texts[1].startswith("\n<|im_start|>user\nc<|im_end|>")
    asked = Conversation((Message("user", "a", learn=True), *row.messages[1:]))
    assert trained_texts(tokenizer, Renderer(tokenizer, "last").render(asked)) == ["a<|im_end|>", "d<|im_end|>"]


def test_blank_answers_are_never_trained_and_a_row_of_them_is_dropped():
    tokenizer = tiny_tokenizer("smollm2")
    assert trained_texts(tokenizer, Renderer(tokenizer).render(chat("a", " ", "c", "d"))) == ["d<|im_end|>"]
    for row in (chat("a", ""), PromptCompletion("a", " \n"), Document("\n")):
        rendered = one(Renderer(tokenizer), row)
        assert rendered.examples == []
        assert rendered.dropped is not None
        assert "nothing to train on" in rendered.dropped
