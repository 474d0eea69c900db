"""Generate answers greedily, several prompts at a time, with transformers' own cache and decoding loop.

Prompts are padded on the left, where a mask hides the padding; the model attends as it was loaded, not packed. That
mask has a byte for each pair of tokens of each prompt, so long prompts share no batch: one alone is not padded, and
attends without a mask (unless the model has a window). Virtual tokens of a model go before each prompt, as they did
before each row in training.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from qlora_trainer.adapters.several.mixed import has_mixed_rows
from qlora_trainer.adapters.trainable import leading_ids
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.data.types import PromptTokens
from qlora_trainer.model.evaluation_mode import evaluation_mode
from qlora_trainer.model.modules.packed_attention import has_window
from qlora_trainer.model.modules.prefix_cache import positions_before

# Of a batch's mask, at most. Attention makes another of it in the dtype of computation, two to four times as large.
MASK_BYTES = 2**26
TOGETHER = 16  # prompts that are answered in a batch, at most; so many tokens are multiplied without a 16-bit weight


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[PromptTokens],
    *,
    max_new_tokens: int,
    batch_size: int = TOGETHER,
    progress: Progress = silent,
    around_batch: Callable[[list[int]], AbstractContextManager[object]] | None = None,
) -> list[str]:
    """Answer each prompt greedily, as text without the token that ends the answer; the model's mode is restored.

    Prompts of like length share a batch of up to `batch_size`, or of as many as MASK_BYTES allow; of the same length,
    where the model has a prefix and a window.

    Args:
        model: a causal language model of transformers.
        tokenizer: turns what it generates into text.
        prompts: of `Renderer.render_prompt`; what ends an answer to one of them ends each.
        max_new_tokens: length of the longest answer, in tokens.
        batch_size: most prompts that are answered together.
        progress: is called before each batch.
        around_batch: is given the places of a batch's prompts, and makes what the batch is answered inside of, such as
            the adapters of its rows.

    Returns:
        The answers in the order of the prompts.

    Raises:
        AdapterError: rows take adapters of their own outside of `around_batch`.
    """
    if has_mixed_rows(model):
        raise AdapterError(
            "Prompts are sorted by their length before they are answered, and rows() names the adapters of rows in "
            "order. Call AdapterSet.answers() with the adapter of each prompt, outside of rows()."
        )
    leading = leading_ids(model)
    ids = [leading + prompt.input_ids for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    stop_token_ids = sorted({token for prompt in prompts for token in prompt.stop_token_ids})
    # A window counts the padding between a prefix and the tokens of a shorter prompt.
    same_length_only = positions_before(model) > 0 and has_window(model.config.get_text_config())
    answers = [""] * len(prompts)
    start = 0
    with evaluation_mode(model):
        while start < len(order):
            progress("answering", start, len(order))
            lengths = [len(ids[index]) for index in order[start : start + batch_size]]
            if same_length_only:
                lengths = [length for length in lengths if length == lengths[0]]
            chosen = order[start : start + _rows_together(lengths)]
            start += len(chosen)
            input_ids, attention_mask = _left_padded([ids[index] for index in chosen], _device(model))
            around = nullcontext() if around_batch is None else around_batch(chosen)
            with _no_hidden_settings(model), around:
                output = model.generate(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    generation_config=_greedy(stop_token_ids, max_new_tokens),
                )
            texts = tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
            for index, text in zip(chosen, texts, strict=True):
                answers[index] = text
    progress("answering", len(order), len(order))
    return answers


def stream_answer(
    model: Any,
    tokenizer: Any,
    prompt: PromptTokens,
    *,
    max_new_tokens: int,
) -> Generator[str, None, None]:
    """Answer one prompt greedily, a piece of text at a time as it comes; the model's mode is restored.

    What generation raises in its thread is raised here. A generator that is closed early ends with the next token.

    Args:
        model: a causal language model of transformers.
        tokenizer: turns what it generates into text.
        prompt: of `Renderer.render_prompt`.
        max_new_tokens: length of the longest answer, in tokens.

    Yields:
        The pieces of the answer.
    """
    input_ids, attention_mask = _left_padded([leading_ids(model) + prompt.input_ids], _device(model))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failures: SimpleQueue[BaseException] = SimpleQueue()
    stopping = _Stopping()

    def run() -> None:
        try:
            with torch.no_grad(), _no_hidden_settings(model):
                model.generate(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    generation_config=_greedy(prompt.stop_token_ids, max_new_tokens),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([stopping]),
                )
        except BaseException as error:
            failures.put(error)
            streamer.end()

    thread = Thread(target=run, daemon=True)
    with evaluation_mode(model):
        thread.start()
        try:
            yield from streamer
        finally:
            stopping.asked.set()
            thread.join()  # before the model has its mode back, which a forward in the thread would run in
    _raise_first(failures)


class _Stopping(StoppingCriteria):
    """End generation after the token at which nobody reads on."""

    def __init__(self) -> None:
        self.asked = Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked.is_set(), device=input_ids.device)


def _raise_first(failures: "SimpleQueue[BaseException]") -> None:
    if not failures.empty():
        raise failures.get()


def _rows_together(lengths: Sequence[int]) -> int:
    """Count how many of the first prompts, of these lengths in rising order, may share a batch; at least one."""
    fitting = (rows for rows, width in enumerate(lengths, 1) if rows * width**2 <= MASK_BYTES)
    return max(fitting, default=1)


def _greedy(stop_token_ids: Sequence[int], max_new_tokens: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(stop_token_ids),
        pad_token_id=stop_token_ids[0],  # what finished rows are filled with; it never reaches an answer
    )


@contextmanager
def _no_hidden_settings(model: Any) -> Iterator[None]:
    """Put the model's own generation settings aside: transformers fills in from them whatever a call leaves open.

    A repetition penalty that some models ship would punish the repeated quotes of JSON, and greedy decoding would not
    be greedy.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _left_padded(prompts: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.zeros((len(prompts), width), dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1
    return input_ids.to(device), attention_mask.to(device)


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
