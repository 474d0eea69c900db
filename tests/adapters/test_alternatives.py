"""Each alternative of a regular expression is taken alone in its place; together they match the whole."""

import itertools
import re

import pytest

from qlora_trainer.adapters.alternatives import alternatives


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a|b", [("a", "a"), ("b", "b")]),
        ("(q|k)_proj", [("q", "(q)_proj"), ("k", "(k)_proj")]),
        ("x(a|b)y(c|d)", [("a", "x(a)y(c|d)"), ("b", "x(b)y(c|d)"), ("c", "x(a|b)y(c)"), ("d", "x(a|b)y(d)")]),
        ("(a|b(c|d))", [("a", "(a)"), ("b(c|d)", "(b(c|d))"), ("c", "(b(c))"), ("d", "(b(d))")]),
        ("a||b", [("a", "a"), ("", ""), ("b", "b")]),
        ("(?:a|b)(?P<n>c|d)", [("a", "(?:a)(?P<n>c|d)"), ("b", "(?:b)(?P<n>c|d)"), ("c", "(?:a|b)(?P<n>c)")]),
        ("(?i:a|b)", [("a", "(?i:a)"), ("b", "(?i:b)")]),
        (r"(?<!a|b)c", [("a", r"(?<!a)c"), ("b", r"(?<!b)c")]),
    ],
)
def test_each_alternative_is_alone_in_its_place(pattern: str, expected: list[tuple[str, str]]) -> None:
    assert list(alternatives(pattern))[: len(expected)] == expected


@pytest.mark.parametrize(
    "pattern", ["abc", "", "(abc)", r"a\|b", "[|]", "[]|]", "[^]|]", r"[\]|]", r"\(a\)", "(?i)a", "(x)(?(1)a|b)"]
)
def test_what_is_no_alternative_is_not_taken_apart(pattern: str) -> None:
    re.compile(pattern)
    assert list(alternatives(pattern)) == []


@pytest.mark.parametrize("pattern", ["(a|b)(c|d)", "a(b|c(d|a))?", "(a|b|ab)[c|]d", r"(?:a\||b)(c|)", "(((a|b)))c"])
def test_together_they_match_all_that_the_expression_matches_and_no_more(pattern: str) -> None:
    words = ["".join(word) for length in range(5) for word in itertools.product("abcd|", repeat=length)]
    whole = {word for word in words if re.fullmatch(pattern, word)}
    found = [{word for word in words if re.fullmatch(alone, word)} for _, alone in alternatives(pattern)]
    assert whole
    assert set().union(*found) == whole
    assert all(part < whole for part in found)
