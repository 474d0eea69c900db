"""What a template leaves out is an error of the row that says it."""

import pytest
from conversations import TOOL, answer, call, chat, user
from tiny_tokenizers import tiny_tokenizer, trained_texts

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.rendering.renderer import Rendered, Renderer
from qlora_trainer.data.types import Conversation, Message, ToolCall


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


def test_a_turn_that_the_template_leaves_out_is_refused_by_number():
    row = Conversation((*chat("a", "b").messages, Message("tool", "result 42"), Message("assistant", "c")))
    with pytest.raises(DataError, match="line 5: the model's chat template leaves out turn 3, of role tool"):
        Renderer(tiny_tokenizer("phi3")).render(row, "x.jsonl, line 5")
    for family in ("smollm2", "llama3", "qwen2_5", "qwen3"):
        assert trained_texts(tiny_tokenizer(family), Renderer(tiny_tokenizer(family)).render(row))
