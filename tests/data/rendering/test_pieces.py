"""Texts and tokens are cut without loss: at what is trained, at prompts, at spelled control tokens, at a length."""

import itertools

import pytest

from qlora_trainer.data.rendering.encoding import Span
from qlora_trainer.data.rendering.pieces import cut, cut_evenly, shared_ends, unshielded


def trained(pieces: list[Span]) -> list[tuple[str, bool]]:
    return [(piece.text, piece.trained) for piece in pieces]


def test_what_is_in_a_span_is_trained_and_what_is_not_the_contrary_where_asked() -> None:
    text = "system|user|answer|user|reply|"
    spans = [[(12, 19)], [(24, 30)]]
    parts = [("system|user|", False), ("answer|", True), ("user|", False), ("reply|", True)]
    assert trained(cut(text, spans, False, [])) == parts
    assert trained(cut(text, spans, True, [])) == [(piece, not is_trained) for piece, is_trained in parts]


def test_an_answer_of_several_blocks_is_trained_in_each_of_them_and_not_between() -> None:
    assert trained(cut("abcdef", [[(1, 2), (4, 6)]], False, [])) == [
        ("a", False),
        ("b", True),
        ("cd", False),
        ("ef", True),
    ]


def test_an_empty_block_trains_nothing() -> None:
    assert trained(cut("abc", [[(1, 1)]], False, [])) == [("a", False), ("bc", False)]
    assert trained(cut("abc", [[(1, 3)], [(1, 1)]], False, [])) == [("a", False), ("bc", True)]


def test_the_end_of_a_prompt_cuts_and_is_marked_and_what_is_trained_stays_so() -> None:
    pieces = cut("abcdef", [[(2, 6)]], False, [2, 4])
    assert [(piece.text, piece.trained, piece.after_prompt) for piece in pieces] == [
        ("ab", False, False),
        ("cd", True, True),
        ("ef", True, True),
    ]


@pytest.mark.parametrize(
    ("joint", "left", "right", "expected"),
    [
        ("ab", "ax", "xb", (1, 1)),
        ("</call><text>", "</call><result>", "</result><text>", (7, 6)),  # as the docstring tells
        ("<a><b>", "<a>", "<b>", (3, 3)),
        ("same", "same", "same", (4, 0)),
        ("abc", "a", "c", (1, 1)),  # b is of neither
        ("abc", "x", "y", (0, 0)),
        ("", "x", "y", (0, 0)),
    ],
)
def test_a_text_is_divided_into_a_beginning_and_an_end(
    joint: str, left: str, right: str, expected: tuple[int, int]
) -> None:
    head, tail = shared_ends(joint, left, right)
    assert (head, tail) == expected
    assert left.startswith(joint[:head])
    assert right.endswith(joint[len(joint) - tail :])


def test_a_spelled_control_token_is_put_back_as_ordinary_text() -> None:
    pieces = [Span("say #1 twice #1", True, after_prompt=True), Span("", False), Span("#2", False), Span("x", True)]
    assert unshielded(pieces, {"#1": "<|end|>", "#2": "<|start|>"}) == [
        Span("say ", True, after_prompt=True),
        Span("<|end|>", True, ordinary=True),
        Span(" twice ", True),
        Span("<|end|>", True, ordinary=True),
        Span("<|start|>", False, ordinary=True),
        Span("x", True),
    ]


def test_without_control_tokens_only_empty_pieces_are_left_out() -> None:
    assert unshielded([Span("#1", True), Span("", True), Span("b", False)], {}) == [Span("#1", True), Span("b", False)]


@pytest.mark.parametrize("most", [1, 2, 3, 7, 10, 100])
@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 100])
def test_tokens_are_cut_into_the_fewest_parts_of_nearly_equal_length(count: int, most: int) -> None:
    parts = cut_evenly(range(count), most)
    lengths = [len(part) for part in parts]
    assert list(itertools.chain(*parts)) == list(range(count))
    assert max(lengths) <= most
    assert max(lengths) - min(lengths) <= 1
    assert (len(parts) - 1) * most < count
