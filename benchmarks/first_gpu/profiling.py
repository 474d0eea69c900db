"""Profile a step: how long of it the card is busy, and by which kernels.

If it is far below 90 % at 2,048 tokens, the processor is the bound there, and only longer rows say something of the
kernels. A dry run profiles the processor.
"""

import time
from collections.abc import Iterable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.first_gpu.base_runs import FULL, BaseRuns
from qlora_trainer.training.recovery import take_step

MOST_LISTED = 40


def profile_steps(runs: BaseRuns) -> None:
    """Profile a step of 2,048 and one of 16,384 tokens."""
    for tokens in (2048, 16384):
        _profile_step(runs, tokens)


def _profile_step(runs: BaseRuns, tokens: int) -> None:
    kit, device = runs.kit, runs.device
    run = runs.start(f"profile-{tokens}", tokens, FULL, 6)
    run.state.model.train()
    walls = []
    for _ in range(4):  # the first two warm up
        device.synchronize()
        started = time.perf_counter()
        take_step(run.state)
        device.synchronize()
        walls.append(time.perf_counter() - started)
    wall = min(walls[2:])
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.is_cuda else [])]) as profiler:
        take_step(run.state)
        device.synchronize()
    length = f"{kit.tokens(tokens):,} tokens"
    key = "self_device_time_total" if device.is_cuda else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=70)
    with (kit.out / "profile.txt").open("a") as file:
        file.write(f"\n=== {length}, full, {wall:.3f} s unprofiled\n{table}\n")
    kind = torch.autograd.DeviceType.CUDA if device.is_cuda else torch.autograd.DeviceType.CPU
    shares: dict[str, float] = {}
    intervals = []
    for event in profiler.events():
        if event.device_type == kind and not event.is_user_annotation:  # an annotation spans kernels
            intervals.append((event.time_range.start, event.time_range.end))
            shares[event.name] = shares.get(event.name, 0.0) + getattr(event, key) / 1e6
    busy = covered(intervals) / 1e6
    total = max(sum(shares.values()), 1e-9)
    ranked = sorted(shares.items(), key=lambda item: -item[1])[:MOST_LISTED]
    kit.result(f"profile-{tokens}", wall=wall, busy=busy, seconds_by_name=ranked)
    shares_by_kernel = ", ".join(f"{name[:44]} {seconds / total:.0%}" for name, seconds in ranked[:8])
    kit.verdict(
        f"profile {length}: a step {wall:.3f} s, the {'card' if device.is_cuda else 'processor'} busy "
        f"{busy:.3f} s of one profiled ({busy / wall:.0%}); {shares_by_kernel}"
    )
    if tokens == 2048 and device.is_cuda:
        profiler.export_chrome_trace(str(kit.out / "trace-2048.json.gz"))
    runs.drop(run)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Compute the length that intervals cover together: what two streams do at once counts once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
