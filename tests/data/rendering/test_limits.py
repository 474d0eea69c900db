"""A row is rendered in bounded time and memory: a template that goes on forever is ended, with its row named."""

import time

import pytest
from tiny_tokenizers import tiny_tokenizer

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.rendering import limits
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.data.types import Conversation, Message

USUAL = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}" + "{% endfor %}" * 3
GROWS = "{% set t = namespace(x=messages[0].content) %}{% for i in range(60) %}{% set t.x = t.x ~ t.x %}{% endfor %}"
ONLY_A_LONG_ROW = "{% if messages[0].content | length > 99 %}{BODY}{% endif %}" + USUAL
AT_ONCE = [
    "{{ 'x' * 10 ** 10 }}",
    "{{ [messages[0].content] * 9999999999 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ 'x' | center(9999999999) }}",
    "{{ 'x'.ljust(9999999999) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%9999999999d' | format(1) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ [1] | batch(9999999999, 'x') | list }}",
]


def row(question: str = "What?") -> Conversation:
    return Conversation((Message("user", question), Message("assistant", "That.")))


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.2)
    monkeypatch.setattr(limits, "BYTES", 2**27)


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize("body", [LOOPS, GROWS], ids=["time", "memory"])
def test_a_template_that_does_not_end_on_one_row_is_ended_and_the_row_is_named(body: str) -> None:
    tokenizer = tiny_tokenizer("smollm2", template=ONLY_A_LONG_ROW.replace("{BODY}", body))
    renderer = Renderer(tokenizer)
    (bad,) = renderer.render_batch([("rows.jsonl, line 7", row("word " * 40))])
    assert isinstance(bad, DataError)
    assert str(bad).startswith("rows.jsonl, line 7: the model's chat template cannot render")
    assert "did not come to an end, or filled the memory, and was ended" in str(bad)
    (good,) = renderer.render_batch([("rows.jsonl, line 8", row())])
    assert not isinstance(good, DataError), "the next row is rendered"


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize("body", [LOOPS, GROWS], ids=["time", "memory"])
def test_a_template_that_never_ends_is_refused_at_once(body: str) -> None:
    with pytest.raises(DataError, match=r"chat template cannot be used: .* did not come to an end"):
        Renderer(tiny_tokenizer("smollm2", template=body + USUAL)).render(row())


@pytest.mark.parametrize("body", AT_ONCE)
def test_one_operation_that_would_fill_the_memory_is_not_begun(body: str) -> None:
    with pytest.raises(DataError, match="makes a text that would fill the memory"):
        Renderer(tiny_tokenizer("smollm2", template=body + USUAL)).render(row())


def test_usual_operations_are_computed() -> None:
    body = "{{ '%05.1f' % 1 ~ 'x' * 3 ~ 2 ** 5 ~ 7 % 4 ~ 'a'.ljust(3) ~ '{:>4}'.format(1) ~ 'x' | center(3) ~ '|' }}"
    tokenizer = tiny_tokenizer("smollm2", template="{{ '<|im_start|>' }}" + body + USUAL)
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "12345678 % {:99999999}"}], tokenize=False)
    assert Renderer(tokenizer).render(row("12345678 % {:99999999}")).input_ids[:8] == tokenizer(expected).input_ids[:8]
    assert "001.0xxx323a  " in expected


def test_time_that_others_take_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may keep a row waiting as long as it likes."""
    monkeypatch.setattr(limits, "SECONDS", 0.2)
    with limits.limited():
        time.sleep(0.6)
