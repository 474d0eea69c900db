"""Cut texts and tokens: at what is trained, where prompts end, where a control token is spelled, at a length.

Left out: where the turns are (spans.py).
"""

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from qlora_trainer.data.rendering.encoding import Span
from qlora_trainer.data.rendering.templates import Blocks, shared_beginning

_OPENS = re.compile(r"[<\[({\s]|\Z")  # what a tag or another word begins with


def cut(text: str, spans: Iterable[Blocks], others: bool, prompt_ends: Collection[int]) -> list[Span]:
    """Cut a text where training begins or ends, and where prompts end.

    Args:
        text: the rendering.
        spans: of turns, each [start, end) in characters, in order.
        others: train all but the spans.
        prompt_ends: positions at which a prompt ends.

    Returns:
        The pieces, in order.
    """
    blocks = [block for turn in spans for block in turn]
    inside = {start: end for start, end in blocks if start < end}
    bounds = sorted({0, len(text), *prompt_ends, *itertools.chain.from_iterable(blocks)})
    pieces = []
    trained_until = 0
    for start, end in itertools.pairwise(bounds):
        trained_until = inside.get(start, trained_until)
        pieces.append(Span(text[start:end], (start < trained_until) != others, after_prompt=start in prompt_ends))
    return pieces


def shared_ends(joint: str, left: str, right: str) -> tuple[int, int]:
    """Divide a text into a beginning of `left` and an end of `right`.

    Where several divisions are possible, the last one that lies between tags or words is taken: of "</call><text>",
    "</call><result>" and "</result><text>", the first begins with "</call>" of the second.

    Args:
        joint: the text.
        left: begins as it does.
        right: ends as it does.

    Returns:
        Characters of (the beginning, the end); fewer than all where they do not make up the text.
    """
    most = shared_beginning(joint, left)
    least = len(joint) - shared_beginning(joint[::-1], right[::-1])
    between = [at for at in range(min(least, most), most + 1) if _OPENS.match(joint[at:] or left[at:])]
    head = max(between, default=most)
    return head, min(len(joint) - head, len(joint) - least)


def unshielded(pieces: Sequence[Span], shields: Mapping[str, str]) -> list[Span]:
    """Put the control tokens that a row's own text spells back in place of their other names.

    Args:
        pieces: of a text.
        shields: the control token by its other name.

    Returns:
        The pieces, cut where a control token is spelled; those that are empty are left out.
    """
    if not shields:
        return [piece for piece in pieces if piece.text]
    pattern = re.compile("(" + "|".join(map(re.escape, shields)) + ")")
    found = []
    for piece in pieces:
        parts = [part for part in pattern.split(piece.text) if part]
        spans = [replace(piece, text=shields.get(part, part), ordinary=part in shields) for part in parts]
        found += [*spans[:1], *(replace(span, after_prompt=False) for span in spans[1:])]
    return found


def cut_evenly(ids: Sequence[int], most: int) -> list[list[int]]:
    """Cut tokens into parts of nearly equal length, so that no tail is tiny.

    Args:
        ids: the tokens, at least one.
        most: tokens of a part.

    Returns:
        The parts, as few as there can be.
    """
    count = -(-len(ids) // most)
    bounds = [len(ids) * part // count for part in range(count + 1)]
    return [list(ids[begin:end]) for begin, end in itertools.pairwise(bounds)]
