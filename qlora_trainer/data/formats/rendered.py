"""Recognize text that is a conversation already written by a chat template, and take it apart into turns.

Many files hold rows that went through a template before, such as "<|im_start|>user …". As plain text their control
tokens are spelled out and trained as ordinary characters, which no server ever sends. Known here are the templates that
such files are written with; the model's own is known by experiment (preparation/rendered_rows.py), which also decides
whether turns give the same text again. Left out: calls of tools, which each template writes otherwise.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from qlora_trainer.data.turn_names import ROLE_NAMES
from qlora_trainer.data.types import Message

_ROLE = "system|user|assistant|tool|human|model|developer|ipython"  # as templates write them
_BETWEEN = re.compile(r"(?:\s|</s>|<eos>|<\|endoftext\|>|<\|end_of_text\|>)*")  # what may be after a turn


@dataclass(frozen=True)
class Family:
    """Describe a kind of template: how a turn of a role is opened, and how each is closed."""

    name: str
    opening: str  # a regular expression with a group "role"
    closing: tuple[str, ...]

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """Compile what opens a turn and what closes it.

        Returns:
            Both patterns.
        """
        return re.compile(self.opening), re.compile("|".join(map(re.escape, self.closing)))


FAMILIES = (
    Family("ChatML", rf"<\|im_start\|>(?P<role>{_ROLE})\n", ("<|im_end|>",)),
    Family("Phi-4", rf"<\|im_start\|>(?P<role>{_ROLE})<\|im_sep\|>\n?", ("<|im_end|>",)),
    Family(
        "Llama 3",
        rf"<\|start_header_id\|>(?P<role>{_ROLE})<\|end_header_id\|>\n\n",
        ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    ),
    Family("Llama 4", rf"<\|header_start\|>(?P<role>{_ROLE})<\|header_end\|>\n\n", ("<|eot|>",)),
    Family("Gemma", rf"<start_of_turn>(?P<role>{_ROLE})\n", ("<end_of_turn>",)),
    Family("Gemma 4", rf"<\|turn>(?P<role>{_ROLE})\n", ("<turn|>",)),
    Family("Granite", rf"<\|start_of_role\|>(?P<role>{_ROLE})<\|end_of_role\|>", ("<|end_of_text|>",)),
    Family("Phi-3", rf"<\|(?P<role>{_ROLE})\|>\n?", ("<|end|>", "<|endoftext|>")),
    Family("Zephyr", rf"<\|(?P<role>{_ROLE})\|>\n", ("</s>",)),
)
_STARTS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>")
_BEGIN = re.compile(rf"\s*(?:(?:{'|'.join(map(re.escape, _STARTS))})\s*)*")
_INST = re.compile(r"\[INST\]\s?(.*?)\s?\[/INST\]", re.DOTALL)
_SYS = re.compile(r"\s*<<SYS>>\n?(.*?)\n?<</SYS>>\s*", re.DOTALL)
# The shape of any template's text: control tokens, of which several name who speaks, inside or right after them.
_INNER = r"[^<>|\uff5c\[\]\s]"
_TOKEN = (
    rf"(?:<\|{_INNER}{{1,40}}\|?>|<\uff5c{_INNER}{{1,40}}\uff5c>|\[\|{_INNER}{{1,40}}\|\]"
    r"|\[gMASK\]|</?s>|<sop>|<bos>|<BOS_TOKEN>|<start_of_turn>|<extra_id_\d+>|<seed:bos>|<beginning_of_sentence>|<reserved_\d+>)"
)
_SPEAKER = rf"(?:{_ROLE}|function|chatbot|bot|gpt|observation|environment)(?![a-z])"
_FIRST_TOKEN = re.compile(rf"\s*{_TOKEN}")
_SPEAKERS = re.compile(
    rf"[<\[][|\uff5c](?:{_INNER}{{0,30}}[^a-z<>|\uff5c\[\]\s])?{_SPEAKER}{_INNER}{{0,30}}[|\uff5c]?[>\]]"
    rf"|{_TOKEN}\s?{_SPEAKER}",
    re.IGNORECASE,
)
_OPENINGS = re.compile("|".join(re.sub(r"\(\?P<role>", "(?:", family.opening) for family in FAMILIES) + r"|\[INST\]")


def looks_rendered(text: str) -> bool:
    """Return True if a text begins as a conversation that a template wrote does.

    Of templates that are not known, it begins with a control token, and two that say who speaks are in it: as a text
    such a conversation would be trained with its control tokens spelled out, whatever the model's own are.

    Args:
        text: of a row.

    Returns:
        True if it does.
    """
    start = _BEGIN.match(text)
    if _OPENINGS.match(text, start.end() if start else 0):
        return True
    return bool(_FIRST_TOKEN.match(text)) and len(list(islice(_SPEAKERS.finditer(text), 2))) == 2


def read_rendered(text: str) -> tuple[str, list[Message]] | None:
    """Take a text apart into turns, by each known kind of template.

    Args:
        text: of a row, the whole of it.

    Returns:
        The kind's name and the turns; None where it is of no kind as a whole, or nobody asks and answers in it.
    """
    start = _BEGIN.match(text)
    begin = start.end() if start else 0
    found = [("Llama 2 or Mistral", _instructions(text[begin:]))]
    found += [(family.name, _turns(family, text, begin)) for family in FAMILIES]
    for name, turns in found:
        roles = [turn.role for turn in turns or ()]
        if turns and "user" in roles and roles[-1] == "assistant":
            return name, turns
    return None


def _turns(family: Family, text: str, position: int) -> list[Message] | None:
    """Read turn after turn, each closed before the next is opened; the last one may be left open."""
    opening, closing = family.patterns
    messages = []
    while match := opening.match(text, position):
        end = closing.search(text, match.end())
        inner = text[match.end() : end.start() if end else len(text)]
        if opening.search(inner):
            return None
        messages.append(Message(ROLE_NAMES[match["role"]], inner))
        position = end.end() if end else len(text)
        position = _BETWEEN.match(text, position).end()  # type: ignore[union-attr]  # which matches nothing too
    return messages if position == len(text) else None


def _instructions(text: str) -> list[Message] | None:
    """Read the form of Llama 2 and Mistral, in which the system text is inside the first instruction."""
    messages: list[Message] = []
    position = 0
    matches = list(_INST.finditer(text))
    for index, match in enumerate(matches):
        if match.start() != position:
            return None
        asked = match[1]
        system = _SYS.match(asked)
        if system and index == 0:
            messages.append(Message("system", system[1]))
            asked = asked[system.end() :]
        position = matches[index + 1].start() if index + 1 < len(matches) else len(text)
        answer = re.sub(r"\s*(?:</s>\s*)?(?:<s>\s*)?\Z", "", text[match.end() : position])
        messages += [Message("user", asked), Message("assistant", answer.removeprefix(" "))]
    return messages if matches and position == len(text) else None


@dataclass(frozen=True)
class Frame:
    """Hold the text of a template around turns, found by experiment: before, between and after what they say."""

    before: str
    to_answer: tuple[str, ...]  # between what is asked and an answer; the last answer's may differ
    to_question: str
    after: str
    system: bool  # whether the first turn is a system turn
    to_user: str = ""  # between the system turn and the first question

    def read(self, text: str) -> list[Message] | None:
        """Take a text apart into turns.

        Args:
            text: of a row.

        Returns:
            The turns, the last of which may lack its end; None where the text is not framed so.
        """
        if not text.startswith(self.before):
            return None
        body = text[len(self.before) :]
        messages = []
        if self.system:
            said, found, body = body.partition(self.to_user)
            if not found:
                return None
            messages.append(Message("system", said))
        ends = [self.after, self.after.rstrip(), ""]
        body = next(body[: len(body) - len(end)] for end in ends if body.endswith(end))
        for exchange in self._exchanges(body):
            first = next((between for between in self.to_answer if between in exchange), None)
            if first is None:
                return None
            asked, _, answer = exchange.partition(first)
            messages += [Message("user", asked), Message("assistant", answer)]
        return messages

    def _exchanges(self, body: str) -> Iterator[str]:
        yield from body.split(self.to_question) if self.to_question else [body]


def make_frame(pieces: Sequence[str], system: bool) -> Frame | None:
    """Make a frame of a rendering of [system,] two questions and two answers, cut at what they say.

    Args:
        pieces: the template's own text: one more than there are turns.
        system: whether the first turn is a system turn.

    Returns:
        The frame; None where the pieces show none.
    """
    expected = 6 if system else 5
    if len(pieces) != expected:
        return None
    before, *between, after = pieces
    to_user = between.pop(0) if system else ""
    first, to_question, last = between
    if not first or not last or not to_question or (system and not to_user):
        return None
    # The longer first: an empty block of reasoning before the last answer begins as every answer does.
    answers = tuple(sorted({first, last}, key=len, reverse=True))
    return Frame(before, answers, to_question, after, system, to_user)
