"""Choose the turns of a conversation that are trained, and the answer that a row is evaluated by.

Left out: where in a rendering a turn is (spans.py).
"""

from collections.abc import Sequence
from typing import Literal

from qlora_trainer.data.rendering.dialogue import says_something
from qlora_trainer.data.types import Conversation, Message, PromptCompletion, Row

TrainOn = Literal["assistant", "last", "all"] | Sequence[str]
Prompt = Conversation | str


def chosen_turns(messages: Sequence[Message], train_on: TrainOn) -> set[int]:
    """Choose the turns that are trained; with "all", those that are not.

    Args:
        messages: of a conversation.
        train_on: "assistant" (all answers), "last" (the last one), a list of roles (all turns of these), or "all"
            (every token). What a message says of itself (Message.learn) comes first; blank turns are never trained.

    Returns:
        Indices of turns.
    """
    if train_on == "all":
        return {index for index, message in enumerate(messages) if message.learn is False}
    roles = ("assistant",) if isinstance(train_on, str) else train_on
    of_roles = [index for index, message in enumerate(messages) if message.role in roles]
    chosen = set(of_roles[-1:] if train_on == "last" else of_roles)
    chosen |= {index for index, message in enumerate(messages) if message.learn is True}
    return {index for index in chosen if messages[index].learn is not False and says_something(messages[index])}


def reference_answer(row: Row) -> tuple[Prompt, str] | None:
    """Take a row's prompt and the text that should answer it, for evaluation by generation.

    Args:
        row: of any kind.

    Returns:
        None where there is no such text: for a document, and where the last answer calls tools.
    """
    match row:
        case PromptCompletion(prompt, completion):
            return prompt, completion
        case Conversation(messages, tools):
            answers = [i for i, m in enumerate(messages) if m.role == "assistant" and m.learn is not False]
            if not answers or answers[-1] == 0 or messages[answers[-1]].tool_calls:
                return None
            return Conversation(messages[: answers[-1]], tools), messages[answers[-1]].content
        case _:
            return None
