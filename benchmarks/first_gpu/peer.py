"""Measure peft + bitsandbytes, as benchmarks/common.py has it, on the same checkpoint, adapter and lengths."""

import contextlib
import statistics
import time
from typing import Any

import bitsandbytes
import torch

from benchmarks.common import Row, load_peer, peer_step, trainable_parameters
from benchmarks.first_gpu.device import Device
from benchmarks.first_gpu.kit import Kit
from qlora_trainer.common.units import gib
from qlora_trainer.model.device import give_back_memory

STEPS = {2048: 4, 16384: 3}  # by tokens, the first to warm up
VOCABULARY = 700  # ids below that of the tiny tokenizer


def measure_peer(kit: Kit, device: Device) -> None:
    """Measure its load, a row of 2,048 and one of 16,384 tokens a step, and generation."""
    assert kit.adapter.is_dir(), "there is no adapter: the step keep_adapter makes it"
    device.reset_peak()
    started = time.perf_counter()
    model = load_peer(
        kit.model,
        kit.adapter,
        torch.bfloat16,
        checkpointing=True,
        device=device.name,
        compute_dtype=torch.float32 if kit.is_dry else torch.bfloat16,
    )
    device.synchronize()
    facts: dict[str, Any] = {"load_seconds": time.perf_counter() - started, "load_peak": device.peak_reserved}
    kit.verdict(f"peer: loaded in {facts['load_seconds']:.1f} s, at most {gib(facts['load_peak'])} reserved")
    kind = bitsandbytes.optim.PagedAdamW32bit if kit.may_page else bitsandbytes.optim.AdamW32bit
    optimizer = kind(trainable_parameters(model), weight_decay=0.0)
    for tokens, steps in STEPS.items():
        give_back_memory()
        device.reset_peak()
        try:
            seconds = _seconds_of_steps(model, optimizer, kit.tokens(tokens), steps, device)
        except torch.OutOfMemoryError as error:
            kit.verdict(f"peer {kit.tokens(tokens):,} tokens: {str(error)[:200]}")
            continue
        rate = kit.tokens(tokens) / statistics.median(seconds[1:])
        facts |= {f"tokens_per_second_{tokens}": rate, f"peak_reserved_{tokens}": device.peak_reserved}
        kit.verdict(f"peer {kit.tokens(tokens):,} tokens: {rate:,.0f} tokens/s, {gib(device.peak_reserved)} reserved")
    kit.result("peer", **facts)
    new = 4 if kit.is_dry else 64
    rate = new / _seconds_of_generation(model, new, device)
    kit.result("peer-generation", tokens_per_second=rate)
    kit.verdict(f"peer generates {rate:.1f} tokens/s with adapter, one prompt, {new} new")


def _seconds_of_steps(
    model: Any, optimizer: torch.optim.Optimizer, tokens: int, steps: int, device: Device
) -> list[float]:
    ids = [(7 * index + 3) % VOCABULARY for index in range(tokens)]
    seconds = []
    for _ in range(steps):
        device.synchronize()
        started = time.perf_counter()
        peer_step(model, optimizer, [Row(ids, ids)], 1e-4, 1.0, device.name)
        device.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def _seconds_of_generation(model: Any, new: int, device: Device) -> float:
    """Time so many new tokens after a prompt of 32, once warmed up."""
    model.eval()
    model.config.use_cache = True
    prompt = torch.arange(3, 35, device=device.name)[None]
    autocast = torch.autocast("cuda", torch.bfloat16) if device.is_cuda else contextlib.nullcontext()
    with torch.no_grad(), autocast:
        for _ in range(2):
            device.synchronize()
            started = time.perf_counter()
            model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
            device.synchronize()
    return time.perf_counter() - started
