"""Measure a model on eval rows: its loss on their label tokens, and the share of answers that match exactly.

The loss is taken by the training forward, without dropout and without gradients: what is measured is what was trained.
Exact match is by real generation, since a low loss does not say that an answer comes out right.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora_kernels.side_by_side import run_at_once
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.data.batching.packing import Pack, make_packs
from qlora_trainer.data.preparation.prepare import ExampleSet
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.data.rendering.targets import reference_answer
from qlora_trainer.data.types import PromptTokens
from qlora_trainer.model.evaluation_mode import evaluation_mode
from qlora_trainer.model.forward import ForwardPlan, attention_for, loss_sum
from qlora_trainer.training.generation import TOGETHER, generate_answers


@dataclasses.dataclass(frozen=True)
class EvalPrompt:
    """Hold the prompt of a row, as text and as tokens, and the answer that is expected."""

    request: str
    tokens: PromptTokens
    expected: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """Hold the request of an eval row, the answer that was expected, and the one that the model gave."""

    request: str
    expected: str
    answer: str

    @property
    def is_exact(self) -> bool:
        """Return True if the answer equals what was expected, blanks around it aside.

        Returns:
            True if it does.
        """
        return self.answer.strip() == self.expected.strip()


@torch.no_grad()
def eval_loss(
    model: Any,
    examples: ExampleSet,
    forward: ForwardPlan,
    micro_batch_tokens: int,
    progress: Progress = silent,
    workers: int = 1,
) -> float:
    """Compute the mean cross entropy over all label tokens of `examples`; the model's training mode is restored.

    Args:
        model: with its adapters.
        examples: of the eval set.
        forward: how the model is run.
        micro_batch_tokens: the most tokens of one forward pass.
        progress: is called for each pack.
        workers: threads that may run the model at once.

    Returns:
        The loss in nats a token; 0 where no token has a label.
    """
    packs = make_packs([examples[i] for i in range(len(examples))], micro_batch_tokens, forward.can_pack, workers)
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64)
    with evaluation_mode(model):
        for done, pack in enumerate(packs):
            progress("eval loss", done, len(packs))
            with attention_for(model, pack):
                parts = pack.parts or (pack,)
                losses = run_at_once([partial(_loss, model, part.to(device), forward) for part in parts])
            total += sum(loss.double().cpu() for loss in losses)
    progress("eval loss", len(packs), len(packs))
    return float(total) / max(sum(pack.label_tokens for pack in packs), 1)


@torch.no_grad()  # in each thread anew
def _loss(model: Any, pack: Pack, forward: ForwardPlan) -> Tensor:
    return loss_sum(model, pack, forward.loss_path)


def perplexity(loss: float) -> float:
    """Compute exp(loss), infinite where that overflows.

    Args:
        loss: in nats a token.

    Returns:
        The perplexity.
    """
    return math.exp(loss) if loss < 700 else math.inf


def eval_prompts(renderer: Renderer, examples: ExampleSet, most: int | None = None) -> list[EvalPrompt]:
    """Render the prompts of the rows that have an answer to compare with, as in training.

    Args:
        renderer: of the run.
        examples: rows to take prompts from.
        most: stop after so many prompts; None: all rows.

    Returns:
        The prompts in the order of the rows.
    """
    found: list[EvalPrompt] = []
    for index in range(len(examples)):
        if most is not None and len(found) == most:
            break
        if reference := reference_answer(examples.row(index)):
            prompt, expected = reference
            request = prompt if isinstance(prompt, str) else prompt.messages[-1].content
            found.append(EvalPrompt(request, renderer.render_prompt(prompt, examples.where(index)), expected))
    return found


def answer_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[EvalPrompt],
    *,
    max_new_tokens: int,
    batch_size: int = TOGETHER,
    progress: Progress = silent,
) -> list[Answer]:
    """Generate an answer to each prompt, in order.

    Args:
        model: a causal language model of transformers.
        tokenizer: turns what it generates into text.
        prompts: of `eval_prompts`.
        max_new_tokens: length of the longest answer, in tokens.
        batch_size: most prompts that are answered together.
        progress: is called as answers come.

    Returns:
        The answers in the order of the prompts.
    """
    texts = generate_answers(
        model,
        tokenizer,
        [prompt.tokens for prompt in prompts],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    return [Answer(p.request, p.expected, text) for p, text in zip(prompts, texts, strict=True)]


def exact_match(answers: Sequence[Answer]) -> float:
    """Compute the share of answers that equal what was expected, blanks around them aside.

    Args:
        answers: as `answer_prompts` gives them.

    Returns:
        From 0 to 1; NaN without answers.
    """
    return sum(answer.is_exact for answer in answers) / len(answers) if answers else math.nan
