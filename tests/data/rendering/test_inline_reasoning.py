"""Reasoning that is written into an answer is trained, or the row is refused by name, with a way that works."""

import re
from dataclasses import replace
from typing import Any

import pytest
from tiny_tokenizers import tiny_tokenizer

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.rendering.renderer import Rendered, Renderer
from qlora_trainer.data.rendering.spans import REASONING_LEFT_OUT, REASONING_NOT_SHOWN
from qlora_trainer.data.types import Conversation, Message

START = '"<|im_start|>" + m.role + "\\n"'
OTHERS = '{%- else -%}{{- "<|im_start|>" + m.role + "\\n" + m.content + "<|im_end|>" -}}{%- endif -%}{%- endfor -%}'
PROMPT = '{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\\n" }}{%- endif -%}'


def template_of(answer: str) -> str:
    return (
        '{%- for m in messages -%}{%- if m.role == "assistant" -%}{{- "<|im_start|>assistant\\n" -}}'
        + answer
        + '{{- "<|im_end|>" -}}'
        + OTHERS
        + PROMPT
    )


# As DeepSeek's R1 family and EXAONE 4: of an answer, what is after </think>.
DROPS = template_of("{{- m.content.split('</think>')[-1] -}}")
DROPS_EARLIER = template_of("{{- m.content if loop.last else m.content.split('</think>')[-1] -}}")
# As Qwen3: the block is read, and written again; without one, an empty one is written.
READS = template_of(
    "{%- set thought = m.reasoning_content or '' -%}{%- set said = m.content -%}"
    "{%- if '</think>' in said -%}{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip() -%}"
    "{%- set said = said.split('</think>')[-1].lstrip() -%}{%- endif -%}"
    "{{- '<think>\\n' + thought + '\\n</think>\\n\\n' + said if loop.last or thought else said -}}"
)
KEEPS = template_of("{{- m.content -}}")
UNLISTED = template_of("{{- m.content | replace('secret', '') -}}")
THOUGHT = "<think>\nSeven eights are fifty-six.\n</think>\n\n"
SHORT, LONG = "56", "Seven times eight is fifty-six, that is to say 56."


def chat(*contents: str, **more: Any) -> Conversation:
    messages = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(contents)]
    return Conversation((*messages[:-1], replace(messages[-1], **more)))


def render(template: str, row: Conversation, **settings: Any) -> tuple[str, tuple[str, ...]] | DataError:
    tokenizer = tiny_tokenizer("smollm2", template=template)
    (found,) = Renderer(tokenizer, **settings).render_batch([("rows.jsonl, line 3", row)])
    if isinstance(found, DataError):
        return found
    assert isinstance(found, Rendered)
    labels = found.examples[0].labels
    return tokenizer.decode([label for label in labels if label != -100]), found.warnings


@pytest.mark.parametrize("answer", [SHORT, LONG])
@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("template", [DROPS, DROPS_EARLIER], ids=["in all turns", "in earlier turns"])
def test_a_template_that_drops_it_refuses_the_row_by_name(
    template: str, answer: str, train_on: Any, turns: int
) -> None:
    row = chat(*["Seven times eight?", THOUGHT + answer] * turns)
    found = render(template, row, train_on=train_on)
    if template == DROPS_EARLIER and turns == 1:
        assert isinstance(found, tuple)
        assert "Seven eights are fifty-six." in found[0], "the last turn's is written"
        return
    assert isinstance(found, DataError)
    assert re.match(r"rows.jsonl, line 3: .*drops what is before </think> in turn 2", str(found))
    advised = chat(*["Seven times eight?", answer] * turns)
    assert "Take it out of the row" in str(found)
    assert isinstance(render(template, advised, train_on=train_on), tuple), "the way out works"


def test_advice_for_reasoning_of_its_own_works() -> None:
    apart = chat("Seven times eight?", SHORT, reasoning="Seven eights are fifty-six.")
    refused = render(DROPS, apart)
    assert "Write it into" not in str(refused), "the template drops it there too"
    assert isinstance(render(DROPS, chat("Seven times eight?", SHORT)), tuple)
    refused = render(KEEPS, apart)
    assert "Write it into the turn's content, as the model should say it" in str(refused)
    found = render(KEEPS, chat("Seven times eight?", THOUGHT + SHORT))
    assert found == (THOUGHT + SHORT + "<|im_end|>", ())


@pytest.mark.parametrize("answer", [SHORT, LONG])
@pytest.mark.parametrize("thought", [THOUGHT, "Seven eights are fifty-six.\n</think>\n\n"], ids=["block", "end alone"])
def test_a_template_that_has_a_place_for_reasoning_gets_it_there(answer: str, thought: str) -> None:
    found = render(READS, chat("Seven times eight?", thought + answer))
    assert found == (THOUGHT + answer + "<|im_end|>", ())


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_an_empty_block_is_no_reasoning(train_on: Any) -> None:
    empty = "<think>\n\n</think>\n\n"
    found = render(READS, chat("Seven times eight?", empty + SHORT), train_on=train_on)
    assert found == render(READS, chat("Seven times eight?", SHORT), train_on=train_on)
    assert isinstance(found, tuple)
    assert found[0].endswith(empty + SHORT + "<|im_end|>")


@pytest.mark.parametrize(
    ("train_on", "warning"),
    [("assistant", REASONING_LEFT_OUT), ("last", REASONING_NOT_SHOWN), ("all", REASONING_LEFT_OUT)],
)
@pytest.mark.parametrize("inline", [True, False])
def test_what_a_template_leaves_out_of_earlier_turns_is_reported(train_on: Any, warning: str, inline: bool) -> None:
    tokenizer = tiny_tokenizer("qwen3")
    earlier = (
        Message("assistant", "<think>\nhm\n</think>\n\none") if inline else Message("assistant", "one", reasoning="hm")
    )
    last = Message("assistant", "<think>\nso\n</think>\n\ntwo")
    row = Conversation((Message("user", "1?"), earlier, Message("user", "2?"), last))
    (found,) = Renderer(tokenizer, train_on=train_on).render_batch([("row", row)])
    assert isinstance(found, Rendered)
    assert found.warnings == (warning,)
    trained = tokenizer.decode([label for label in found.examples[0].labels if label != -100])
    assert trained.endswith("<think>\nso\n</think>\n\ntwo<|im_end|>" + ("\n" if train_on == "all" else ""))
    assert "hm" not in trained
    assert "one" not in trained, "a turn without its reasoning is not trained"


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_any_other_words_that_a_template_drops_refuse_the_row(train_on: Any) -> None:
    found = render(UNLISTED, chat("What?", "The secret is out."), train_on=train_on)
    assert isinstance(found, DataError)
    assert "drops words of turn 2, such as 'secret'" in str(found)
    assert isinstance(render(UNLISTED, chat("What?", "It is out."), train_on=train_on), tuple)
