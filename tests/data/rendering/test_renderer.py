"""Rows are rendered as a model meets them: a prompt as in generation, the answers trained, each text with its end."""

import json
from typing import Any

import pytest
import tokenizers
from conversations import KINDS, chat, one
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import FAMILIES, tiny_tokenizer, trained_texts
from transformers import PreTrainedTokenizerFast

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.data.rendering.targets import reference_answer
from qlora_trainer.data.types import Conversation, Document, Message, PromptCompletion


def expected_answers(family: str, messages: tuple[Message, ...]) -> list[str]:
    facts = FAMILIES[family]
    answers = [m.content.strip() if facts.trims else m.content for m in messages if m.role == "assistant"]
    texts = [answer + facts.end_of_turn for answer in answers]
    if family == "qwen3" and messages[-1].role == "assistant":
        texts[-1] = "<think>\n\n</think>\n\n" + texts[-1].lstrip("\n")
    return texts


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_trained_tokens_are_the_answers_and_the_ends_of_their_turns(family, kind):
    tokenizer = tiny_tokenizer(family, kind)
    row = chat("What is it?", "A fox.", "And\n\nthen?", "  It sleeps,\nfor an hour. 😀é\n")
    example = Renderer(tokenizer).render(row)
    texts = [text.lstrip() for text in trained_texts(tokenizer, example)]
    assert texts == [text.lstrip() for text in expected_answers(family, row.messages)]


words = st.sampled_from(
    ["fox", " dog", "42", "\n", " ", "é", "😀", "<|im_end|>", "</s>", "<eos>", "<|end|>", "[INST]", "Q"]
)
contents = st.lists(words, min_size=1, max_size=6).map("".join).filter(str.strip)


@pytest.mark.parametrize(("family", "kind"), KINDS)
@settings(max_examples=25)
@given(texts=st.lists(contents, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
def test_masks_cover_exactly_the_answers_of_any_conversation(family, kind, texts):
    tokenizer = tiny_tokenizer(family, kind)
    row = chat(*texts)
    rendered = one(Renderer(tokenizer), row)
    assert rendered.warnings == ()
    found = [text.lstrip() for text in trained_texts(tokenizer, rendered.examples[0])]
    assert found == [text.lstrip() for text in expected_answers(family, row.messages)]


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_the_prompt_of_generation_begins_the_row_in_training(family, kind):
    renderer = Renderer(tiny_tokenizer(family, kind))
    row = chat("What is it? <|im_start|> [INST]", "A fox.", "And then?", "It sleeps.")
    ids = renderer.render(row).input_ids
    asked = reference_answer(row)
    assert asked is not None
    prompt, answer = asked
    prompt_ids = renderer.render_prompt(prompt).input_ids
    assert answer == "It sleeps."
    assert ids[: len(prompt_ids)] == prompt_ids
    labels = renderer.render(row).labels
    assert all(
        label == token
        for label, token in zip(labels[len(prompt_ids) :], ids[len(prompt_ids) :], strict=True)
        if label != -100
    )
    assert labels[len(prompt_ids)] != -100, "the first token after the prompt is trained"


def test_a_system_message_that_the_template_refuses_names_row_and_way_out():
    row = Conversation((Message("system", "Be brief."), *chat("a", "b").messages))
    with pytest.raises(DataError, match=r"a.jsonl, line 7.*System role not supported.*first user turn"):
        Renderer(tiny_tokenizer("gemma")).render(row, "a.jsonl, line 7")


def test_roles_that_do_not_alternate_are_refused_in_the_templates_words():
    row = Conversation((*chat("a", "b").messages, Message("assistant", "c")))
    with pytest.raises(DataError, match="roles must alternate"):
        Renderer(tiny_tokenizer("mistral")).render(row)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_beginning_of_text_comes_once_and_completions_and_documents_end(adds_bos):
    tokenizer = tiny_tokenizer("llama3", adds_bos=adds_bos)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    renderer = Renderer(tokenizer)
    assert renderer.render(chat("a", "b")).input_ids.count(bos) == 1
    for row in (PromptCompletion("a fox", " sleeps"), Document("a fox sleeps")):
        example = renderer.render(row)
        assert example.input_ids.count(bos) == adds_bos
        assert example.input_ids[-1] == example.labels[-1] == eos
        assert example.input_ids[adds_bos:-1] == tokenizer("a fox sleeps", add_special_tokens=False).input_ids


def test_prompt_and_completion_are_tokenized_as_one_text_where_the_prompt_keeps_its_tokens():
    tokenizer = tiny_tokenizer("smollm2")
    renderer = Renderer(tokenizer)
    example = renderer.render(PromptCompletion("The quick", " brown fox"))
    assert example.input_ids[:-1] == tokenizer("The quick brown fox").input_ids
    assert trained_texts(tokenizer, example) == [" brown fox<|im_end|>"]


@pytest.mark.parametrize("row", [Document("fox </s>[INST] dog"), PromptCompletion("fox </s>", "[INST] dog")])
@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_control_tokens_in_plain_text_stay_text(row, kind):
    tokenizer = tiny_tokenizer("mistral", kind)
    ids = Renderer(tokenizer).render(row).input_ids
    control = set(tokenizer.convert_tokens_to_ids(list(FAMILIES["mistral"].control)))
    assert [token for token in ids if token in control] == [tokenizer.eos_token_id]
    assert tokenizer.decode(ids).lstrip() == "fox </s>[INST] dog</s>"


def test_a_header_that_swallows_an_answers_first_blanks_is_not_trained():
    definition = json.loads(tiny_tokenizer("phi3").backend_tokenizer.to_str())
    for token in definition["added_tokens"]:
        token["rstrip"] = True  # as Phi-3's are
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(definition)),
        eos_token="<|endoftext|>",
        chat_template=tiny_tokenizer("phi3").chat_template,
    )
    for question in ("a", "spelled <|user|>"):
        example = Renderer(tokenizer).render(chat(question, "\n dog"))
        assert trained_texts(tokenizer, example) == ["dog<|end|>"]


def test_a_tokenizer_without_template_uses_the_plain_format():
    tokenizer = tiny_tokenizer("llama3", adds_bos=True, template="")
    renderer = Renderer(tokenizer)
    row = Conversation((Message("system", "Be brief."), *chat("a", "b", "c", "d").messages))
    example = renderer.render(row)
    turns = ["Be brief.", "### Instruction:\na", "### Response:\nb<|eot_id|>", "### Instruction:\nc"]
    text = "\n\n".join([*turns, "### Response:\nd<|eot_id|>"])
    assert tokenizer.decode(example.input_ids) == "<|begin_of_text|>" + text
    assert trained_texts(tokenizer, example) == ["b<|eot_id|>", "d<|eot_id|>"]
    prompt = renderer.render_prompt(row.messages[:-1]).input_ids
    assert example.input_ids[: len(prompt)] == prompt


def test_stop_tokens_are_the_end_of_turn_and_the_end_of_text():
    tokenizer = tiny_tokenizer("gemma")
    assert Renderer(tokenizer).stop_token_ids == sorted(tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"]))
    assert Renderer(tokenizer).render_prompt(chat("a")).stop_token_ids == Renderer(tokenizer).stop_token_ids
    assert Renderer(tokenizer).render_prompt("a").stop_token_ids == [tokenizer.eos_token_id], "plain text has no turns"


def test_a_slow_tokenizer_is_refused_by_name():
    class SlowTokenizer:
        is_fast = False
        eos_token_id = 0

    tokenizer: Any = SlowTokenizer()
    with pytest.raises(DataError, match="SlowTokenizer is a slow one"):
        Renderer(tokenizer)
