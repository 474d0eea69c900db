"""Find out what a run teaches about turns, for the files next to its adapter and of a merged model.

A tokenizer without a chat template has its rows written in a plain format. As a template of the model, that format has
to write the beginning-of-text token itself, where training put one before the text: which spelling gives the tokens of
training is tried.
"""

import json
from collections.abc import Iterator
from typing import Any

from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.data.rendering.templates import PLAIN_TEMPLATE
from qlora_trainer.data.types import Message
from qlora_trainer.weights.turn_files import TaughtTurns

_LOST = "no chat template: with the plain format as one, this tokenizer gives other tokens than in training"
_ASKED = (Message("user", "One?"), Message("assistant", "Two."), Message("user", "Three?"))
_TRIED = (_ASKED, (Message("system", "Be brief."), *_ASKED), (Message("system", " Be brief."), *_ASKED))
# For tokenizers that put a blank before a text which does not begin with one, and not after a token.
_BLANK = '{{- " " if messages[0].role in ["user", "assistant", "tool"] or messages[0].content[:1] != " " -}}\n'


def taught_turns(renderer: Renderer, has_conversations: bool) -> TaughtTurns:
    """Describe what training on rows teaches about turns.

    Args:
        renderer: of the run.
        has_conversations: some of the rows are conversations; else they are plain text, which knows no turns.

    Returns:
        The tokens that end an answer, and the chat templates.
    """
    tokenizer: Any = renderer.tokenizer
    if not has_conversations:
        return TaughtTurns(_texts(tokenizer, renderer.render_prompt("").stop_token_ids))
    stops = _texts(tokenizer, renderer.stop_token_ids)
    own = tokenizer.chat_template
    if own is not None:
        return TaughtTurns(stops, own if isinstance(own, dict) else {"default": own})
    plain = next((text for text in _plain_templates(renderer) if _gives_the_tokens_of_training(renderer, text)), None)
    return (
        TaughtTurns(stops, {"default": plain}, is_new_template=True) if plain else TaughtTurns(stops, not_written=_LOST)
    )


def _texts(tokenizer: Any, ids: list[int]) -> dict[int, str]:
    return {token: str(tokenizer.convert_ids_to_tokens(token)) for token in ids}


def _plain_templates(renderer: Renderer) -> Iterator[str]:
    """Write the plain format with the text's beginning as training has it."""
    tokenizer: Any = renderer.tokenizer
    yield PLAIN_TEMPLATE
    if renderer.encoder.bos_ids:
        begin = "{{- " + json.dumps(tokenizer.decode(renderer.encoder.bos_ids), ensure_ascii=False) + " -}}\n"
        yield begin + PLAIN_TEMPLATE
        yield begin + _BLANK + PLAIN_TEMPLATE


def _gives_the_tokens_of_training(renderer: Renderer, template: str) -> bool:
    tokenizer: Any = renderer.tokenizer
    for turns in _TRIED:
        found = tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.content} for turn in turns],
            chat_template=template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        if found != renderer.render_prompt(turns).input_ids:
            return False
    return True
