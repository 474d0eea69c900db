from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import tiny_tokenizer

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.rendering.encoding import Encoder, Span, trained_runs

pieces = st.sampled_from(["The quick", " brown", " ", "\n", "fox", "é", "😀", "<|im_end|>", "x" * 9, "</s>", ""])
spans = st.lists(st.builds(Span, pieces, st.booleans()), min_size=1, max_size=8)


@settings(max_examples=150)
@given(text=spans, kind=st.sampled_from(["bytes", "metaspace"]))
def test_a_token_is_trained_if_and_only_if_a_character_of_it_is(text, kind):
    tokenizer = tiny_tokenizer("mistral" if kind == "metaspace" else "smollm2", kind)
    joined = "".join(span.text for span in text)
    encoding = tokenizer.backend_tokenizer.encode(joined, add_special_tokens=False)
    trained = [flag for span in text for flag in [span.trained] * len(span.text)]
    expected = [any(trained[start:end]) for start, end in encoding.offsets]
    (encoded,) = Encoder(tokenizer).encode([text])
    assert not isinstance(encoded, DataError)
    found = [any(begin <= index < end for begin, end in encoded.trained) for index in range(len(encoded.ids))]
    assert encoded.ids == encoding.ids
    assert found == expected


def test_blanks_that_a_control_token_swallows_are_not_trained_with_what_follows():
    text = [Span("<s>", False), Span("  a", True)]
    assert trained_runs(text, [7, 8], [(0, 5), (5, 6)], control={7}) == [(1, 2)]
    assert trained_runs([Span("<s>", True), Span("  a", False)], [7, 8], [(0, 5), (5, 6)], {7}) == [(0, 1)]


def test_blanks_that_offsets_leave_out_count_to_the_token_after_them():
    text = [Span("a", False), Span(" ", True), Span("b", False)]
    assert trained_runs(text, [1, 2], [(0, 1), (2, 3)], control=()) == [(1, 2)]
    assert trained_runs([Span(" ", True), Span("b", False)], [2], [(1, 2)], control=()) == [(0, 1)]


def test_runs_that_touch_are_one():
    text = [Span("ab", True), Span("cd", True)]
    assert trained_runs(text, [1, 2, 3], [(0, 1), (1, 3), (3, 4)], control=()) == [(0, 3)]
