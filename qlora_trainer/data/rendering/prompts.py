"""Compare what is before an answer in a row with the prompt that a server gives of the same turns."""

from collections.abc import Mapping, Sequence

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.rendering.dialogue import Dialogue, Part
from qlora_trainer.data.rendering.markers import Markers, Place
from qlora_trainer.data.rendering.templates import ChatTemplate

PROMPT_DIFFERS = (
    "the chat template writes what is before the last answer in another way when it is given alone, such as by opening "
    "the reasoning: training and generation use different prompts"
)


def is_prompt(
    markers: Markers,
    dialogue: Dialogue,
    text: str,
    parts: Mapping[Part, str],
    places: Sequence[Place] | None,
    end: int,
) -> bool:
    """Return True if a rendering begins, up to `end`, with the prompt that its template makes of the turns before.

    Where the words of the row do not matter, this is tried once for all rows of the same shape.

    Args:
        markers: of the template.
        dialogue: that was rendered.
        text: its rendering.
        parts: text by (turn, part).
        places: of these parts; None where the template defeats markers.
        end: where the last trained answer begins, in characters.

    Returns:
        True if it does, or if the template makes no such prompt.
    """
    template = markers.template

    def is_same(prompt: str, before: str) -> bool:
        return prompt == before if template.header else prompt.rstrip(" ") == before.rstrip(" ")

    place = next((place for place in places or () if place.start >= end), None)
    if place and (found := markers.prompt_and_text(dialogue, parts, place.part)) is not None:
        given, before = found
        return is_same(given, before[: len(before) - (place.start - end)])
    answers = [index for index, message in enumerate(dialogue.messages) if message["role"] == "assistant"]
    turn = place.part[0] if place else max(answers, default=0)
    prompt = prompt_of(template, dialogue, turn)
    return prompt is None or is_same(prompt, text[:end])


def prompt_of(template: ChatTemplate, dialogue: Dialogue, turn: int) -> str | None:
    """Render the prompt of an answer.

    Args:
        template: of the model.
        dialogue: with the answer.
        turn: the answer's.

    Returns:
        The text; None where nothing is before the answer, or the template makes no prompt of it.
    """
    try:
        return template.text(dialogue.beginning(turn), "the prompt", generation=True) if turn else None
    except DataError:
        return None
