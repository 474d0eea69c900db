"""Verify a merged directory by plain transformers, in a process that knows nothing of us.

Where the merged model fits in memory with space to spare, it renders eval prompts by its own template, computes in
its own dtype, and answers greedily until one of its own stop tokens. Else only its config, tokenizer and template are
loaded there, and the streamed model answers from the written files, as far as the row's own answer lets it guess ahead.

The answers are not generated a second time here: base + adapter is run once over prompts and answers, and each token
must be its own first choice too, which is what generating it would show. Two tokens that are as good as equal to base +
adapter are a tie. In 16 bits the arithmetic alone may choose otherwise a little beyond a tie; then the written files,
computed in fp32, must give the choice of base + adapter.

Legend: N tokens, V vocabulary.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.common.command_line import please_report
from qlora_trainer.common.errors import DtypeRangeError, MergeError
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.merging.check_prompts import CheckPrompt
from qlora_trainer.merging.logits import first_choices
from qlora_trainer.merging.verify import PlainAgreement, row_logits
from qlora_trainer.model.device import free_memory, give_back_memory
from qlora_trainer.model.forward import LossPath
from qlora_trainer.weights.model_directory import ModelDirectory

TIE_NATS = 0.02  # between two tokens, by base + adapter
# What the arithmetic of a dtype may add to that: bfloat16 rounds eight times as coarsely as float16.
ARITHMETIC_NATS = {"float16": 0.1, "bfloat16": 0.8}
MOST_NEW_TOKENS = 64
STREAMED_PASSES = 4  # each reads all weights
SPARE = 1.25  # times the weights, which the process takes at most for them
PROCESS_BYTES = 2**30


@dataclass(frozen=True)
class PlainCheckInputs:
    """Hold what a merged directory is compared with."""

    prompts: Sequence[CheckPrompt]
    stops: list[int]  # tokens that end an answer, rising
    left_out: int
    max_new_tokens: int
    loss_path: LossPath
    decode: Callable[[list[int]], str]
    load_reference: Callable[[], Any]  # base + adapter in fp32
    load_merged: Callable[[ModelDirectory], Any]  # in fp32


def verify_by_transformers(
    directory: ModelDirectory, inputs: PlainCheckInputs, device: torch.device, progress: Progress = silent
) -> PlainAgreement:
    """Let plain transformers answer prompts with a merged directory, and compare with base + adapter.

    Args:
        directory: of the merged model.
        inputs: what it is held to.
        device: to run the model on, where it has the memory; else the CPU.
        progress: is called as the check begins.

    Returns:
        How they agree.

    Raises:
        MergeError: they do not; the message names the row.
    """
    progress("asking plain transformers", 0, None)
    found = ask(directory, inputs, device)
    for prompt, tokens in zip(inputs.prompts, found["prompts"], strict=True):
        if tokens != prompt.tokens:
            raise MergeError(_other_prompt(prompt, tokens, inputs.decode))
    if found["stops"] != inputs.stops:
        raise MergeError(
            f"The merged model stops at the tokens {found['stops']} in plain transformers, and evaluate at "
            f"{inputs.stops}. Nothing was kept. {please_report()}"
        )
    if found["not_finite"]:
        raise DtypeRangeError(
            f"Plain transformers, computing in {found['dtype']}, gives values that are not finite on eval prompts, "
            f"first in {found['not_finite']}."
        )
    answers = found["answers"]
    if answers is None:
        answers = answer_streamed(inputs.load_merged(directory), inputs)
    return _compare(directory, inputs, answers, found.get("dtype"))


def ask(directory: ModelDirectory, inputs: PlainCheckInputs, device: torch.device) -> dict[str, Any]:
    """Run the check's program: with the weights where a device has the memory, else without them.

    Args:
        directory: of the merged model.
        inputs: the prompts.
        device: to try first.

    Returns:
        What plain_check.py gives.
    """
    give_back_memory()
    needed = int(SPARE * sum(info.nbytes for info in directory.tensors.values())) + PROCESS_BYTES
    devices = [each for each in dict.fromkeys([device, torch.device("cpu")]) if needed <= free_memory(each)]
    job = {
        "directory": str(directory.path),
        "prompts": [prompt.asked for prompt in inputs.prompts],
        "with_weights": bool(devices),
        "device": str(devices[0]) if devices else "cpu",
        "max_new_tokens": min(inputs.max_new_tokens, MOST_NEW_TOKENS),
    }
    found = run_job(job)
    return found if found is not None else run_job(job | {"with_weights": False}) or {}


def run_job(job: dict[str, Any]) -> dict[str, Any] | None:
    """Run plain_check.py in a fresh process, which finds the packages that this one finds, and ends with this one.

    Args:
        job: as it takes.

    Returns:
        What it gives; None where it ran out of memory with the weights.

    Raises:
        MergeError: it failed: plain transformers cannot use the directory.
    """
    with tempfile.TemporaryDirectory() as folder, _ends_with_this_process() as standard_input:
        asked, result = Path(folder, "job.json"), Path(folder, "result.json")
        asked.write_text(json.dumps(job), encoding="utf-8")
        program = str(Path(__file__).with_name("plain_check.py"))
        done = subprocess.run(
            [sys.executable, "-P", program, str(asked), str(result)],
            stdin=standard_input,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            process_group=0,  # a terminal's Ctrl-C goes to this process alone, which then ends that one
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
            return found
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it printed nothing"]
    killed = done.returncode < 0 or any(word in done.stderr for word in ("OutOfMemoryError", "MemoryError"))
    if killed and job["with_weights"]:
        return None
    raise MergeError(f"Plain transformers cannot use the merged model: {lines[-1]} Nothing was kept. {please_report()}")


@contextmanager
def _ends_with_this_process() -> Iterator[int]:
    """Open a pipe in which nothing is written: it ends with the block, or with this process, however that ends."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(writing)
        os.close(reading)


@torch.no_grad()
def answer_streamed(model: Any, inputs: PlainCheckInputs) -> list[list[int]]:
    """Generate greedily with few passes over the weights: guess the row's own answer, and keep what the model chose.

    Args:
        model: the merged one, streamed.
        inputs: the prompts.

    Returns:
        An answer to each, of one token a pass at least, up to and with its stop token.
    """
    limit = min(inputs.max_new_tokens, MOST_NEW_TOKENS)
    answers: list[list[int]] = [[] for _ in inputs.prompts]
    guesses = [prompt.expected[: limit - 1] for prompt in inputs.prompts]
    for _ in range(STREAMED_PASSES):
        rows = [p.tokens + a + g for p, a, g in zip(inputs.prompts, answers, guesses, strict=True)]
        starts = [len(p.tokens) + len(a) for p, a in zip(inputs.prompts, answers, strict=True)]
        choices = _choices(model, rows, starts, inputs.loss_path)[0].split([len(g) + 1 for g in guesses])
        for index, chosen in enumerate(choices):
            guess, answer = guesses[index], answers[index]
            guesses[index] = []
            if answer and (answer[-1] in inputs.stops or len(answer) >= limit):
                continue
            for place, token in enumerate(chosen.tolist()):
                answer.append(token)
                if token in inputs.stops or len(answer) >= limit or guess[place : place + 1] != [token]:
                    break
        if all(answer[-1] in inputs.stops or len(answer) >= limit for answer in answers):
            break
    return answers


def _choices(
    model: Any, rows: list[list[int]], starts: list[int], loss_path: LossPath, tokens: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # (N,), (N,)
    """Return the first choice after each token from the one before each start on, and how far `tokens` are below it."""
    found = row_logits(model, rows, loss_path)
    begins = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).tolist()
    last = 1 if tokens is None else 0  # what comes after the row is chosen too
    places = [
        torch.arange(begin + start - 1, begin + len(row) - 1 + last)
        for begin, start, row in zip(begins, starts, rows, strict=False)
    ]
    return first_choices(found.at(torch.cat(places)), tokens)


def _compare(
    directory: ModelDirectory, inputs: PlainCheckInputs, answers: list[list[int]], dtype: str | None
) -> PlainAgreement:
    """Hold each token of the answers to the first choice of base + adapter."""
    rows = [prompt.tokens + answer for prompt, answer in zip(inputs.prompts, answers, strict=True)]
    starts = [len(prompt.tokens) for prompt in inputs.prompts]
    tokens = torch.tensor([token for answer in answers for token in answer])
    choices, below = _choices(inputs.load_reference(), rows, starts, inputs.loss_path, tokens)
    ties = (below > 0) & (below < TIE_NATS)
    beyond = (below >= TIE_NATS).nonzero()[:, 0].tolist()
    allowed = ARITHMETIC_NATS.get(dtype or "", 0.0)
    if beyond and all(float(below[place]) < allowed for place in beyond):
        by_files = _choices(inputs.load_merged(directory), rows, starts, inputs.loss_path, choices)[1]
        beyond_in_files = [place for place in beyond if float(by_files[place]) >= TIE_NATS]
    else:
        beyond_in_files = beyond
    if beyond_in_files or not torch.isfinite(below).all():
        place = (beyond_in_files or (~torch.isfinite(below)).nonzero()[:, 0].tolist())[0]
        raise MergeError(_other_answer(inputs, answers, choices, below, place))
    return PlainAgreement(
        prompts=len(answers),
        tokens=len(tokens),
        stopped=sum(answer[-1] in inputs.stops for answer in answers),
        ties=int(ties.sum()),
        by_arithmetic=len(beyond),
        dtype=dtype,
        left_out=inputs.left_out,
    )


def _other_answer(
    inputs: PlainCheckInputs, answers: list[list[int]], choices: Tensor, below: Tensor, place: int
) -> str:
    row = 0
    while place >= sum(map(len, answers[: row + 1])):
        row += 1
    number = place - sum(map(len, answers[:row]))
    theirs, ours = answers[row][number], int(choices[place])
    return (
        f"The merged model does not answer as the trained one: asked the prompt of {inputs.prompts[row].where}, token "
        f"{number + 1} of its answer is {inputs.decode([theirs])!r} ({theirs}) in plain transformers, and "
        f"{inputs.decode([ours])!r} ({ours}) by base + adapter, by {float(below[place]):.3g} nats. Nothing was kept. "
        f"{please_report()}"
    )


def _other_prompt(prompt: CheckPrompt, tokens: list[int], decode: Callable[[list[int]], str]) -> str:
    same = 0
    while same < min(len(tokens), len(prompt.tokens)) and tokens[same] == prompt.tokens[same]:
        same += 1
    theirs, ours = (decode(ids[same : same + 8]) for ids in (tokens, prompt.tokens))
    return (
        f"The merged model's template does not give the prompt of {prompt.where} as evaluate asks it: after {same} "
        f"tokens that are the same, plain transformers has {theirs!r}, and evaluate {ours!r}. Nothing was kept. "
        f"{please_report()}"
    )
