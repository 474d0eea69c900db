"""What is trained is the model's own words: never what a tool said within a turn of the model's."""

from dataclasses import replace
from typing import Any

import pytest
from tiny_tokenizers import tiny_tokenizer

from qlora_trainer.data.rendering.renderer import Rendered, Renderer
from qlora_trainer.data.types import Conversation, Message, ToolCall

# As Gemma 4's: a turn's calls, the tools' results, then what the turn says.
RESULTS_INSIDE = """\
{%- for m in messages -%}
{%- if m.role != "tool" -%}
{{- "<|im_start|>" + m.role + "\\n" -}}
{%- for c in m.tool_calls or [] -%}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{%- endfor -%}
{%- if m.tool_calls -%}
{%- for later in messages[loop.index0 + 1:] -%}
{%- if later.role == "tool" -%}<result>{{ later.content }}</result>{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- SAID -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\\n" }}{%- endif -%}
"""
# A result between each call and the next, as a template might write parallel calls.
RESULTS_BETWEEN = """\
{%- for m in messages -%}
{%- if m.role != "tool" -%}
{{- "<|im_start|>" + m.role + "\\n" -}}
{%- set turn = loop.index0 -%}
{%- for c in m.tool_calls or [] -%}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>
{%- set at = turn + loop.index -%}
{%- if at < messages | length and messages[at].role == "tool" -%}
<result>{{ messages[at].content }}</result>
{%- endif -%}
{%- endfor -%}
{{- m.content + "<|im_end|>\\n" -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\\n" }}{%- endif -%}
"""
END = 'm.content + "<|im_end|>\\n"'
MARKED = f'("<text>" if m.tool_calls else "") + {END}'


def call(city: str, number: str) -> ToolCall:
    return ToolCall("lookup", f'{{"city": "{city}"}}', number)


def row(*calls: ToolCall, said: str = "Let me look.", ends_in_the_turn: bool = False) -> Conversation:
    results = [Message("tool", f"ZEBRA {made.arguments[-4:-2]}", tool_call_id=made.id) for made in calls]
    turns = [Message("user", "Where is it?"), Message("assistant", said, tool_calls=calls), *results]
    return Conversation(tuple(turns if ends_in_the_turn else [*turns, Message("assistant", "It is far.")]))


def trained_pieces(template: str, conversation: Conversation, **settings: Any) -> list[str]:
    tokenizer = tiny_tokenizer("smollm2", template=template)
    (found,) = Renderer(tokenizer, **settings).render_batch([("row", conversation)])
    assert isinstance(found, Rendered)
    (example,) = found.examples
    pieces: list[list[int]] = [[]]
    for label in example.labels:
        if label == -100:
            pieces.append([])
        else:
            pieces[-1].append(label)
    return [tokenizer.decode(piece) for piece in pieces if piece]


ROME = '<call>lookup {"city": "Rome"}</call>'
OSLO = '<call>lookup {"city": "Oslo"}</call>'


@pytest.mark.parametrize(
    ("template", "conversation", "trained"),
    [
        (RESULTS_INSIDE.replace("SAID", END), row(call("Rome", "a")), [ROME, "Let me look.<|im_end|>"]),
        (RESULTS_INSIDE.replace("SAID", MARKED), row(call("Rome", "a")), [ROME, "<text>Let me look.<|im_end|>"]),
        (
            RESULTS_INSIDE.replace("SAID", END),
            row(call("Rome", "a"), call("Oslo", "b")),
            [ROME + OSLO, "Let me look.<|im_end|>"],
        ),
        (
            RESULTS_BETWEEN,
            row(call("Rome", "a"), call("Oslo", "b")),
            [ROME, OSLO, "Let me look.<|im_end|>"],
        ),
    ],
    ids=["a result inside", "text with an opening", "results of two calls", "results between calls"],
)
def test_a_tools_result_within_the_models_turn_is_not_trained(
    template: str, conversation: Conversation, trained: list[str]
) -> None:
    assert trained_pieces(template, conversation) == [*trained, "It is far.<|im_end|>"]


@pytest.mark.parametrize("train_on", ["assistant", "last"])
def test_nor_is_it_where_that_turn_is_the_last(train_on: Any) -> None:
    template = RESULTS_INSIDE.replace("SAID", END)
    pieces = trained_pieces(template, row(call("Rome", "a"), ends_in_the_turn=True), train_on=train_on)
    assert pieces == [ROME, "Let me look.<|im_end|>"]


def test_with_every_token_trained_an_excluded_turn_leaves_the_result_between_its_parts_trained() -> None:
    conversation = row(call("Rome", "a"))
    turns = list(conversation.messages)
    turns[1] = replace(turns[1], learn=False)
    pieces = trained_pieces(RESULTS_INSIDE.replace("SAID", END), Conversation(tuple(turns)), train_on="all")
    assert pieces[1].startswith("<result>ZEBRA")
    assert not any("Let me look." in piece or "<call>" in piece for piece in pieces)
