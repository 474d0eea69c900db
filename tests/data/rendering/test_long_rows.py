"""A row that is too long ends with a whole answer, is dropped, or is refused; only plain text is cut within."""

from dataclasses import replace

import pytest
from conversations import answer, answers_trained, chat, conversations, one, user
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import FAMILIES, tiny_tokenizer

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.rendering.renderer import COMPLETION_CUT, CUT_AWAY, Renderer
from qlora_trainer.data.types import Conversation, Document, Example, Message, PromptCompletion


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


def test_the_most_turns_that_fit_are_kept_where_a_longer_beginning_is_shorter():
    """Qwen3 drops the reasoning of earlier turns: ending at the second answer is longer than ending at the third."""
    long = "word " * 80
    turns = [Message("user", "q1"), Message("assistant", "a1")]
    turns += [Message("user", "q2"), Message("assistant", "a2", reasoning=long)]
    turns += [Message("user", "q3"), Message("assistant", "a3", reasoning="t")]
    turns += [Message("user", "q4"), Message("assistant", long)]
    renderer = Renderer(tiny_tokenizer("qwen3"))
    lengths = [len(renderer.render(Conversation(tuple(turns[:end]))).input_ids) for end in (2, 4, 6)]
    assert lengths[0] < lengths[2] < lengths[1]
    renderer.max_length = lengths[2]
    result = one(renderer, Conversation(tuple(turns)))
    assert result.truncated
    assert result.rows == [Conversation(tuple(turns[:6]))]


def test_a_long_document_becomes_windows_that_hold_every_token_once():
    tokenizer = tiny_tokenizer("smollm2")
    text = "The quick brown fox. " * 40
    rendered = one(Renderer(tokenizer, max_length=64), Document(text))
    joined = [token for example in rendered.examples for token in example.input_ids]
    assert joined == [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    assert all(example.labels == example.input_ids for example in rendered.examples)
    lengths = [len(example.input_ids) for example in rendered.examples]
    assert max(lengths) <= 64
    assert max(lengths) - min(lengths) <= 1
    assert "".join(row.text for row in rendered.rows if isinstance(row, Document)) == text + "<|im_end|>"


def test_long_rows_are_cut_dropped_or_refused_as_asked():
    tokenizer = tiny_tokenizer("smollm2")
    row = chat("a", "b", "c", "The quick brown fox. " * 40)
    whole = Renderer(tokenizer).render(row)
    cut = one(Renderer(tokenizer, max_length=64), row)
    assert cut.truncated
    assert cut.tokens == len(whole.input_ids)
    assert cut.examples == [Renderer(tokenizer).render(chat("a", "b"))]
    assert cut.rows == [chat("a", "b")]
    dropped = one(Renderer(tokenizer, max_length=64, too_long="drop"), row)
    assert (dropped.examples, dropped.dropped) == ([], "longer than max_length")
    with pytest.raises(DataError, match=rf"x.json, row 2: the row has {len(whole.input_ids)} tokens, more than 64"):
        Renderer(tokenizer, max_length=64, too_long="error").render(row, "x.json, row 2")


def test_a_completion_that_is_cut_teaches_no_end_and_is_reported():
    tokenizer = tiny_tokenizer("smollm2")
    row = PromptCompletion("The quick", " brown fox." * 40)
    whole = Renderer(tokenizer).render(row)
    cut = one(Renderer(tokenizer, max_length=64), row)
    assert (cut.truncated, cut.warnings, cut.tokens) == (True, (COMPLETION_CUT,), len(whole.input_ids))
    assert cut.examples == [Example(whole.input_ids[:64], whole.labels[:64])]
    assert tokenizer.eos_token_id not in cut.examples[0].labels
    away = one(Renderer(tokenizer, max_length=64), PromptCompletion("fox " * 90, "dog"))
    assert (away.examples, away.dropped, away.truncated, away.warnings) == ([], CUT_AWAY, False, ())


def test_a_row_whose_answer_is_cut_away_is_dropped():
    row = chat("The quick brown fox. " * 40, "ok")
    rendered = one(Renderer(tiny_tokenizer("smollm2"), max_length=64), row)
    assert rendered.examples == []
    assert rendered.dropped == CUT_AWAY
    assert not rendered.truncated
