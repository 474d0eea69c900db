"""Promises of generation: greedy is greedy, batches change nothing, and the model is left as it was."""

import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from qlora_trainer.common.cache import user_cache
from qlora_trainer.config.schema import ModelConfig
from qlora_trainer.data.types import PromptTokens
from qlora_trainer.model.load import load_base_model
from qlora_trainer.model.tokenizer import load_tokenizer
from qlora_trainer.training import generation
from qlora_trainer.training.evaluation import Answer, exact_match, perplexity
from qlora_trainer.training.generation import generate_answers, stream_answer
from qlora_trainer.weights.model_directory import ModelDirectory

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 21], [30, 31, 32, 33]]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return load_base_model(ModelDirectory.open(tiny_llama), ModelConfig(name=str(tiny_llama)), user_cache()).model


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(ModelDirectory.open(tiny_llama))


def answers(
    model: Any, tokenizer: Any, prompts: list[list[int]] = PROMPTS, stop: list[int] | None = None, **options: Any
) -> list[str]:
    stop = [tokenizer.eos_token_id] if stop is None else stop
    tokens = [PromptTokens(ids, stop) for ids in prompts]
    return generate_answers(model, tokenizer, tokens, **{"max_new_tokens": 12, **options})


def streamed(model: Any, tokenizer: Any, prompt: list[int]) -> str:
    tokens = PromptTokens(prompt, [tokenizer.eos_token_id])
    return "".join(stream_answer(model, tokenizer, tokens, max_new_tokens=12))


def test_each_step_takes_the_most_likely_token(model: Any, tokenizer: Any) -> None:
    ids = list(PROMPTS[0])
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    expected = tokenizer.decode(ids[len(PROMPTS[0]) :], skip_special_tokens=True)
    assert answers(model, tokenizer, [PROMPTS[0]]) == [expected]


def test_answers_do_not_depend_on_their_batch(model: Any, tokenizer: Any) -> None:
    alone = [answers(model, tokenizer, [prompt])[0] for prompt in PROMPTS]
    assert answers(model, tokenizer) == alone
    assert answers(model, tokenizer, batch_size=2) == alone


def test_long_prompts_are_answered_one_at_a_time_and_as_in_a_batch(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []

    def note(module: Any, arguments: tuple[torch.Tensor]) -> None:
        if arguments[0].shape[1] > 1:  # the prompts, not the tokens after them
            shapes.append(tuple(arguments[0].shape))

    expected = answers(model, tokenizer)
    hook = model.get_input_embeddings().register_forward_pre_hook(note)
    try:
        for limit, batches in (
            (3 * 7 * 7, [(3, 7)]),
            (3 * 7 * 7 - 1, [(2, 4), (1, 7)]),
            (1, [(1, 2), (1, 4), (1, 7)]),
        ):
            shapes.clear()
            monkeypatch.setattr(generation, "MASK_BYTES", limit)
            assert answers(model, tokenizer) == expected
            assert shapes == batches
    finally:
        hook.remove()


@pytest.mark.parametrize(("width", "rows"), [(512, 16), (2048, 16), (4096, 4), (5000, 2), (6000, 1), (30_000, 1)])
def test_a_batch_has_a_mask_of_64_mib_at_most(width: int, rows: int) -> None:
    """A byte for each pair of tokens of each prompt; a prompt alone has none, however long."""
    assert generation._rows_together([width] * 16) == rows
    assert rows == 1 or rows * width * width <= 64 * 1024 * 1024


def test_a_prompt_makes_logits_of_its_last_token_alone(model: Any, tokenizer: Any) -> None:
    lengths: list[int] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    try:
        answers(model, tokenizer)
    finally:
        hook.remove()
    assert set(lengths) == {1}


def test_streaming_gives_the_same_answer(model: Any, tokenizer: Any) -> None:
    assert streamed(model, tokenizer, PROMPTS[2]) == answers(model, tokenizer, [PROMPTS[2]])[0]


def test_settings_that_a_model_ships_do_not_change_greedy_answers(model: Any, tokenizer: Any) -> None:
    expected = answers(model, tokenizer)
    own = model.generation_config
    hostile = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1, num_beams=3, do_sample=True, top_k=3)
    model.generation_config = hostile
    try:
        assert answers(model, tokenizer) == expected
        assert streamed(model, tokenizer, PROMPTS[0]) == expected[0]
        assert model.generation_config is hostile
    finally:
        model.generation_config = own


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored(model: Any, tokenizer: Any, training: bool) -> None:
    model.train(training)
    answers(model, tokenizer)
    assert model.training == training
    streamed(model, tokenizer, PROMPTS[0])
    assert model.training == training
    model.eval()


@pytest.mark.parametrize("training", [True, False])
def test_a_stream_that_is_left_early_ends_and_restores_the_mode(model: Any, tokenizer: Any, training: bool) -> None:
    modes: list[bool] = []
    before = threading.active_count()
    model.train(training)
    hook = model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    try:
        pieces = stream_answer(model, tokenizer, PromptTokens(PROMPTS[0], [tokenizer.eos_token_id]), max_new_tokens=500)
        next(pieces)
        assert not model.training
        pieces.close()
        assert model.training == training
        assert threading.active_count() == before, "nothing generates any more"
    finally:
        hook.remove()
        model.eval()
    assert 0 < len(modes) < 500
    assert not any(modes), "no token was generated with dropout"


def test_a_stop_token_ends_an_answer_and_is_not_part_of_it(model: Any, tokenizer: Any) -> None:
    (whole,) = answers(model, tokenizer, [PROMPTS[0]])
    with torch.no_grad():
        first = int(model(torch.tensor([PROMPTS[0]]), use_cache=False).logits[0, -1].argmax())
    (stopped,) = answers(model, tokenizer, [PROMPTS[0]], stop=[first])
    assert len(stopped) < len(whole)


def test_a_failure_while_streaming_is_raised_where_it_is_read(model: Any, tokenizer: Any) -> None:
    with pytest.raises(Exception, match="index out of range"):
        list(stream_answer(model, tokenizer, PromptTokens([10**6], [2]), max_new_tokens=3))


def test_exact_match_leaves_surrounding_blanks_aside() -> None:
    given = [Answer("q", '{"a":1}', ' {"a":1}\n'), Answer("q", "yes", "Yes"), Answer("q", "no", "no")]
    assert exact_match(given) == pytest.approx(2 / 3)
    assert math.isnan(exact_match([]))


def test_perplexity_is_the_exponential_and_overflows_to_infinity() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e6) == math.inf
