"""Answer prompts with plain transformers, as whoever loads a merged model does: `python -P plain_check.py JOB RESULT`.

A program of its own, which imports nothing of this package: that is the point of it. The model computes in the dtype
of its config. Prompts are rendered by the directory's own template and answered greedily up to the stop tokens of its
own generation config. What comes out is compared in plain_verification.py.
"""

import contextlib
import datetime
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def check(job: dict[str, Any]) -> dict[str, Any]:
    """Render the job's prompts, read the stop tokens, and where asked for answer the prompts.

    Args:
        job: directory, prompts (each a text, or messages and tools with the variables of the template, or token ids),
            with_weights, device and max_new_tokens.

    Returns:
        prompts (token ids), stops, answers (token ids up to the stop token; None without weights), dtype, and
        not_finite: the first place with a value that is not finite, or None.
    """
    directory = job["directory"]
    given = all("ids" in prompt for prompt in job["prompts"])
    tokenizer = None if given else AutoTokenizer.from_pretrained(directory)
    prompts = [render(tokenizer, prompt) for prompt in job["prompts"]]
    if not job["with_weights"]:
        return {"prompts": prompts, "stops": stops_of(read_generation(directory)), "answers": None, "not_finite": None}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").to(job["device"]).eval()
    stops = stops_of(model.generation_config)
    answers, finite = answer(model, prompts, stops, job["max_new_tokens"])
    place = None if finite else first_not_finite(model, prompts)
    dtype = str(model.dtype).removeprefix("torch.")
    return {"prompts": prompts, "stops": stops, "answers": answers, "not_finite": place, "dtype": dtype}


def render(tokenizer: Any, prompt: dict[str, Any]) -> list[int]:
    """Render one prompt as a server does.

    Args:
        tokenizer: of the merged model.
        prompt: of the job.

    Returns:
        Token ids.
    """
    if "ids" in prompt:
        return list(prompt["ids"])
    if "text" in prompt:
        return list(tokenizer(prompt["text"])["input_ids"])
    variables = dict(prompt["variables"])
    if "date" in variables:
        variables["strftime_now"] = datetime.date.fromisoformat(variables.pop("date")).strftime
    found = tokenizer.apply_chat_template(
        prompt["messages"],
        tools=prompt["tools"],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        **variables,
    )
    return list(found)


def read_generation(directory: str) -> GenerationConfig:
    """Read a model's generation config, as loading its weights would.

    Args:
        directory: of the model.

    Returns:
        The config.
    """
    config = AutoConfig.from_pretrained(directory)
    if (Path(directory) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(directory)
    return GenerationConfig.from_model_config(config)


def stops_of(generation: GenerationConfig) -> list[int]:
    """List the tokens that end an answer.

    Args:
        generation: of the model.

    Returns:
        Token ids, rising.
    """
    found = generation.eos_token_id
    return sorted(set(found if isinstance(found, list) else [] if found is None else [found]))


@torch.no_grad()
def answer(model: Any, prompts: list[list[int]], stops: list[int], max_new_tokens: int) -> tuple[list[list[int]], bool]:
    """Answer prompts greedily, in one batch, without the penalties that a model may ship for sampling.

    Args:
        model: of the directory.
        prompts: token ids.
        stops: tokens that end an answer.
        max_new_tokens: of the longest answer.

    Returns:
        (the answers, each up to and with its stop token; True if all logits were finite).
    """
    width = max(map(len, prompts))
    ids = torch.zeros((len(prompts), width), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    model.generation_config = GenerationConfig()
    generation = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    alone = len(prompts) == 1  # without padding no mask is needed
    found = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=None if alone else mask.to(model.device),
        generation_config=generation,
    )
    finite = all(bool(torch.isfinite(logits).all()) for logits in found.logits)
    return [up_to_stop(row[width:].tolist(), stops) for row in found.sequences], finite


def up_to_stop(tokens: list[int], stops: list[int]) -> list[int]:
    """Cut an answer after its first stop token.

    Args:
        tokens: of the answer, filled up after it.
        stops: tokens that end an answer.

    Returns:
        The answer with its stop token, if it has one.
    """
    end = next((index + 1 for index, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]


@torch.no_grad()
def first_not_finite(model: Any, prompts: list[list[int]]) -> str:
    """Find the first module whose output is not finite.

    Args:
        model: of the directory.
        prompts: token ids.

    Returns:
        Its place in words.
    """
    seen: list[str] = []
    with watched(model, seen):
        for prompt in prompts:
            model(input_ids=torch.tensor([prompt], device=model.device), use_cache=False)
            if seen:
                return f"the output of {seen[0]}"
    return "the logits"


@contextlib.contextmanager
def watched(model: Any, seen: list[str]) -> Iterator[None]:
    """Note the modules whose output is not finite, in the order of computation.

    Args:
        model: of the directory.
        seen: gets their paths.

    Yields:
        Nothing.
    """

    def note(path: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, torch.Tensor) and first.is_floating_point() and not torch.isfinite(first).all():
            seen.append(path)

    hooks = [
        module.register_forward_hook(lambda _, inputs, output, path=path: note(path, output))
        for path, module in model.named_modules()
        if path
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def end_with_standard_input() -> None:
    """End this process when its standard input ends, which the process that asks keeps open as long as it lives."""

    def wait() -> None:
        os.read(0, 1)  # not by sys.stdin, whose lock a process that ends would wait for
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    end_with_standard_input()
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(check(asked)), encoding="utf-8")
