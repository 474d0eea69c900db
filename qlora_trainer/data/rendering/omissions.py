"""Find what a template leaves out of a conversation, and refuse it with the turn and the way out.

Templates skip without a word what they were not written for: tools, calls, reasoning, roles, the text next to a call. A
row that says such things would be trained as another one, so it is refused. One omission is on purpose: reasoning of
earlier turns, which some models never see again.
"""

import re
from collections.abc import Collection, Mapping

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.rendering.dialogue import CONTENT, REASONING, Dialogue, Part
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
            "place for reasoning. Write it into the turn's content, as the model should say it, or take it out of the "
            "row."
        )
    if named := set(unreasoned) & set(wanted):
        raise DataError(
            f"{where}: the row wants turn {min(named) + 1} trained, and the model's chat template leaves out the "
            "reasoning of earlier turns. End the row with that turn, or take its reasoning out."
        )


def check_nothing_left_out(dialogue: Dialogue, text: str, where: str) -> None:
    """Look for what each turn says by its longest plain word, where markers do not help.

    Of answers, a template may drop the reasoning on purpose.

    Args:
        dialogue: that was rendered.
        text: its rendering.
        where: file and line, for errors.

    Raises:
        DataError: a turn is left out.
    """
    contents = [message["content"] for message in dialogue.messages if message["role"] != "assistant"]
    for index, message in enumerate(dialogue.messages):
        word = max(re.findall(r"[A-Za-z0-9]+", message["content"]), key=len, default="")
        if message["role"] == "assistant":
            calls = message.get("tool_calls", ())
            if any(call["function"]["name"] not in text for call in calls):
                raise DataError(_left_out_turn(where, index, "assistant with tool calls"))
        elif word and text.count(word) < sum(content.count(word) for content in contents):
            raise DataError(_left_out_turn(where, index, message["role"]))


def _left_out_turn(where: str, index: int, role: str) -> str:
    return (
        f"{where}: the model's chat template leaves out turn {index + 1}, of role {role}: it has no "
        "place for such turns. Write its text into a user turn, or use a model whose template knows the role."
    )
