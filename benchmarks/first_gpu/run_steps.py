"""Take steps that are about whole runs: resumed, offloaded, merged; and finish a run to keep."""

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from benchmarks.first_gpu.base_runs import FULL, BaseRuns
from qlora_trainer.runs.run import Run


def resume(runs: BaseRuns) -> None:
    """Compare a run repeated, and one stopped and resumed, with one that was not: by default, and deterministic."""
    for is_deterministic in (False, True):
        training = {**FULL, **({"deterministic": True} if is_deterministic else {})}
        losses: list[list[float]] = []
        rates: list[float] = []
        whole = _trained(runs, runs.start("whole", 2048, training, 4), losses, rates)
        repeated = _trained(runs, runs.start("repeated", 2048, training, 4), losses, rates)
        stopped = runs.start("resumed", 2048, training, 4)
        stopped.train(lambda record: None, stop_after=2)
        runs.drop(stopped)
        resumed = _trained(runs, runs.resume("resumed"), losses, rates)
        apart = {"repeated": _distance(repeated, whole), "resumed": _distance(resumed, whole)}
        how = "deterministic" if is_deterministic else "by default"
        runs.kit.result(f"resume-{how.replace(' ', '-')}", apart=apart, losses=losses, rates=rates)
        outcomes = [f"{name} {'equal' if far == 0 else f'differs by {far:.1e}'}" for name, far in apart.items()]
        runs.kit.verdict(f"resume, {how}: 4 steps {', '.join(outcomes)}; {max(rates):,.0f} tokens/s")


def _trained(runs: BaseRuns, run: Run, losses: list[list[float]], rates: list[float]) -> dict[str, Tensor]:
    """Train a run to its end; returns its adapter, and adds its losses and its fastest step's tokens a second."""
    records: list[dict[str, Any]] = []
    run.train(records.append)
    losses.append([record["loss"] for record in records])
    rates.append(max(record["tokens_per_second"] for record in records))
    runs.drop(run)
    return load_file(run.directory / "adapter" / "adapter_model.safetensors")


def _distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Compute the largest difference of two adapters' numbers; infinite where one of them is not a number."""
    worst = max(float((found[name].float() - tensor.float()).abs().max()) for name, tensor in wanted.items())
    return worst if worst == worst else float("inf")


def offload(runs: BaseRuns) -> None:
    """Check that inputs from pinned memory come back whole, and measure what that costs against recomputing."""
    losses, rates = {}, {}
    for level in ("full", "offload", "tiled"):
        run = runs.start(f"copy-{level}", 16384, {"activation_checkpointing": level}, 2)
        records: list[dict[str, Any]] = []
        run.train(records.append)
        losses[level] = [record["loss"] for record in records]
        rates[level] = records[-1]["tokens_per_second"]
        runs.drop(run)
    runs.kit.result("hostcopy", losses=losses, rates=rates)
    apart = max(
        abs(one - other)
        for level in ("offload", "tiled")
        for one, other in zip(losses[level], losses["full"], strict=True)
    )
    runs.kit.verdict(
        f"offload and tiled against full, {runs.kit.tokens(16384):,} tokens: losses within {apart:.1e}; tokens/s "
        + ", ".join(f"{level} {rate:,.0f}" for level, rate in rates.items())
    )


def keep_adapter(runs: BaseRuns) -> None:
    """Finish a short run, for the merge and the peer."""
    run = runs.start("merged-from", 2048, FULL, 2)
    run.train(lambda record: None)
    runs.drop(run)
    size = sum(path.stat().st_size for path in runs.kit.adapter.iterdir())
    runs.kit.verdict(f"keep_adapter: an adapter of {size / 2**20:.1f} MiB is there for merge and peer")


def merge(runs: BaseRuns) -> None:
    """Merge and verify, in the memory that nothing else holds."""
    from qlora_trainer.merging.merge_run import merge_run

    kit, device = runs.kit, runs.device
    if not kit.adapter.is_dir():
        runs.load()
        keep_adapter(runs)
    runs.unload()
    output = kit.model.parent / "merged"
    shutil.rmtree(output, ignore_errors=True)
    marks: list[tuple[str, float]] = []

    def progress(label: str, done: int, total: int | None) -> None:
        if not marks or marks[-1][0] != label:
            marks.append((label, time.perf_counter()))

    device.reset_peak()
    started = time.perf_counter()
    done = merge_run(kit.runs / "merged-from", output, base="dequantized", progress=progress)
    ended = time.perf_counter()
    ends = [begun for _, begun in marks[1:]] + [ended]
    parts = [(what, round(end - begun, 1)) for (what, begun), end in zip(marks, ends, strict=True)]
    assert done.report.verification is not None, "merge_run verifies"
    difference = done.report.verification.difference
    kit.result(
        "merge",
        seconds=ended - started,
        parts=parts,
        bytes=done.report.bytes,
        kl=difference.kl,
        relative_error=difference.relative_error,
        warnings=done.warnings,
        peak=device.peak_reserved,
    )
    kit.verdict(
        f"merge: {done.report.bytes / 1e9:.1f} GB in {ended - started:.1f} s, KL {difference.kl:.1e}, relative error"
        f" {difference.relative_error:.1e}, same first choice {difference.top1_agreement:.1%}; "
        + ", ".join(f"{what} {seconds} s" for what, seconds in parts)
        + "".join(f"; {' '.join(warning.split())}" for warning in done.warnings)
    )
    shutil.rmtree(output, ignore_errors=True)


def own_cache(work: Path) -> None:
    """Have runs keep prepared rows in this folder, not in the user's."""
    os.environ.setdefault("XDG_CACHE_HOME", str(work / "cache-home"))
