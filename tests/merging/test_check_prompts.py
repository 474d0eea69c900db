"""Promises of the prompts that plain transformers is asked: by every family's template, the tokens of evaluate."""

import datetime
from typing import Any

import pytest
from tiny_tokenizers import FAMILIES, tiny_tokenizer

from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.data.types import Conversation, Document, Example, Message, PromptCompletion, Row, ToolCall
from qlora_trainer.merging.check_prompts import choose_prompts, fallback_prompts, make_prompt
from qlora_trainer.merging.plain_check import render

TOOL = '{"name": "lookup", "description": "Looks up.", "parameters": {"type": "object", "properties": {}}}'
CALLED = (
    Message("user", "Weather?"),
    Message("assistant", "", tool_calls=(ToolCall("lookup", '{"city": "Rome"}', "call_1"),)),
    Message("tool", "hot", tool_call_id="call_1", name="lookup"),
)
ASKED = (Message("user", " What is\n the capital? "), Message("assistant", "Paris."), Message("user", "Why?"))
VICUNA = (
    "{% for m in messages %}{{ ('USER: ' if m.role == 'user' else 'ASSISTANT: ') + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


class Rows:
    """Rows as an ExampleSet has them, with their examples."""

    def __init__(self, renderer: Renderer, rows: list[Row]) -> None:
        self.rows, self.examples = rows, [renderer.render(row) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def row(self, index: int) -> Row:
        return self.rows[index]

    def where(self, index: int) -> str:
        return f"row {index}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_plain_transformers_renders_a_familys_prompts_as_evaluate_does(family: str, kind: str) -> None:
    """With calls and their ids, and a template's date other than today."""
    tokenizer = tiny_tokenizer(family, kind)
    renderer = Renderer(tokenizer, template_date=datetime.date(2020, 2, 29))
    prompts = [Conversation(ASKED)]
    if FAMILIES[family].call:
        prompts.append(Conversation(CALLED, (TOOL,)))
    for prompt in prompts:
        made = make_prompt(renderer, tokenizer, prompt, "row 1")
        assert made.tokens == renderer.render_prompt(prompt).input_ids
        assert render(tokenizer, made.asked) == made.tokens
        assert "messages" in made.asked


def test_a_blank_at_the_end_of_a_templates_prompt_is_asked_too() -> None:
    tokenizer = tiny_tokenizer("mistral", template=VICUNA)
    made = make_prompt(Renderer(tokenizer), tokenizer, Conversation(ASKED), "row 1")
    assert "messages" in made.asked
    assert render(tokenizer, made.asked) == made.tokens


def test_where_the_bases_own_template_asks_otherwise_the_tokens_are_given() -> None:
    """As of a template without a generation prompt, where training begins an answer after its header."""
    template = VICUNA.partition("{% if add_generation_prompt")[0]
    tokenizer = tiny_tokenizer("mistral", template=template)
    made = make_prompt(Renderer(tokenizer), tokenizer, Conversation(ASKED), "row 1")
    assert made.asked == {"ids": made.tokens}
    assert render(tokenizer, made.asked) == made.tokens


def test_where_transformers_makes_another_tokenizer_of_the_bases_files_the_tokens_are_given() -> None:
    """Or none at all."""
    renderer = Renderer(tiny_tokenizer("qwen2_5"))
    for plain in (tiny_tokenizer("qwen2_5", "metaspace"), None):
        made = make_prompt(renderer, plain, Conversation(ASKED), "row 1")
        assert made.asked == {"ids": renderer.render_prompt(ASKED).input_ids}


def test_the_shortest_prompts_of_rows_of_any_kind_are_chosen_without_spelled_control_tokens() -> None:
    renderer = Renderer(tiny_tokenizer("qwen2_5"))
    rows: list[Row] = [
        Conversation((Message("user", "What does <|im_end|> do?"), Message("assistant", "It ends."))),
        Conversation((Message("user", "A long question " * 5), Message("assistant", "Yes."))),
        Conversation((Message("user", "Two?"), Message("assistant", "Yes."))),
        PromptCompletion("Question: one \nAnswer: ", "Yes."),
        Document("The quick brown fox jumps over the lazy dog. " * 4),
        Conversation((Message("user", "Three?"), Message("assistant", "No."))),
    ]
    made: Any = Rows(renderer, rows)
    prompts, left_out = choose_prompts(renderer, renderer.tokenizer, made)
    assert left_out == 1
    by_row = {prompt.where: prompt for prompt in prompts}
    assert by_row.keys() == {"row 2", "row 3", "row 4", "row 5"}, "not the longest"
    for prompt in prompts:
        assert render(renderer.tokenizer, prompt.asked) == prompt.tokens
    assert renderer.tokenizer.decode(by_row["row 5"].expected).strip() == "No.<|im_end|>"
    assert by_row["row 4"].asked["text"].startswith("The quick brown fox jumps over the lazy dog. The quick")


@pytest.mark.parametrize("has_conversations", [False, True])
def test_where_rows_are_gone_sentences_are_asked(has_conversations: bool) -> None:
    renderer = Renderer(tiny_tokenizer("smollm2"))
    (prompt,) = fallback_prompts(renderer, renderer.tokenizer, ["The quick fox"], has_conversations)
    assert ("messages" in prompt.asked) == has_conversations
    assert render(renderer.tokenizer, prompt.asked) == prompt.tokens
