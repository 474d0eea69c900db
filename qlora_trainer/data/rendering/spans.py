"""Find where in a rendering each turn is, so that the turns to be trained can be distinguished from the rest.

The place of a turn is found by experiment, in the rendering of the whole conversation: what the turns say is looked for
with markers. Where a template defeats these, the blocks that it marks itself are taken, and else the last answer is
found as what follows its prompt.

An answer's span is all that a model has to say after the generation prompt, be it text, reasoning or calls of tools, up
to and with the token that ends a turn: Qwen3's empty reasoning before a last answer is in it. Another turn's span is
its content, with the token that ends the turn. Left out: what a template does not write at all (omissions.py).
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.rendering.dialogue import (
    CONTENT,
    REASONING,
    Dialogue,
    make_dialogue,
    nonce_for,
    shielded,
    text_parts,
    with_numbered_ids,
    with_parts,
)
from qlora_trainer.data.rendering.encoding import Span
from qlora_trainer.data.rendering.markers import Markers, Place
from qlora_trainer.data.rendering.omissions import (
    check_nothing_left_out,
    check_reasoning,
    check_tools,
    turns_without_reasoning,
)
from qlora_trainer.data.rendering.templates import Blocks, ChatTemplate
from qlora_trainer.data.types import Conversation

LAST_TURN_ONLY = (
    "the chat template renders earlier turns otherwise than they are written: only the last turn is trained"
)
END_ADDED = "the chat template ends no turn with a control token: the end-of-text token was added after the last answer"
REASONING_LEFT_OUT = "the chat template leaves out the reasoning of earlier turns: those turns are not trained"
IDS_NUMBERED = "the chat template asks for ids of tool calls of nine characters: calls were numbered"
NO_BLOCK = "the chat template marks no text as generated in some of the turns to train: those turns are not trained"

PROMPT_DIFFERS = (
    "the chat template's generation prompt adds text, such as an opened reasoning block, that the last answer lacks: "
    "training and generation use different prompts"
)

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
        chosen = set(targets)
        parts = text_parts(dialogue)
        places = self.markers.places(dialogue, text, parts)
        if places is None:
            check_nothing_left_out(dialogue, text, where)
            if not template.knows_reasoning:
                check_reasoning(
                    template, {t for t, part in parts if part == REASONING and (t in chosen) != others}, (), where
                )
            parts = {part: value for part, value in parts.items() if part[0] in chosen}
            places = self.markers.places(dialogue, text, parts)
            if places is not None and len({place.part for place in places}) < len(parts):
                places = None
        else:
            unreasoned = turns_without_reasoning(dialogue, parts, [place.part for place in places], where)
            if unreasoned := {turn for turn in unreasoned if (turn in chosen) != others}:
                check_reasoning(template, unreasoned, wanted, where)
                if not others:
                    chosen -= unreasoned
                    warnings.append(REASONING_LEFT_OUT)
        spans = None if places is None else self._spans(dialogue, text, places, chosen)
        if spans and not others and self._prompt_goes_on(text, max(spans), dialogue, spans):
            warnings.append(PROMPT_DIFFERS)
        if spans is not None and blocks:
            spans = self._agreed(dialogue, text, spans, blocks, set(wanted), warnings)
        spans = spans if spans is not None else self._spans_of_blocks(dialogue, text, blocks, chosen)
        if spans is None:
            text, spans = self._last_turn_alone(dialogue, chosen, set(wanted), others, where)
            dialogue = dialogue.beginning(_last_answer(dialogue) + 1)
            warnings.append(LAST_TURN_ONLY)
        if template.end_of_turn is None and dialogue.messages[-1]["role"] == "assistant":
            pieces = _cut(text.rstrip(), spans.values(), others)
            pieces.append(Span(template.eos_token, trained=(len(dialogue.messages) - 1 in chosen) != others))
            warnings.append(END_ADDED)
        else:
            pieces = _cut(text, spans.values(), others)
        return Rendering(_unshielded(pieces, shields), tuple(warnings))

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
        # A space at the end would become a token of its own, where in training it belongs to the answer's first word.
        return _unshielded([Span(text.rstrip(" "), trained=False)], shields)

    def _dialogue(self, conversation: Conversation, where: str) -> tuple[Dialogue, dict[str, str]]:
        plain = make_dialogue(conversation, where, self.template.arguments_as_text)
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
        return self.template.text(answered, where).partition(marker)[0]

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
            spans[target] = [(start, end)]
        return spans

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

    def _prompt_goes_on(self, text: str, turn: int, dialogue: Dialogue, spans: Mapping[int, Blocks]) -> bool:
        header = self.template.header
        if dialogue.messages[turn]["role"] != "assistant" or not header:
            return False
        return not text.endswith(header, 0, spans[turn][0][0])

    def _end(self, message: Mapping[str, object], text: str, places: Sequence[Place], index: int) -> int | None:
        """Find the end of the token that ends the turn; where a template has none, of what the turn says."""
        stop = places[index + 1].start if index + 1 < len(places) else len(text)
        for match in self.template.control_pattern.finditer(text, places[index].end, stop):
            if match[0] in self.template.ends:
                return match.end()
        return None if "tool_calls" in message else places[index].end

    def _agreed(
        self,
        dialogue: Dialogue,
        text: str,
        spans: Mapping[int, Blocks],
        blocks: Blocks,
        wanted: set[int],
        warnings: list[str],
    ) -> dict[int, Blocks]:
        """Keep of answers what lies in the template's own blocks too; the token that ends a turn is always trained."""
        agreed = {}
        for target, ((start, end),) in spans.items():
            inside = [(max(a, start), min(b, end)) for a, b in blocks if a < end and b > start]
            if dialogue.messages[target]["role"] != "assistant" or (target in wanted and not inside):
                agreed[target] = [(start, end)]
            elif inside:
                token = self._end_token(text, end)
                begin, last = inside[-1]
                is_joined = not text[last : end - len(token)].strip()
                agreed[target] = [*inside[:-1], (begin, end)] if is_joined else [*inside, (end - len(token), end)]
            elif NO_BLOCK not in warnings:
                warnings.append(NO_BLOCK)
        return agreed

    def _end_token(self, text: str, end: int) -> str:
        return next((token for token in self.template.ends if text.endswith(token, 0, end)), "")

    def _spans_of_blocks(
        self, dialogue: Dialogue, text: str, blocks: Blocks, targets: Collection[int]
    ) -> dict[int, Blocks] | None:
        """Take the template's own blocks, one for each answer, with the tokens that end turns; None if they misfit."""
        answers = [index for index, message in enumerate(dialogue.messages) if message["role"] == "assistant"]
        if len(blocks) != len(answers) or not set(targets) <= set(answers):
            return None
        spans = {}
        for answer, (start, end) in zip(answers, blocks, strict=True):
            end = start + len(text[start:end].rstrip())
            start += len(self.template.header) if text.startswith(self.template.header, start) else 0
            after = self.template.control_pattern.search(text, end)
            if after and after[0] in self.template.ends and not text[end : after.start()].strip():
                end = after.end()
            if answer in targets:
                spans[answer] = [(start, end)]
        return spans

    def _last_turn_alone(
        self, dialogue: Dialogue, targets: Collection[int], wanted: set[int], others: bool, where: str
    ) -> tuple[str, dict[int, Blocks]]:
        """Render up to the last answer, and find that answer's span."""
        last = _last_answer(dialogue)
        if others or wanted - {last}:
            says = "excludes turns from training" if others else "names turns to train"
            raise DataError(
                f"{where}: the row {says}, and this model's chat template hides where they are. Set data.train_on to "
                "assistant or last, and leave the choice out of the row."
            )
        prompt = self.template.text(dialogue.beginning(last), where, generation=True).rstrip(" ") if last else ""
        text = self.template.text(dialogue.beginning(last + 1), where)
        answer = text.removeprefix(prompt)
        said = [value.strip()[-32:] for part, value in text_parts(dialogue).items() if part[0] == last]
        if not text.startswith(prompt) or not all(words in answer for words in said):
            raise DataError(
                f"{where}: the model's chat template hides where the last answer is, so it cannot be trained apart "
                "from the prompt. Set data.train_on to all, or use a model with another template."
            )
        tokens = [match for match in self.template.control_pattern.finditer(answer) if match[0] in self.template.ends]
        length = tokens[-1].end() if tokens else len(answer.rstrip())
        return text, {last: [(len(prompt), len(prompt) + length)]} if last in targets else {}


def _last_answer(dialogue: Dialogue) -> int:
    return max((index for index, message in enumerate(dialogue.messages) if message["role"] == "assistant"), default=0)


def _cut(text: str, spans: Iterable[Blocks], others: bool) -> list[Span]:
    pieces = []
    position = 0
    for start, end in (block for blocks in spans for block in blocks):
        pieces += [Span(text[position:start], trained=others), Span(text[start:end], trained=not others)]
        position = end
    return [*pieces, Span(text[position:], trained=others)]


def _unshielded(pieces: Sequence[Span], shields: Mapping[str, str]) -> list[Span]:
    if not shields:
        return [piece for piece in pieces if piece.text]
    pattern = re.compile("(" + "|".join(map(re.escape, shields)) + ")")
    return [
        Span(shields.get(part, part), piece.trained, ordinary=part in shields)
        for piece in pieces
        for part in pattern.split(piece.text)
        if part
    ]
