"""What a model is worth on eval rows: its loss on their label tokens, and answers that match exactly.

The loss is taken by the training forward, without dropout and without gradients: what is measured is what was
trained. Exact match is by real generation, since a low loss does not say that an answer comes out right.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.data.batching.packing import make_packs
from qlora_trainer.data.preparation.prepare import ExampleSet
from qlora_trainer.data.rendering.renderer import Renderer, reference_answer
from qlora_trainer.model.forward import ForwardPlan, loss_sum
from qlora_trainer.training.generation import generate_answers


@dataclasses.dataclass(frozen=True)
class Question:
    """A row to be answered: what is asked, as text and as the tokens before an answer, and what is expected."""

    request: str
    prompt_ids: list[int]
    expected: str
    stop_token_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Answer:
    """A eval request, what was expected, and what the model said."""

    request: str
    expected: str
    answer: str

    @property
    def is_exact(self) -> bool:
        return self.answer.strip() == self.expected.strip()


@torch.no_grad()
def eval_loss(
    model: Any, examples: ExampleSet, forward: ForwardPlan, micro_batch_tokens: int, progress: Progress = silent
) -> float:
    """Mean cross entropy over all label tokens of `examples`; the model's training mode is restored."""
    packs = make_packs([examples[i] for i in range(len(examples))], micro_batch_tokens, forward.can_pack)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    try:
        for done, pack in enumerate(packs):
            progress("eval loss", done, len(packs))
            total += loss_sum(model, pack.to(device), forward.loss_path).double().cpu()
    finally:
        model.train(was_training)
    progress("eval loss", len(packs), len(packs))
    return float(total) / max(sum(pack.label_tokens for pack in packs), 1)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def questions(renderer: Renderer, examples: ExampleSet, most: int | None = None) -> list[Question]:
    """The first `most` examples that have an answer to ask for, rendered as in training."""
    found: list[Question] = []
    for index in range(len(examples)):
        if most is not None and len(found) == most:
            break
        if reference := reference_answer(examples.row(index)):
            prompt, expected = reference
            is_text = isinstance(prompt, str)
            ends = [renderer.eos_id] if is_text else renderer.stop_token_ids
            request = prompt if isinstance(prompt, str) else prompt.messages[-1].content
            ids = renderer.render_prompt(prompt, examples.where(index))
            found.append(Question(request, ids, expected, tuple(ends)))
    return found


def answer_questions(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Question],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    progress: Progress = silent,
) -> list[Answer]:
    """Generate an answer to each question, in order."""
    texts = generate_answers(
        model,
        tokenizer,
        [question.prompt_ids for question in asked],
        stop_token_ids=sorted({token for question in asked for token in question.stop_token_ids}),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    return [Answer(q.request, q.expected, text) for q, text in zip(asked, texts, strict=True)]


def exact_match(answers: Sequence[Answer]) -> float:
    """Share of answers that equal what was expected, surrounding blanks aside."""
    return sum(answer.is_exact for answer in answers) / len(answers) if answers else math.nan
