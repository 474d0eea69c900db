from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import tiny_tokenizer

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.rendering.encoding import Encoder, Stretch, learned_runs

pieces = st.sampled_from(["The quick", " brown", " ", "\n", "fox", "é", "😀", "<|im_end|>", "x" * 9, "</s>", ""])
stretches = st.lists(st.builds(Stretch, pieces, st.booleans()), min_size=1, max_size=8)


@settings(max_examples=150)
@given(text=stretches, kind=st.sampled_from(["bytes", "metaspace"]))
def test_a_token_is_learned_if_and_only_if_a_character_of_it_is(text, kind):
    tokenizer = tiny_tokenizer("mistral" if kind == "metaspace" else "smollm2", kind)
    joined = "".join(stretch.text for stretch in text)
    encoding = tokenizer.backend_tokenizer.encode(joined, add_special_tokens=False)
    learned = [flag for stretch in text for flag in [stretch.learned] * len(stretch.text)]
    expected = [any(learned[start:end]) for start, end in encoding.offsets]
    (encoded,) = Encoder(tokenizer).encode([text])
    assert not isinstance(encoded, DataError)
    found = [any(begin <= index < end for begin, end in encoded.learned) for index in range(len(encoded.ids))]
    assert encoded.ids == encoding.ids
    assert found == expected


def test_blanks_that_a_control_token_swallows_are_not_learned_with_what_follows():
    text = [Stretch("<s>", False), Stretch("  a", True)]
    assert learned_runs(text, [7, 8], [(0, 5), (5, 6)], control={7}) == [(1, 2)]
    assert learned_runs([Stretch("<s>", True), Stretch("  a", False)], [7, 8], [(0, 5), (5, 6)], {7}) == [(0, 1)]


def test_blanks_that_offsets_leave_out_count_to_the_token_after_them():
    text = [Stretch("a", False), Stretch(" ", True), Stretch("b", False)]
    assert learned_runs(text, [1, 2], [(0, 1), (2, 3)], control=()) == [(1, 2)]
    assert learned_runs([Stretch(" ", True), Stretch("b", False)], [2], [(1, 2)], control=()) == [(0, 1)]


def test_runs_that_touch_are_one():
    text = [Stretch("ab", True), Stretch("cd", True)]
    assert learned_runs(text, [1, 2, 3], [(0, 1), (1, 3), (3, 4)], control=()) == [(0, 3)]
