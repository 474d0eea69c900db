"""Find where in a rendering each turn is, so that the turns to be trained can be distinguished from the rest.

The place of a turn is found by experiment, in the rendering of the whole conversation: what the turns say is looked for
with markers. Where a template defeats these, the blocks that it marks itself are taken, and else the last answer is
found as what follows its prompt.

An answer's span is all that a model has to say after the generation prompt, be it text, reasoning or calls of tools, up
to and with the token that ends a turn: Qwen3's empty reasoning before a last answer is in it. Another turn's span is
its content, with the token that ends the turn. Left out: what a template does not write at all (omissions.py).
"""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.rendering.dialogue import (
    CONTENT,
    REASONING,
    Dialogue,
    Part,
    make_dialogue,
    nonce_for,
    shielded,
    text_parts,
    with_numbered_ids,
    with_parts,
    with_reasoning_apart,
)
from qlora_trainer.data.rendering.encoding import Span
from qlora_trainer.data.rendering.marked_blocks import agreed_spans, spans_of_blocks
from qlora_trainer.data.rendering.markers import Markers, Place, spellings
from qlora_trainer.data.rendering.omissions import (
    check_nothing_left_out,
    check_reasoning,
    check_tools,
    turns_without_reasoning,
)
from qlora_trainer.data.rendering.pieces import cut, shared_ends, unshielded
from qlora_trainer.data.rendering.prompts import PROMPT_DIFFERS, is_prompt, prompt_of
from qlora_trainer.data.rendering.templates import Blocks, ChatTemplate
from qlora_trainer.data.types import Conversation

LAST_TURN_ONLY = (
    "the chat template renders earlier turns otherwise than they are written: only the last turn is trained"
)
END_ADDED = "the chat template ends no turn with a control token: the end-of-text token was added after the last answer"
REASONING_LEFT_OUT = "the chat template leaves out the reasoning of earlier turns: those turns are not trained"
IDS_NUMBERED = "the chat template asks for ids of tool calls of nine characters: calls were numbered"
REASONING_NOT_SHOWN = "the chat template leaves out the reasoning of earlier turns, which are not trained"

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Rendering:
    """Hold a conversation as text, in spans, and warnings about how its turns were found."""

    spans: list[Span]
    warnings: tuple[str, ...] = ()


class SpanFinder:
    """Render conversations by one template, and find their turns.

    Args:
        template: of the tokenizer.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self.markers = Markers(template)

    def render(
        self,
        conversation: Conversation,
        targets: Collection[int],
        *,
        others: bool = False,
        wanted: Collection[int] = (),
        where: str,
    ) -> Rendering:
        """Render the whole conversation, trained at the turns that are `targets`, or with `others` at all but those.

        A DataError says that the template refuses the conversation, leaves a part of it out, or hides even its last
        answer.

        Args:
            conversation: a row.
            targets: indices of turns.
            others: train all but the targets.
            wanted: targets that the row itself names: they are trained, or the row is refused.
            where: file and line, for errors.

        Returns:
            The text, in spans.
        """
        template = self.template
        dialogue, shields = self._dialogue(conversation, where)
        (text, blocks), dialogue, warnings = self._accepted(dialogue, template.text_and_blocks, where)
        check_tools(template, dialogue, text, where)
        parts = text_parts(dialogue)
        chosen, left_out, places = self._places(dialogue, text, parts, set(targets), others, wanted, where)
        warnings += left_out
        spans = None if places is None else self._spans(dialogue, text, places, chosen)
        whole = spans
        if spans is not None and blocks:
            spans, unmarked = agreed_spans(template, dialogue, text, spans, blocks, wanted)
            warnings += unmarked
        spans = spans if spans is not None else spans_of_blocks(template, dialogue, text, blocks, chosen)
        if spans is None:
            text, spans = self._last_turn_alone(dialogue, text, chosen, set(wanted), others, where)
            dialogue = dialogue.beginning(_last_answer(dialogue) + 1)
            warnings.append(LAST_TURN_ONLY)
        ends, begins_with_prompt = self._prompt_ends(dialogue, text, parts, places, whole or spans, others)
        if not begins_with_prompt:
            warnings.append(PROMPT_DIFFERS)
        if template.end_of_turn is None and dialogue.messages[-1]["role"] == "assistant":
            pieces = cut(text.rstrip(), spans.values(), others, ends)
            pieces.append(Span(template.eos_token, trained=(len(dialogue.messages) - 1 in chosen) != others))
            warnings.append(END_ADDED)
        else:
            pieces = cut(text, spans.values(), others, ends)
        return Rendering(unshielded(pieces, shields), tuple(warnings))

    def _places(
        self,
        dialogue: Dialogue,
        text: str,
        parts: dict[Part, str],
        chosen: set[int],
        others: bool,
        wanted: Collection[int],
        where: str,
    ) -> tuple[set[int], list[str], list[Place] | None]:
        """Find what the turns say, and refuse or report what the template leaves out: (chosen turns, warnings, places).

        There are no places where the template defeats markers.
        """
        template = self.template
        places = self.markers.places(dialogue, text, parts)
        if places is None:
            check_nothing_left_out(template, dialogue, text, where)
            if not template.knows_reasoning:
                trained = {turn for turn, part in parts if part == REASONING and (turn in chosen) != others}
                check_reasoning(template, trained, (), where)
            parts = {part: value for part, value in parts.items() if part[0] in chosen}
            places = self.markers.places(dialogue, text, parts)
            if places is not None and len({place.part for place in places}) < len(parts):
                places = None
            return chosen, [], places
        unreasoned = turns_without_reasoning(dialogue, parts, [place.part for place in places], where)
        if not unreasoned:
            return chosen, [], places
        trained = {turn for turn in unreasoned if (turn in chosen) != others}
        check_reasoning(template, trained, wanted, where)
        return chosen ^ trained, [REASONING_LEFT_OUT if trained else REASONING_NOT_SHOWN], places

    def render_prompt(self, conversation: Conversation, *, where: str) -> list[Span]:
        """Render what is before an answer to the conversation: character by character as in training.

        Args:
            conversation: without the answer.
            where: file and line, for errors.

        Returns:
            The text, in spans.
        """
        dialogue, shields = self._dialogue(conversation, where)
        text, _, _ = self._accepted(dialogue, self._prompt, where)
        return unshielded([Span(text, trained=False)], shields)

    def _dialogue(self, conversation: Conversation, where: str) -> tuple[Dialogue, dict[str, str]]:
        plain = make_dialogue(conversation, where, self.template.arguments_as_text)
        if self.template.knows_reasoning and not self.template.keeps_inline_reasoning:
            plain = with_reasoning_apart(plain)
        return shielded(plain, self.template.control_pattern)

    def _accepted(
        self, dialogue: Dialogue, run: Callable[[Dialogue, str], _Result], where: str
    ) -> tuple[_Result, Dialogue, list[str]]:
        """Run the template on a dialogue, with its own ids of calls or else with others; say which it took."""
        try:
            return run(dialogue, where), dialogue, []
        except DataError:
            if (numbered := with_numbered_ids(dialogue)) is None:
                raise
            return run(numbered, where), numbered, [IDS_NUMBERED]

    def _prompt(self, dialogue: Dialogue, where: str) -> str:
        if self.template.header:
            return self.template.text(dialogue, where, generation=True)
        marker = f"Q{nonce_for(dialogue)}m0Q"
        answered = Dialogue([*dialogue.messages, {"role": "assistant", "content": marker}], dialogue.tools)
        return self.template.text(answered, where).partition(marker)[0].rstrip(" ")  # which begins the answer's word

    def _spans(
        self, dialogue: Dialogue, text: str, places: Sequence[Place], targets: Collection[int]
    ) -> dict[int, Blocks] | None:
        """Find each target's span; None where one cannot be determined."""
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        seen = set()
        for index, place in enumerate(places):
            if place.part not in seen:  # a template may write a part again later, such as a function's name
                seen.add(place.part)
                first.setdefault(place.part[0], index)
                last[place.part[0]] = index
        spans = {}
        for target in sorted(targets & first.keys()):
            start = self._start(dialogue, text, places, first[target])
            end = self._end(dialogue.messages[target], text, places, last[target])
            if start is None or end is None:
                return None
            gaps = self._gaps(dialogue, text, places, range(first[target], last[target] + 1))
            if gaps is None:
                return None
            bounds = [start, *itertools.chain.from_iterable(gaps), end]
            spans[target] = list(zip(bounds[::2], bounds[1::2], strict=True))
        return spans

    def _gaps(self, dialogue: Dialogue, text: str, places: Sequence[Place], of_turn: range) -> Blocks | None:
        """Find what other turns say within a turn, with the template's own text around that; None if it is unclear.

        Some templates write a tool's result within the turn that called it. What belongs to the turn is what is
        written where the others are not there.
        """
        turn = places[of_turn.start].part[0]
        strangers = {places[index].part[0] for index in of_turn} - {turn}
        if not strangers:
            return []
        kept = [index for index in range(len(dialogue.messages)) if index not in strangers]
        alone = Dialogue([dialogue.messages[index] for index in kept], dialogue.tools)
        try:
            text_alone = self.template.text(alone, "an experiment")
        except DataError:
            return None
        places_alone = self.markers.places(alone, text_alone, text_parts(alone))
        if places_alone is None:
            return None
        own = [place for place in places_alone if kept[place.part[0]] == turn]
        gaps = []
        indices = [index for index in of_turn if places[index].part[0] == turn]
        for number, (before, after) in enumerate(itertools.pairwise(indices)):
            if after == before + 1:
                continue
            if len(own) <= number + 1:
                return None
            joint = text_alone[own[number].end : own[number + 1].start]
            left = text[places[before].end : places[before + 1].start]
            right = text[places[after - 1].end : places[after].start]
            head, tail = shared_ends(joint, left, right)
            gaps.append((places[before].end + head, places[after].start - tail))
        return gaps

    def _prompt_ends(
        self,
        dialogue: Dialogue,
        text: str,
        parts: Mapping[Part, str],
        places: Sequence[Place] | None,
        spans: Mapping[int, Blocks],
        others: bool,
    ) -> tuple[list[int], bool]:
        """Find where the prompts of trained answers end, and compare the last with what a server gives.

        Of all trained answers; with `others` of the last one alone.
        """
        answers = [turn for turn in spans if dialogue.messages[turn]["role"] == "assistant"]
        if others:
            last = _last_answer(dialogue)
            is_trained = last not in spans and dialogue.messages[last]["role"] == "assistant"
            found = self._spans(dialogue, text, places, {last}) if places and is_trained else None
            if not found:
                prompt = prompt_of(self.template, dialogue, last)
                is_beginning = prompt is None or text.startswith(prompt)
                return [len(prompt)] if prompt and is_beginning and is_trained else [], is_beginning
            answers, spans = [last], found
        ends = [spans[turn][0][0] for turn in answers]
        return ends, not ends or is_prompt(self.markers, dialogue, text, parts, places, ends[-1])

    def _start(self, dialogue: Dialogue, text: str, places: Sequence[Place], index: int) -> int | None:
        """Find where an answer begins: at the end of the generation prompt, which leaves out spaces at its end."""
        place = places[index]
        begin = places[index - 1].end if index else 0
        before = text[begin : place.start]
        unspaced = place.start - (len(before) - len(before.rstrip(" ")))
        if dialogue.messages[place.part[0]]["role"] != "assistant":
            return unspaced
        header = self.template.header
        control = self.template.control_pattern.match(header)
        at = before.rfind(control[0] if control else header) if header else -1
        if at >= 0:
            # What the row itself says may begin as the prompt ends, such as with the token that opens reasoning.
            is_whole = text.startswith(header, begin + at)
            return begin + at + (len(header) if is_whole else self.template.common_prefix(header, before[at:]))
        if place.part[1] == CONTENT:
            return unspaced
        # No header, and the turn begins with text of the template's own, as of calls: it is what follows the prompt.
        try:
            prompt = self._experiment_prompt(dialogue.beginning(place.part[0]))
        except DataError:
            return None
        return begin + len(prompt) if before.startswith(prompt) else None

    def _experiment_prompt(self, dialogue: Dialogue) -> str:
        """Return what a generation prompt has after the last turn's words."""
        marker = f"Q{nonce_for(dialogue)}Q"
        last = len(dialogue.messages) - 1
        marked = with_parts(dialogue, {(last, CONTENT): marker})
        return self.template.text(marked, "an experiment", generation=True).rpartition(marker)[2].rstrip(" ")

    def _end(self, message: Mapping[str, object], text: str, places: Sequence[Place], index: int) -> int | None:
        """Find the end of the token that ends the turn; where a template has none, of what the turn says."""
        stop = places[index + 1].start if index + 1 < len(places) else len(text)
        for match in self.template.control_pattern.finditer(text, places[index].end, stop):
            if match[0] in self.template.ends:
                return match.end()
        return None if "tool_calls" in message else places[index].end

    def _last_turn_alone(
        self, dialogue: Dialogue, text: str, targets: Collection[int], wanted: set[int], others: bool, where: str
    ) -> tuple[str, dict[int, Blocks]]:
        """Render up to the last answer, if the dialogue goes on after it, and find that answer's span."""
        last = _last_answer(dialogue)
        if others or wanted - {last}:
            says = "excludes turns from training" if others else "names turns to train"
            raise DataError(
                f"{where}: the row {says}, and this model's chat template hides where they are. Set data.train_on to "
                "assistant or last, and leave the choice out of the row."
            )
        prompt = self.template.text(dialogue.beginning(last), where, generation=True) if last else ""
        if last + 1 < len(dialogue.messages):
            text = self.template.text(dialogue.beginning(last + 1), where)
        prompt = prompt if text.startswith(prompt) else prompt.rstrip(" ")
        answer = text.removeprefix(prompt)
        said = [value for part, value in text_parts(dialogue).items() if part[0] == last]
        if not text.startswith(prompt) or not all(any(one in answer for one in spellings(value)) for value in said):
            raise DataError(
                f"{where}: the model's chat template hides where the last answer is, so it cannot be trained apart "
                "from the prompt. Set data.train_on to all, or use a model with another template."
            )
        tokens = [match for match in self.template.control_pattern.finditer(answer) if match[0] in self.template.ends]
        length = tokens[-1].end() if tokens else len(answer.rstrip())
        return text, {last: [(len(prompt), len(prompt) + length)]} if last in targets else {}


def _last_answer(dialogue: Dialogue) -> int:
    return max((index for index, message in enumerate(dialogue.messages) if message["role"] == "assistant"), default=0)
