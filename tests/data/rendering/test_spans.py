import json
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import FAMILIES, tiny_tokenizer, trained_texts

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.rendering.marked_blocks import NO_BLOCK
from qlora_trainer.data.rendering.renderer import CUT_AWAY, Rendered, Renderer
from qlora_trainer.data.rendering.spans import (
    IDS_NUMBERED,
    LAST_TURN_ONLY,
    PROMPT_DIFFERS,
    REASONING_LEFT_OUT,
    REASONING_NOT_SHOWN,
)
from qlora_trainer.data.rendering.targets import reference_answer
from qlora_trainer.data.types import Conversation, Message, ToolCall

TOOL = json.dumps({"name": "lookup", "description": "Looks up.", "parameters": {"type": "object", "properties": {}}})
KINDS = [(family, "bytes") for family in FAMILIES] + [("mistral", "metaspace"), ("phi3", "metaspace")]
WITH_CALLS = [family for family, facts in FAMILIES.items() if facts.call]


def user(text: str) -> Message:
    return Message("user", text)


def answer(text: str, **parts) -> Message:
    return Message("assistant", text, **parts)


def call(city: str = "Rome", id: str | None = None) -> ToolCall:
    return ToolCall("lookup", json.dumps({"city": city}), id)


@cache
def shared_renderer(family: str, kind: str) -> Renderer:
    """One for all conversations of a test, as in preparation: what it keeps of one must not show in another."""
    return Renderer(tiny_tokenizer(family, kind), max_length=10**6)


def answers_trained(tokenizer, example) -> list[str]:
    """The text of each unbroken run of trained tokens, without blanks before it: they may belong to its first token."""
    return [text.lstrip() for text in trained_texts(tokenizer, example)]


def one(renderer: Renderer, row: Conversation):
    (rendered,) = renderer.render_batch([("rows.jsonl, line 3", row)])
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


@pytest.mark.parametrize(
    ("family", "row", "reported"),
    [
        ("smollm2", Conversation((user("a"), answer("b")), (TOOL,)), r"leaves out the tools .*\(lookup\)"),
        ("phi3", Conversation((user("a"), answer("", tool_calls=(call(),)))), "leaves out the tool calls of turn 2"),
        ("llama3_1", Conversation((user("a"), answer("I look.", tool_calls=(call(),)))), "text next to .* of turn 2"),
        ("gemma", Conversation((user("a"), answer("b", reasoning="hm"))), "leaves out the reasoning of turn 2"),
        ("mistral_tools", Conversation((Message("system", "Be brief."), user("a"), answer("b"))), "leaves out turn 1"),
        ("llama3_1", Conversation((user("a"), answer("", tool_calls=(call(), call())))), "single tool-calls at once"),
        ("qwen3", Conversation((user("a"), answer("", tool_calls=(ToolCall("f", "[1]"),)))), "no JSON object"),
        ("qwen3", Conversation((user("a"), answer("b")), ('{"parameters": {}}',)), "has no name"),
    ],
)
def test_what_a_template_cannot_express_is_an_error_of_that_row_and_no_other(family, row, reported):
    good = Conversation((user("a"), answer("b")))
    results = Renderer(tiny_tokenizer(family)).render_batch([("x, line 1", good), ("x, line 2", row), ("x", good)])
    assert isinstance(results[0], Rendered)
    assert isinstance(results[1], DataError)
    assert isinstance(results[2], Rendered)
    with pytest.raises(DataError, match=f"^x, line 2.*{reported}"):
        raise results[1]
    assert results[0].examples == results[2].examples == [Renderer(tiny_tokenizer(family)).render(good)]


def test_reasoning_of_earlier_turns_is_left_out_unless_the_row_wants_it_trained():
    tokenizer = tiny_tokenizer("qwen3")
    row = Conversation((user("a"), answer("b", reasoning="r"), user("c"), answer("d", reasoning="s")))
    rendered = one(Renderer(tokenizer), row)
    assert rendered.warnings == (REASONING_LEFT_OUT,)
    assert answers_trained(tokenizer, rendered.examples[0]) == ["<think>\ns\n</think>\n\nd<|im_end|>"]
    wanted = replace(row, messages=(row.messages[0], replace(row.messages[1], learn=True), *row.messages[2:]))
    assert "wants turn 2 trained" in str(one(Renderer(tokenizer), wanted))
    unwanted = replace(row, messages=(row.messages[0], replace(row.messages[1], learn=False), *row.messages[2:]))
    assert one(Renderer(tokenizer), unwanted).warnings == (REASONING_NOT_SHOWN,)


def test_turns_that_cannot_be_placed_and_that_the_row_names_are_refused():
    rewriting = "{% for m in messages %}{{ m.content | upper }}{{ eos_token }}{% endfor %}"
    row = Conversation((user("a"), answer("one", learn=True), user("b"), answer("c")))
    assert "names turns to train" in str(one(Renderer(tiny_tokenizer("qwen3", template=rewriting)), row))


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


def blocks_of(body: str) -> str:
    """A template whose answers are `body`."""
    return (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
        "{%- if m.role == 'assistant' %}" + body + "{%- else %}{{- m.content + '<|im_end|>' }}{%- endif %}{{- '\n' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    )


@pytest.mark.parametrize(
    ("body", "trained", "warnings"),
    [
        ("{%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}", ["b<|im_end|>", "d<|im_end|>"], ()),
        (
            "{%- generation %}{{- m.content }}{%- endgeneration %}{{- '<|im_end|>' }}",
            ["b<|im_end|>", "d<|im_end|>"],
            (),
        ),
        (
            "{{- '(' }}{%- generation %}{{- m.content }}{%- endgeneration %}{{- ')<|im_end|>' }}",
            ["b", "<|im_end|>", "d", "<|im_end|>"],
            (),
        ),
        (
            "{%- generation %}{{- m.content + '<|im_end|>\n' }}{%- endgeneration %}",
            ["b<|im_end|>", "d<|im_end|>"],
            (),
        ),
        (
            "{%- if loop.last %}{%- generation %}{{- m.content }}{%- endgeneration %}{%- else %}{{- m.content }}"
            "{%- endif %}{{- '<|im_end|>' }}",
            ["d<|im_end|>"],
            (NO_BLOCK,),
        ),
        # Markers are longer than these words, and so defeated: the blocks alone tell.
        (
            "{%- generation %}{{- (m.content | reverse if m.content | length > 9 else m.content) + '<|im_end|>' }}"
            "{%- endgeneration %}",
            ["b<|im_end|>", "d<|im_end|>"],
            (),
        ),
    ],
    ids=["whole", "end outside", "part of it", "more than it", "last only", "markers defeated"],
)
def test_what_a_template_marks_as_generated_is_trained_with_the_end_of_the_turn(body, trained, warnings):
    tokenizer = tiny_tokenizer("generation", template=blocks_of(body))
    rendered = one(Renderer(tokenizer), Conversation((user("a"), answer("b"), user("c"), answer("d"))))
    assert answers_trained(tokenizer, rendered.examples[0]) == trained
    assert rendered.warnings == warnings


def test_a_generation_prompt_that_goes_on_beyond_the_row_is_reported():
    template = blocks_of("{{- m.content + '<|im_end|>' }}").replace("assistant\n", "assistant\n<think>\n")
    tokenizer = tiny_tokenizer("smollm2", template=template)
    row = Conversation((user("a"), answer("b")))
    assert one(Renderer(tokenizer), row).warnings == (PROMPT_DIFFERS,)
    thinking = Conversation((user("a"), answer("<think>\nhm</think>b")))
    assert one(Renderer(tokenizer), thinking).warnings == ()


def test_the_reference_answer_of_a_row_that_calls_is_none_and_tools_go_with_the_prompt():
    calling = Conversation((user("a"), answer("", tool_calls=(call(),))), (TOOL,))
    assert reference_answer(calling) is None
    answered = Conversation((*calling.messages, Message("tool", "x"), answer("b")), (TOOL,))
    assert reference_answer(answered) == (Conversation(answered.messages[:3], (TOOL,)), "b")
