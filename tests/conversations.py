"""Conversations for a test, any that a template can express, and what comes of rendering them."""

import json

from hypothesis import strategies as st
from tiny_tokenizers import FAMILIES, trained_texts

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.rendering.renderer import Rendered, Renderer
from qlora_trainer.data.types import Conversation, Message, Row, ToolCall

TOOL = json.dumps({"name": "lookup", "description": "Looks up.", "parameters": {"type": "object", "properties": {}}})
KINDS = [(family, "bytes") for family in FAMILIES] + [("mistral", "metaspace"), ("phi3", "metaspace")]


def user(text: str) -> Message:
    return Message("user", text)


def answer(text: str, **parts) -> Message:
    return Message("assistant", text, **parts)


def call(city: str = "Rome", id: str | None = None) -> ToolCall:
    return ToolCall("lookup", json.dumps({"city": city}), id)


def chat(*contents: str) -> Conversation:
    """User and assistant in turn."""
    return Conversation(tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(contents)))


def answers_trained(tokenizer, example) -> list[str]:
    """The text of each unbroken run of trained tokens, without blanks before it: they may belong to its first token."""
    return [text.lstrip() for text in trained_texts(tokenizer, example)]


def outcome(renderer: Renderer, row: Row) -> Rendered | DataError:
    """What comes of one row: its examples, or the error."""
    (rendered,) = renderer.render_batch([("rows.jsonl, line 3", row)])
    return rendered


def one(renderer: Renderer, row: Row) -> Rendered:
    rendered = outcome(renderer, row)
    assert isinstance(rendered, Rendered)
    return rendered


def what_is_said(family: str, messages: tuple[Message, ...]) -> list[str | None]:
    """For each assistant turn what a model of the family has to say, None where its reasoning is never shown again.

    Written down from the families' documented formats, not by way of any template.
    """
    facts = FAMILIES[family]
    asked = max(index for index, message in enumerate(messages) if message.role == "user")
    said: list[str | None] = []
    calls = 0
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        text = message.content.strip() if facts.trims else message.content
        for made in message.tool_calls:
            assert facts.call is not None
            written = facts.call.replace('"Rome"', json.dumps(json.loads(made.arguments)["city"], ensure_ascii=False))
            text += ("\n" if text else "") + written.replace("000000000", f"{calls:09d}")
            calls += 1
        if family == "qwen3" and index > asked and (message.reasoning or index == len(messages) - 1):
            text = f"<think>\n{(message.reasoning or '').strip(chr(10))}\n</think>\n\n" + text.lstrip("\n")
        elif message.reasoning:
            said.append(None)
            continue
        said.append((text + facts.end_of_turn).lstrip())
    return said


words = st.sampled_from(
    [
        "fox",
        " dog",
        "42",
        "\n",
        " ",
        "é",
        "😀",
        '"',
        "<|im_end|>",
        "</s>",
        "<eos>",
        "<|end|>",
        "[INST]",
        "<|eot_id|>",
        "Q",
    ]
)
texts = st.lists(words, min_size=1, max_size=6).map("".join).filter(str.strip)


@st.composite
def conversations(draw, family: str) -> Conversation:
    """Any dialogue that the template can express: system texts, calls, results, reasoning, in any number of turns."""
    facts = FAMILIES[family]
    messages = [Message("system", draw(texts))] if facts.system and draw(st.booleans()) else []
    has_tools = facts.call is not None and draw(st.booleans())
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(texts)))
        while has_tools and draw(st.booleans()):
            thought = draw(texts) if family == "qwen3" and draw(st.booleans()) else None
            messages.append(answer("", tool_calls=(call(draw(texts)),), reasoning=thought))
            messages.append(Message("tool", draw(texts)))
        thought = draw(texts) if family == "qwen3" and draw(st.booleans()) else None
        messages.append(answer(draw(texts), reasoning=thought))
    return Conversation(tuple(messages), (TOOL,) if has_tools else ())


def blocks_of(body: str) -> str:
    """A template whose answers are `body`."""
    return (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
        "{%- if m.role == 'assistant' %}" + body + "{%- else %}{{- m.content + '<|im_end|>' }}{%- endif %}{{- '\n' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    )
