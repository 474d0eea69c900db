"""A row is rendered in bounded time and memory: a template that goes on forever is ended, with its row named."""

import time

import pytest
from tiny_tokenizers import tiny_tokenizer

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.rendering import template_limits
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.data.types import Conversation, Message

USUAL = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}" + "{% endfor %}" * 3
GROWS = "{% set t = namespace(x=messages[0].content) %}{% for i in range(60) %}{% set t.x = t.x ~ t.x %}{% endfor %}"
ONLY_A_LONG_ROW = "{% if messages[0].content | length > 99 %}{BODY}{% endif %}" + USUAL
NESTED = "{% set t = namespace(x=['x']) %}{% for i in range(60) %}{% set t.x = [t.x, t.x] %}{% endfor %}"
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
    "{% set t = namespace(n=3) %}{% for i in range(99999) %}{% set t.n = t.n * t.n %}{% endfor %}",
    "{% set x = 'x' * 50000 %}{{ x | replace('x', x) }}",
    "{% set x = 'x' * 50000 %}{{ x.replace('x', x) }}",
    "{% set x = 'x' * 50000 %}{{ x | list | join(x) }}",
    "{% set x = 'x' * 50000 %}{{ x.join(x | list) }}",
    "{{ range(99999) | batch(2) | sum(start=[]) }}",
    "{% set x = [range(99999) | list] * 500 %}{{ x | sum(start=[]) | length }}",
    "{{ '{:{}}'.format('', 9999999999) }}",
    "{{ '{:{}{}}'.format('', '99999', '99999') }}",
    "{{ '%*d' % (9999999999, 1) }}",
    "{{ ('\\t' * 50000).expandtabs(60000000) }}",
    "{{ ('x' * 50000).translate({120: 'y' * 50000}) }}",
    "{{ ('x\\n' * 50000) | indent('y' * 50000) }}",
    "{{ [[[1]]] | tojson(indent=60000000) }}",
    "{{ ('x ' * 50000) | wordwrap(1, wrapstring='y' * 50000) }}",
    "{{ (1).to_bytes(9999999999) }}",
    "{{ 'x' * 20000000 }}",
    NESTED + "{{ t.x }}",
    NESTED + "{{ t.x | string }}",
    NESTED + "{{ t.x | tojson }}",
    NESTED + "{{ '' ~ t.x }}",
    NESTED + "{% set y = 'a' ~ 1 ~ (t.x if true else '') ~ 'b' %}",
    NESTED + "{% macro m(y) %}{{ (y ~ y) | length }}{% endmacro %}{{ m(t.x) }}",
    NESTED + "{% set y = '%s' % t.x %}",
    NESTED + "{% set y = '%s %s' % (1, t.x) %}",
    NESTED + "{% set y = '%s' | format(t.x) %}",
    NESTED + "{% set y = '{}'.format(t.x) %}",
    NESTED + "{% set y = '{x}'.format(x=t.x) %}",
    NESTED + "{% set y = '{x}'.format_map({'x': t.x}) %}",
    *(NESTED + f"{{% set y = t.x | {name} %}}" for name in sorted(template_limits._LINEAR_TEXT_FILTERS)),
]


def row(question: str = "What?") -> Conversation:
    return Conversation((Message("user", question), Message("assistant", "That.")))


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.2)
    monkeypatch.setattr(template_limits, "BYTES", 2**27)


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


def test_an_operation_that_only_a_long_row_makes_huge_names_the_row() -> None:
    body = "{% set x = messages[0].content * 300 %}{{ x | replace('w', x) }}"
    renderer = Renderer(tiny_tokenizer("smollm2", template=ONLY_A_LONG_ROW.replace("{BODY}", body)))
    bad, good = renderer.render_batch([("rows.jsonl, line 7", row("word " * 40)), ("rows.jsonl, line 8", row())])
    assert isinstance(bad, DataError)
    assert str(bad).startswith("rows.jsonl, line 7: the model's chat template cannot render")
    assert not isinstance(good, DataError)


def test_memory_that_is_filled_before_the_first_look_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "BYTES", 2**27)
    monkeypatch.setattr(template_limits, "_LOOK_EVERY", 0.3)

    def fill() -> None:
        with template_limits.limited():
            filled = bytearray(b"x") * 2**28
            until = time.process_time() + 3
            while filled and time.process_time() < until:
                pass

    with pytest.raises(template_limits.TemplateLimitError):
        fill()


def test_long_rows_are_computed_as_usual() -> None:
    body = "{{ messages[0].content | replace('word', 'sword') | trim | truncate(9) ~ '-' | join('x') }}"
    long = row("word " * 400_000)
    assert not isinstance(Renderer(tiny_tokenizer("smollm2", template=body + USUAL)).texts([("r", long)])[0], DataError)


def test_usual_operations_are_computed() -> None:
    body = "{{ '%05.1f' % 1 ~ 'x' * 3 ~ 2 ** 5 ~ 7 % 4 ~ 'a'.ljust(3) ~ '{:>4}'.format(1) ~ 'x' | center(3) ~ '|' }}"
    tokenizer = tiny_tokenizer("smollm2", template="{{ '<|im_start|>' }}" + body + USUAL)
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "12345678 % {:99999999}"}], tokenize=False)
    assert Renderer(tokenizer).render(row("12345678 % {:99999999}")).input_ids[:8] == tokenizer(expected).input_ids[:8]
    assert "001.0xxx323a  " in expected


def test_time_that_others_take_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may keep a row waiting as long as it likes."""
    monkeypatch.setattr(template_limits, "SECONDS", 0.2)
    with template_limits.limited():
        time.sleep(0.6)
