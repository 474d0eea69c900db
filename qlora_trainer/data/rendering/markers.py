"""Find where in a rendering each thing that is said is, by experiment.

Unique markers in the place of what the turns say show the template's own text around each; then the true words put back
between must give the true rendering, character by character, or nothing is claimed. Conversations of one shape share an
experiment: it depends on the roles and on which parts there are, not on the words. Left out: what the places mean
(spans.py).
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.rendering.dialogue import CONTENT, REASONING, Dialogue, Part, nonce_for, with_parts
from qlora_trainer.data.rendering.templates import ChatTemplate

_NONCE = "4f0b9d1c7ae35268"
_MOST_SHAPES = 4096


@dataclass(frozen=True)
class Place:
    """Locate a part of a turn in the text, in characters."""

    part: Part
    start: int
    end: int


class Markers:
    """Experiment with one template, and keep each result.

    Args:
        template: to be tried.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._experiments: dict[object, list[str] | None] = {}  # by shape
        self._prompts: dict[tuple[object, Part], tuple[str, str] | None] = {}

    def places(self, dialogue: Dialogue, text: str, parts: Mapping[Part, str]) -> list[Place] | None:
        """Find every place in a rendering where a part is.

        Args:
            dialogue: that was rendered.
            text: its rendering.
            parts: text by (turn, part), to look for.

        Returns:
            The places in order; None where the template defeats markers.
        """
        nonce = _NONCE if _NONCE not in text else nonce_for(dialogue)
        pieces = self._experiment(dialogue, parts, nonce)
        if pieces is None or not text.startswith(pieces[0]):
            return None
        places = []
        position = len(pieces[0])
        for turn, number, after in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
            part = int(turn), int(number)
            end = _match(text, position, parts[part], after)
            if end is None:
                return None
            places.append(Place(part, position, end))
            position = end + len(after)
        return places if position == len(text) else None

    def prompt_and_text(self, dialogue: Dialogue, parts: Mapping[Part, str], part: Part) -> tuple[str, str] | None:
        """Render the turns before an answer as a prompt, and the whole up to a part of that answer, with markers.

        Args:
            dialogue: that was rendered.
            parts: text by (turn, part); markers take their place.
            part: of an answer.

        Returns:
            Both texts; None where they depend on the row's own words, or the template refuses one of them.
        """
        shape = _shape(dialogue, parts)
        if shape is None:
            return None
        if (shape, part) not in self._prompts:
            marked = _marked(dialogue, parts, _NONCE)
            if len(self._prompts) >= _MOST_SHAPES:
                self._prompts.clear()
            try:
                prompt = self.template.text(marked.beginning(part[0]), "an experiment", generation=True)
                text = self.template.text(marked, "an experiment").partition(_marker(_NONCE, part))[0]
                self._prompts[shape, part] = prompt, text
            except DataError:
                self._prompts[shape, part] = None
        return self._prompts[shape, part]

    def _experiment(self, dialogue: Dialogue, parts: Mapping[Part, str], nonce: str) -> list[str] | None:
        """Render markers in the place of `parts`, and cut at them: text, turn, part, text, turn, part, text."""
        shape = _shape(dialogue, parts) if nonce == _NONCE else None
        if shape is not None and shape in self._experiments:
            return self._experiments[shape]
        marked = _marked(dialogue, parts, nonce)
        try:
            pieces = re.split(f"Q{nonce}m([0-9]+)p([0-9]+)Q", self.template.text(marked, "an experiment"))
        except DataError:
            pieces = None  # the template reads what is said, and stumbled over a marker
        if shape is not None:
            if len(self._experiments) >= _MOST_SHAPES:
                self._experiments.clear()
            self._experiments[shape] = pieces
        return pieces


def _marker(nonce: str, part: Part) -> str:
    return f"Q{nonce}m{part[0]}p{part[1]}Q"


def _marked(dialogue: Dialogue, parts: Mapping[Part, str], nonce: str) -> Dialogue:
    return with_parts(dialogue, {part: _marker(nonce, part) for part in parts})


def _shape(dialogue: Dialogue, parts: Mapping[Part, str]) -> object | None:
    """Return what a rendering with markers depends on, so that it can be used again; None if on the row's own text."""
    turns = []
    for index, message in enumerate(dialogue.messages):
        if "tool_calls" in message or "tool_call_id" in message or "name" in message:
            return None
        marked = (index, CONTENT) in parts, (index, REASONING) in parts
        if (not marked[0] and message["content"]) or (not marked[1] and message.get("reasoning_content")):
            return None
        turns.append((message["role"], marked, message.get("reasoning_content") is None))
    return tuple(turns), json.dumps(dialogue.tools) if dialogue.tools else ""


def _match(text: str, start: int, words: str, after: str) -> int | None:
    """Find the end of `words` at `start`, as written, trimmed by the template or as JSON, where `after` comes next."""
    for candidate in spellings(words):
        end = start + len(candidate)
        if text.startswith(candidate, start) and text.startswith(after, end):
            return end
    return None


def spellings(words: str) -> Iterator[str]:
    """Yield the ways in which templates write a text: as it is, trimmed, or as JSON.

    Args:
        words: the text.

    Yields:
        Each way.
    """
    yield words
    trimmed = [words.strip(), words.rstrip(), words.lstrip()]
    trimmed += [words.strip("\n"), words.lstrip("\n"), words.rstrip("\n")]
    yield from trimmed
    for candidate in (words, *trimmed):
        yield json.dumps(candidate, ensure_ascii=False)[1:-1]
        yield json.dumps(candidate)[1:-1]
