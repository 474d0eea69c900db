"""Find what a template leaves out of a conversation, and refuse it with the turn and the way out.

Templates skip without a word what they were not written for: tools, calls, reasoning, roles, the text next to a call. A
row that says such things would be trained as another one, so it is refused. One omission is on purpose: reasoning of
earlier turns, which some models never see again.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.rendering.dialogue import CONTENT, END_OF_REASONING, REASONING, Dialogue, Part
from qlora_trainer.data.rendering.markers import spellings
from qlora_trainer.data.rendering.templates import ChatTemplate


def check_tools(template: ChatTemplate, dialogue: Dialogue, text: str, where: str) -> None:
    """Refuse a row whose tools are not all in its rendering.

    Args:
        template: that rendered it.
        dialogue: that was rendered.
        text: its rendering.
        where: file and line, for errors.

    Raises:
        DataError: a tool is left out.
    """
    names = [tool["function"]["name"] for tool in dialogue.tools or ()]
    if not names:
        return
    lost = names[0] if not template.knows_tools else next((name for name in names if name not in text), None)
    if lost is not None:
        raise DataError(
            f"{where}: the model's chat template leaves out the tools that the row offers ({lost}). Write them "
            "into the system or first user turn, or use a model whose template knows tools."
        )


def turns_without_reasoning(
    dialogue: Dialogue, parts: Mapping[Part, str], seen: Collection[Part], where: str
) -> set[int]:
    """Find the turns of which the template leaves out the reasoning.

    Args:
        dialogue: that was rendered.
        parts: text by (turn, part).
        seen: the parts that are in the rendering.
        where: file and line, for errors.

    Returns:
        Turns, counted from 0.

    Raises:
        DataError: the template leaves out anything else.
    """
    unreasoned = set()
    for turn, part in sorted(parts.keys() - set(seen)):
        message = dialogue.messages[turn]
        if part == REASONING:
            unreasoned.add(turn)
        elif part != CONTENT:
            raise DataError(
                f"{where}: the model's chat template leaves out the tool calls of turn {turn + 1}. Write them as "
                "text into its content, as the model should say them, or use a model whose template knows tools."
            )
        elif "tool_calls" in message:
            raise DataError(
                f"{where}: the model's chat template leaves out the text next to the tool calls of turn {turn + 1}: "
                "it writes the one or the other. Take the text out of the row, or put it into a turn of its own."
            )
        else:
            raise DataError(_left_out_turn(where, turn, message["role"]))
    return unreasoned


def check_reasoning(template: ChatTemplate, unreasoned: Collection[int], wanted: Collection[int], where: str) -> None:
    """Refuse a row that wants turns trained whose reasoning the template leaves out, unless those are earlier turns.

    Args:
        template: that rendered it.
        unreasoned: turns to train of which the template leaves out the reasoning.
        wanted: turns that the row itself names.
        where: file and line, for errors.

    Raises:
        DataError: the template knows no reasoning, or the row wants an earlier turn's.
    """
    if unreasoned and not template.knows_reasoning:
        raise DataError(
            f"{where}: the model's chat template leaves out the reasoning of turn {min(unreasoned) + 1}: it has no "
            f"place for reasoning. {_place_for_reasoning(template)}"
        )
    if named := set(unreasoned) & set(wanted):
        raise DataError(
            f"{where}: the row wants turn {min(named) + 1} trained, and the model's chat template leaves out the "
            "reasoning of earlier turns. End the row with that turn, or take its reasoning out."
        )


def check_nothing_left_out(template: ChatTemplate, dialogue: Dialogue, text: str, where: str) -> None:
    """Refuse a rendering that lacks words of a turn; for templates that defeat markers.

    Args:
        template: that rendered it.
        dialogue: that was rendered.
        text: its rendering.
        where: file and line, for errors.

    Raises:
        DataError: a turn is left out, or a part of it.
    """
    for index, message in enumerate(dialogue.messages):
        if any(call["function"]["name"] not in text for call in message.get("tool_calls", ())):
            raise DataError(_left_out_turn(where, index, "assistant with tool calls"))
    words = Counter(re.findall(r"\w+", " ".join(message["content"] for message in dialogue.messages).casefold()))
    written = [text.casefold(), _unescaped(text).casefold()]  # some templates write contents as JSON
    lost = {word for word, count in words.items() if all(count > each.count(word) for each in written)}
    if not lost:
        return
    contents = Counter(message["content"] for message in dialogue.messages)
    missing = [content for content in contents if contents[content] > max(map(text.count, spellings(content)))]
    for index, message in enumerate(dialogue.messages):
        own = set(re.findall(r"\w+", message["content"].casefold()))
        if message["content"] not in missing and (missing or not own & lost):
            continue
        word = min(lost & own or lost)
        if END_OF_REASONING in message["content"]:
            raise DataError(
                f"{where}: the model's chat template drops what is before {END_OF_REASONING} in turn {index + 1}, such "
                f"as {word!r}. {_place_for_reasoning(template)}"
            )
        if own - lost:
            raise DataError(
                f"{where}: the model's chat template drops words of turn {index + 1}, such as {word!r}. Take them "
                "out of the row, or use a model with another template."
            )
        raise DataError(_left_out_turn(where, index, message["role"]))


def _unescaped(text: str) -> str:
    """Replace JSON's escapes in a text by what they represent."""
    return re.sub(r"\\(?:u([0-9a-fA-F]{4})|.)", lambda match: chr(int(match[1], 16)) if match[1] else " ", text)


def _place_for_reasoning(template: ChatTemplate) -> str:
    """Advise where reasoning goes that a template leaves out."""
    if template.keeps_inline_reasoning:
        return "Write it into the turn's content, as the model should say it, or take it out of the row."
    return "Take it out of the row, or use a model whose template keeps reasoning."


def _left_out_turn(where: str, index: int, role: str) -> str:
    return (
        f"{where}: the model's chat template leaves out turn {index + 1}, of role {role}: it has no "
        "place for such turns. Write its text into a user turn, or use a model whose template knows the role."
    )
