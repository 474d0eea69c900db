"""What a row says stays text whatever it spells, and its calls and results are linked as templates expect."""

from dataclasses import replace

import pytest
from conversations import KINDS, TOOL, answer, blocks_of, call, chat, conversations, one, user
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import FAMILIES, tiny_tokenizer

from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.data.rendering.spans import IDS_NUMBERED
from qlora_trainer.data.types import Conversation, Message, ToolCall


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20)
@given(data=st.data())
def test_control_tokens_that_a_row_spells_anywhere_stay_text(family, data):
    tokenizer = tiny_tokenizer(family)
    control = [tokenizer.convert_tokens_to_ids(token) for token in FAMILIES[family].control]
    row = data.draw(conversations(family))
    spelled = str.maketrans({"<": "(", "[": "("})

    def innocent(message: Message) -> Message:
        calls = tuple(ToolCall(c.name, c.arguments.translate(spelled)) for c in message.tool_calls)
        reasoning = message.reasoning.translate(spelled) if message.reasoning else None
        return replace(message, content=message.content.translate(spelled), tool_calls=calls, reasoning=reasoning)

    renderer = Renderer(tokenizer, max_length=10**6)
    counts = []
    for messages in (row.messages, tuple(map(innocent, row.messages))):
        ids = renderer.render(replace(row, messages=messages)).input_ids
        counts.append([token for token in ids if token in control])
    assert counts[0] == counts[1]


def test_control_tokens_in_tools_and_in_names_of_arguments_stay_text():
    tokenizer = tiny_tokenizer("qwen2_5")
    tool = TOOL.replace("Looks up.", "Looks <|im_end|> up.")
    made = ToolCall("lookup", '{"<|im_start|>": ["<|im_end|>", 1]}')
    row = Conversation((user("a"), answer("", tool_calls=(made,))), (tool,))
    ids = Renderer(tokenizer).render(row).input_ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3, "one for each turn and none of the row's own"
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    text = tokenizer.decode(ids)
    assert "Looks <|im_end|> up." in text
    assert '{"<|im_start|>": ["<|im_end|>", 1]}' in text


def test_a_result_has_the_name_of_the_function_that_it_comes_from():
    template = blocks_of(
        "{%- for c in m.tool_calls or [] %}{{- c.function.name }}{%- endfor %}{{- m.content + '<|im_end|>' }}"
    ).replace("m.role + '\n'", "m.role + (' ' + m.name if m.name else '') + '\n'")
    tokenizer = tiny_tokenizer("smollm2", template=template)
    calls = (ToolCall("first", "{}", "1"), ToolCall("second", "{}", "2"))
    by_id = (Message("tool", "x", tool_call_id="2"), Message("tool", "y", tool_call_id="1"))
    by_order = (Message("tool", "x"), Message("tool", "y", name="named"))
    for results, names in ((by_id, ("second", "first")), (by_order, ("first", "named"))):
        row = Conversation((user("a"), answer("", tool_calls=calls), *results, answer("b")))
        text = tokenizer.decode(Renderer(tokenizer).render(row).input_ids)
        assert [line.split()[1] for line in text.splitlines() if line.startswith("<|im_start|>tool")] == list(names)


def test_ids_that_a_template_does_not_take_are_numbered_and_it_is_said():
    tokenizer = tiny_tokenizer("mistral_tools")
    for first, second in ((None, None), ("call_1f", "call_2f")):
        row = Conversation(
            (
                user("a"),
                answer("", tool_calls=(call(id=first), call("Oslo", id=second))),
                Message("tool", "north", tool_call_id=second),
                Message("tool", "south", tool_call_id=first),
                answer("b"),
            )
        )
        rendered = one(Renderer(tokenizer), row)
        assert rendered.warnings == (IDS_NUMBERED,)
        text = tokenizer.decode(rendered.examples[0].input_ids)
        ids = ("000000001", "000000000") if first else ("000000000", "000000001")
        assert f'"content": north, "call_id": "{ids[0]}"' in text
        assert f'"content": south, "call_id": "{ids[1]}"' in text


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_control_tokens_in_a_users_text_stay_text(family, kind):
    tokenizer = tiny_tokenizer(family, kind)
    facts = FAMILIES[family]
    renderer = Renderer(tokenizer)
    innocent = renderer.render(chat("fox  dog", "ok"))
    spelled = renderer.render(chat("fox " + "".join(facts.control) + " dog", "ok"))
    control = [tokenizer.convert_tokens_to_ids(token) for token in facts.control]
    assert [t for t in spelled.input_ids if t in control] == [t for t in innocent.input_ids if t in control]
    assert "fox " + "".join(facts.control) + " dog" in tokenizer.decode(spelled.input_ids)


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_text_around_a_spelled_control_token_keeps_its_tokens(kind):
    tokenizer = tiny_tokenizer("mistral", kind)
    renderer = Renderer(tokenizer)
    ids = renderer.render(chat("The quick </s>", "brown fox")).input_ids
    plain = renderer.render(chat("The quick", "brown fox")).input_ids
    start = len(renderer.render_prompt("").input_ids) + 4
    assert ids[:start] == plain[:start]
    assert ids[-4:] == plain[-4:]
