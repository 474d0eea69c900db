import datetime
import importlib.util
import json
from pathlib import Path

import pytest
from tiny_tokenizers import FAMILIES, TEMPLATES, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.rendering.dialogue import make_dialogue, with_numbered_ids
from qlora_trainer.data.rendering.encoding import Encoder
from qlora_trainer.data.rendering.renderer import Rendered, Renderer
from qlora_trainer.data.rendering.templates import ChatTemplate
from qlora_trainer.data.types import Conversation, Message, ToolCall

DAY = datetime.date(2024, 2, 29)
TOOL = json.dumps({"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}})
CHAT = Conversation((Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")))
SYSTEM = Conversation((Message("system", "Be brief."), *CHAT.messages))
REASONED = Conversation((Message("user", "a"), Message("assistant", "b", reasoning="because")))
CALL = Conversation(
    (
        Message("user", "a"),
        Message("assistant", "", tool_calls=(ToolCall("lookup", '{"city": "Ærø", "n": 1}'),)),
        Message("tool", '{"found": true}'),
        Message("assistant", "b"),
    ),
    (TOOL,),
)


def template_of(tokenizer, tools: list | None = None, date: datetime.date | None = None) -> ChatTemplate:
    return ChatTemplate(tokenizer, tokenizer.get_chat_template(tools=tools), Encoder(tokenizer).control_pattern, date)


@pytest.mark.parametrize("row", [CHAT, SYSTEM, REASONED, CALL], ids=["chat", "system", "reasoned", "call"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_is_run_as_transformers_runs_it(family, row):
    tokenizer = tiny_tokenizer(family)
    plain = make_dialogue(row, "the row")
    dialogue = with_numbered_ids(plain) or plain
    documented = [{key: value for key, value in m.items() if key != "thinking"} for m in dialogue.messages]
    for generation in (False, True):
        try:
            expected = tokenizer.apply_chat_template(
                documented, tools=dialogue.tools, tokenize=False, add_generation_prompt=generation
            )
        except Exception:  # whatever the template raises
            with pytest.raises(DataError, match="the row: the model's chat template cannot render"):
                template_of(tokenizer).text(dialogue, "the row", generation)
        else:
            assert template_of(tokenizer).text(dialogue, "the row", generation) == expected


@pytest.mark.parametrize("family", ["gemma", "llama3", "llama3_1", "llama3_2", "phi3", "qwen2_5", "qwen3"])
def test_the_templates_tested_here_render_as_the_published_ones(family):
    """The published texts are those that TRL ships, where it is installed."""
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package trl, which holds published chat templates, is not installed")
    published = Path(next(iter(spec.submodule_search_locations))) / "chat_templates" / f"{family}.jinja"
    ours, theirs = (
        template_of(tiny_tokenizer(family, template=path.read_text(encoding="utf-8")))
        for path in (TEMPLATES / f"{family}.jinja", published)
    )
    for row in (CHAT, SYSTEM, REASONED, CALL):
        for generation in (False, True):
            texts = []
            for template in (ours, theirs):
                try:
                    texts.append(template.text(make_dialogue(row, "row"), "row", generation))
                except DataError as error:
                    texts.append(str(error))
            assert texts[0] == texts[1]


def test_a_date_is_noticed_by_what_is_written_and_fixed():
    dated = tiny_tokenizer("llama3_2")
    texts = [Renderer(dated, template_date=day).render(CHAT).input_ids for day in (DAY, DAY, datetime.date(2025, 1, 1))]
    assert texts[0] == texts[1] != texts[2]
    assert "Today Date: 29 Feb 2024" in dated.decode(texts[0])
    assert Renderer(dated, template_date=DAY).template_date == DAY
    assert Renderer(dated).template_date == datetime.date.today()
    for family in ("llama3", "qwen3", "llama3_1"):
        assert Renderer(tiny_tokenizer(family)).template_date is None
    mentions = "{# strftime_now #}{% set day = strftime_now('%d %b %Y') %}" + tiny_tokenizer("smollm2").chat_template
    assert Renderer(tiny_tokenizer("smollm2", template=mentions), template_date=DAY).template_date is None
    only_with_tools = "{% if tools %}{{ strftime_now('%Y') }}{% endif %}" + tiny_tokenizer("qwen2_5").chat_template
    assert Renderer(tiny_tokenizer("qwen2_5", template=only_with_tools), template_date=DAY).template_date == DAY
    assert Renderer(tiny_tokenizer("smollm2", template="")).template_date is None


def test_a_date_that_a_template_sets_itself_changes_only_by_name():
    tokenizer = tiny_tokenizer("llama3_1")
    assert "Today Date: 26 Jul 2024" in tokenizer.decode(Renderer(tokenizer).render(CHAT).input_ids)
    named = Renderer(tokenizer, template_date=DAY)
    assert named.template_date == DAY
    assert "Today Date: 29 Feb 2024" in tokenizer.decode(named.render(CHAT).input_ids)


def test_of_named_templates_the_one_that_transformers_takes_is_used_and_reported():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer("qwen2_5").backend_tokenizer,
        eos_token="<|im_end|>",
        chat_template={
            "default": tiny_tokenizer("smollm2").chat_template,
            "tool_use": tiny_tokenizer("qwen2_5").chat_template,
            "rag": "{{ raise_exception('never taken') }}",
        },
    )
    plain, calling = Renderer(tokenizer).render_batch([("row", CHAT), ("row", CALL)])
    assert isinstance(plain, Rendered)
    assert isinstance(calling, Rendered)
    assert "named SmolLM" in tokenizer.decode(plain.examples[0].input_ids)
    assert "<tool_call>" in tokenizer.decode(calling.examples[0].input_ids)
    assert plain.warnings == ("of the tokenizer's chat templates (default, rag, tool_use), default is used",)
    assert calling.warnings == ("of the tokenizer's chat templates (default, rag, tool_use), tool_use is used",)
    tokenizer.chat_template = {"rag": "x"}
    with pytest.raises(DataError, match="no default specified"):
        Renderer(tokenizer).render(CHAT)


def test_a_template_that_wants_arguments_as_text_gets_them():
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + '!' + c.function.arguments }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = tiny_tokenizer("qwen2_5", template=template)
    example = Renderer(tokenizer).render(Conversation(CALL.messages))
    assert 'lookup!{"city": "Ærø", "n": 1}<|im_end|>' in tokenizer.decode(example.input_ids)


@pytest.mark.parametrize(("roles", "advised"), [(["system", "user"], True), (["user", "user"], False)])
def test_a_refusal_speaks_of_the_system_text_only_where_there_is_one(roles, advised):
    template = "{% if messages|length > 2 %}{{ raise_exception('system, then user') }}{% endif %}<|im_end|>"
    row = Conversation((*(Message(role, "q") for role in roles), Message("assistant", "a")))
    with pytest.raises(DataError, match=r"It says: system, then user") as reported:
        Renderer(tiny_tokenizer("smollm2", template=template)).render(row)
    assert ("Put the system text" in str(reported.value)) is advised


def test_a_template_that_cannot_be_read_or_used_at_all_stops_everything():
    for template, reported in (
        ("{% for %}", "cannot be read"),
        ("{{ raise_exception('no') }}", "tried on one exchange"),
    ):
        with pytest.raises(DataError, match=reported):
            Renderer(tiny_tokenizer("smollm2", template=template)).render_batch([("row", CHAT)])
