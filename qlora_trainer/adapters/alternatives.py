"""Take a regular expression apart at its `|`, to see what each alternative matches by itself.

Left out: what is matched (targets.py), and conditional groups `(?(1)yes|no)`, whose parts are no alternatives.
"""

import re
from collections.abc import Iterator

# What can follow the "(" of a group that has content: nothing, or a name, flags, or the sign of a look around.
_GROUP = re.compile(r"\?(?:[:=!>]|<[=!]|P<\w+>|[a-zA-Z-]+:)|(?!\?)")


def alternatives(pattern: str, before: str = "", after: str = "") -> Iterator[tuple[str, str]]:
    """Yield each alternative of a regular expression, those inside of others too.

    Args:
        pattern: the expression, or a part of it that is an expression too.
        before: what is to the left of the part.
        after: what is to the right of it.

    Yields:
        The alternative, and the whole expression with it alone in the place of its neighbors.
    """
    for start, bars, end in _outermost(pattern, 0, len(pattern)):
        left, right = before + pattern[:start], pattern[end:] + after
        for begin, stop in zip([start, *(bar + 1 for bar in bars)], [*bars, end], strict=True):
            branch = pattern[begin:stop]
            yield branch, left + branch + right
            yield from alternatives(branch, left, right)


def _outermost(pattern: str, start: int, end: int) -> list[tuple[int, list[int], int]]:
    """Find the alternations that lie in no other one: where each begins, its bars, and where it ends."""
    bars: list[int] = []
    groups: list[tuple[int, int]] = []  # of the content of each group at this level
    position, depth, opened = start, 0, start
    while position < end:
        character = pattern[position]
        if character == "\\":
            position += 1
        elif character == "[":
            position = _end_of_set(pattern, position)
        elif character == "(":
            depth += 1
            opened = position + 1 if depth == 1 else opened
        elif character == ")":
            depth -= 1
            if depth == 0:
                groups.append((opened, position))
        elif character == "|" and depth == 0:
            bars.append(position)
        position += 1
    if bars:
        return [(start, bars, end)]
    found = []
    for begin, stop in groups:
        if header := _GROUP.match(pattern, begin, stop):
            found += _outermost(pattern, header.end(), stop)
    return found


def _end_of_set(pattern: str, start: int) -> int:
    """Return the position of the "]" that ends a set of characters."""
    position = start + 1
    position += pattern.startswith("^", position)
    position += pattern.startswith("]", position)  # the first one is a character of the set
    while position < len(pattern) and pattern[position] != "]":
        position += 2 if pattern[position] == "\\" else 1
    return position
