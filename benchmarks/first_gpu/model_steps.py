"""Measure one part of a run: generation by either product, and the optimizer's paged state."""

import math
import os
import time

import torch

from benchmarks.first_gpu.base_runs import FULL, BaseRuns
from benchmarks.first_gpu.device import last_prefetched_to
from qlora_trainer.data.types import PromptTokens
from qlora_trainer.training.generation import generate_answers
from qlora_trainer.weights.bitsandbytes_internals import is_paged

PAGE = 4096  # bytes that the host touches at once
PROMPT_TOKENS = 32
KERNELS = "QLORA_KERNELS"


def generate(runs: BaseRuns) -> None:
    """Measure tokens a second with our product over four bits, and by dequantizing first."""
    run = runs.start("generate", 2048, FULL, 2)
    prompt = run.renderer.tokenizer("the quick brown fox " * 8)["input_ids"][:PROMPT_TOKENS]
    new = 4 if runs.kit.is_dry else 64
    rates = {}
    before = os.environ.get(KERNELS)
    try:
        for choice in ("auto", "reference"):
            os.environ[KERNELS] = choice
            for batch in (1, 8):
                rates[f"{choice} x{batch}"] = (
                    batch * new / _fastest(runs, run.base.model, run.renderer.tokenizer, prompt, batch, new)
                )
    finally:
        os.environ.pop(KERNELS)
        if before is not None:
            os.environ[KERNELS] = before
    runs.kit.result("generate", **rates)
    text = ", ".join(f"{name} {rate:,.1f}" for name, rate in rates.items())
    runs.kit.verdict(f"generate, tokens/s with adapter (x batch; {new} new): {text}")
    runs.drop(run)


def _fastest(
    runs: BaseRuns, model: torch.nn.Module, tokenizer: object, prompt: list[int], batch: int, new: int
) -> float:
    """Return the seconds of the faster of two tries."""
    best = math.inf
    for _ in range(2):
        runs.device.synchronize()
        started = time.perf_counter()
        generate_answers(model, tokenizer, [PromptTokens(prompt, [0])] * batch, max_new_tokens=new)
        runs.device.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def paging(runs: BaseRuns) -> None:
    """Measure whether optimizer state really leaves the card, and what an update costs when it has.

    The host touches the pages, and the card is never filled: managed memory beyond a card's own can hang it.
    """
    run = runs.start("paging", 2048, FULL, 2)
    optimizer = run.state.optimizer
    paged = [tensor for state in optimizer.optimizer.state.values() for tensor in state.values() if is_paged(tensor)]
    if not paged:
        runs.kit.verdict(f"paging: {optimizer.paged_bytes} bytes are paged here")
        runs.drop(run)
        return
    import bitsandbytes.functional as F

    def seconds_of_update() -> float:
        runs.device.synchronize()
        started = time.perf_counter()
        optimizer.step(1e-4)
        runs.device.synchronize()
        return time.perf_counter() - started

    optimizer.zero_grad()
    seconds_of_update()
    resident = min(seconds_of_update() for _ in range(3))
    free_before = torch.cuda.mem_get_info()[0]
    started = time.perf_counter()
    for tensor in paged:
        tensor.view(-1)[:: PAGE // tensor.element_size()].sum()
    touching = time.perf_counter() - started
    freed = torch.cuda.mem_get_info()[0] - free_before
    after_host = seconds_of_update()
    started = time.perf_counter()
    for tensor in paged:
        F.prefetch_tensor(tensor)
    runs.device.synchronize()
    prefetching = time.perf_counter() - started
    runs.kit.result(
        "paging",
        paged_bytes=optimizer.paged_bytes,
        update_resident=resident,
        update_after_host_touched=after_host,
        host_touch_seconds=touching,
        prefetch_seconds=prefetching,
        freed_on_card=freed,
        last_prefetch=last_prefetched_to(paged[0]),
    )
    runs.kit.verdict(
        f"paging: {optimizer.paged_bytes / 2**20:.0f} MiB managed; an update {resident * 1e3:.1f} ms resident,"
        f" {after_host * 1e3:.1f} ms after the host had the pages; meanwhile the card's free memory rose by"
        f" {freed / 2**20:.0f} MiB; last prefetched to {last_prefetched_to(paged[0])}"
    )
    runs.drop(run)
