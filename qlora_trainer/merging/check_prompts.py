"""Choose the eval prompts that plain transformers answers, and write each as a server is given it.

A row that spells a control token is left out: training keeps such text as text, and a template cannot.
"""

import datetime
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_trainer.adapters.tokens.new_tokens import add_new_tokens
from qlora_trainer.common.boundary import is_from_library
from qlora_trainer.data.preparation.prepare import ExampleSet
from qlora_trainer.data.rendering.dialogue import Dialogue, make_dialogue, with_numbered_ids, with_reasoning_apart
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.data.rendering.targets import Prompt, reference_answer
from qlora_trainer.data.types import Conversation, Document, Message
from qlora_trainer.merging.merge_plan import MergePlan
from qlora_trainer.merging.plain_check import render
from qlora_trainer.model.tokenizer import plain_tokenizer
from qlora_trainer.weights.turn_files import CHAT_TEMPLATE

CHECKED_PROMPTS = 4
CHECKED_ROWS = 64  # of which the shortest are taken, whose answers end early
_PREFIX = 80  # characters of a document that make a prompt


@dataclass(frozen=True)
class CheckPrompt:
    """Hold a prompt with its tokens by our evaluate, and as plain transformers is asked it."""

    where: str
    tokens: list[int]
    asked: dict[str, Any]  # of plain_check.py's job
    expected: list[int]  # tokens of the row's own answer, to guess the model's by


def asked_tokenizer(plan: MergePlan) -> Any:
    """Load the base's tokenizer as transformers does, with the new tokens and chat template that the merged model gets.

    Args:
        plan: of the merge, with what training taught about turns.

    Returns:
        The tokenizer; None where transformers has none.
    """
    plain: Any = plain_tokenizer(plan.inputs.base)
    if plain is not None:
        add_new_tokens(plain, plan.inputs.base, plan.inputs.new_tokens)
    if plain is not None and CHAT_TEMPLATE in plan.changed:
        plain.chat_template = plan.changed[CHAT_TEMPLATE]
    return plain


def choose_prompts(renderer: Renderer, plain: Any, examples: ExampleSet) -> tuple[list[CheckPrompt], int]:
    """Choose the shortest of the first rows that have a prompt.

    Args:
        renderer: of the run.
        plain: from `asked_tokenizer`.
        examples: eval rows, or training's where there are none.

    Returns:
        (the prompts, how many rows were left out as they spell a control token).
    """
    found: list[tuple[int, Prompt, str, list[int]]] = []  # (tokens, prompt, where, those of the row's answer)
    left_out = 0
    for index in range(min(len(examples), CHECKED_ROWS)):
        row = examples.row(index)
        reference = reference_answer(row)
        prompt = reference[0] if reference else row.text[:_PREFIX].rstrip() if isinstance(row, Document) else None
        if not prompt:
            continue
        if renderer.encoder.control_pattern.search(_texts(prompt)):
            left_out += 1
            continue
        where, tokens = examples.where(index), examples[index].input_ids
        asked = renderer.render_prompt(prompt, where).input_ids
        expected = tokens[len(asked) :] if tokens[: len(asked)] == asked else []
        found.append((len(asked) + len(expected), prompt, where, expected))
    found.sort(key=lambda each: each[0])
    shortest = found[:CHECKED_PROMPTS]
    made = [(make_prompt(renderer, plain, prompt, where), answer) for _, prompt, where, answer in shortest]
    return [replace(each, expected=answer) for each, answer in made], left_out


def fallback_prompts(
    renderer: Renderer, plain: Any, texts: Sequence[str], has_conversations: bool
) -> list[CheckPrompt]:
    """Make prompts where the run's rows cannot be read.

    Args:
        renderer: of the run.
        plain: from `asked_tokenizer`.
        texts: prompts, or beginnings of texts.
        has_conversations: the run was trained to answer in turns.

    Returns:
        The prompts.
    """
    prompts: list[Prompt] = [Conversation((Message("user", text),)) if has_conversations else text for text in texts]
    return [make_prompt(renderer, plain, prompt, f"sentence {number}") for number, prompt in enumerate(prompts, 1)]


def make_prompt(renderer: Renderer, plain: Any, prompt: Prompt, where: str) -> CheckPrompt:
    """Render a prompt as evaluate does, and write it as plain transformers is asked.

    Templates want the arguments of calls as objects or as text, ids of calls or none, reasoning apart, the date under
    one name or another. The form is taken that gives the tokens of evaluate by the base's own files in transformers.
    Where none does, the base itself is asked otherwise by a server, which no merge can mend: then the tokens are given.

    Args:
        renderer: of the run.
        plain: from `asked_tokenizer`.
        prompt: text or turns.
        where: file and line.

    Returns:
        The prompt.
    """
    tokens = renderer.render_prompt(prompt, where).input_ids
    forms: list[dict[str, Any]]
    if isinstance(prompt, str):
        forms = [{"text": prompt}]
    else:
        forms = [
            {"messages": dialogue.messages, "tools": dialogue.tools, "variables": variables}
            for dialogue, variables in itertools.product(_dialogues(prompt, where), _dates(renderer.template_date))
        ]
    same = next((form for form in forms if plain and _rendered(plain, form) == tokens), {"ids": tokens})
    return CheckPrompt(where, tokens, same, [])


def _rendered(plain: Any, form: dict[str, Any]) -> list[int] | None:
    try:
        return render(plain, form)
    except Exception as error:
        if not is_from_library(error):
            raise
        return None  # the template refuses this form of the prompt


def _dialogues(prompt: Conversation, where: str) -> Iterator[Dialogue]:
    for as_text in (False, True):
        plain = make_dialogue(prompt, where, as_text)
        yield plain
        yield with_reasoning_apart(plain)
        if (numbered := with_numbered_ids(plain)) is not None:
            yield numbered


def _dates(date: datetime.date | None) -> list[dict[str, str]]:
    if date is None:
        return [{}]
    return [{"date": date.isoformat()}, {"date_string": date.strftime("%d %b %Y")}]


def _texts(prompt: Prompt) -> str:
    """Join all that a prompt says."""
    if isinstance(prompt, str):
        return prompt
    parts = [[m.content, m.reasoning or "", *(call.arguments for call in m.tool_calls)] for m in prompt.messages]
    return "\n".join([*itertools.chain.from_iterable(parts), *prompt.tools])
