"""Summarize a run for people: the table printed when it starts, and its report page.

Left out: how the page looks (page.py), and the metrics themselves (runs/metrics.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_kernels.card import Card
from qlora_trainer.adapters.kinds.table import adapter_kind
from qlora_trainer.common.process_memory import peak_private_bytes
from qlora_trainer.common.units import counted, dtype_name, gib, gibibytes
from qlora_trainer.data.preparation.overview import bin_labels, eval_facts, make_overview, source_facts, train_facts
from qlora_trainer.data.preparation.prepare import Prepared
from qlora_trainer.model.device import kernels_in_words
from qlora_trainer.model.modules.packed_attention import attention_taken
from qlora_trainer.planning.memory_plan import MemoryPlan
from qlora_trainer.planning.other_ways import FULL, Parts, base_parameters, estimate_in_words, full_parts, parts_of
from qlora_trainer.planning.speed.choice import speed_in_words
from qlora_trainer.runs.directory import read_samples
from qlora_trainer.runs.metrics import METRICS_NAME, read_metrics
from qlora_trainer.runs.pace import hours_of
from qlora_trainer.runs.report.page import DataPart, Sample, write_report
from qlora_trainer.runs.run import Run


def summarize(run: Run) -> list[tuple[str, str]]:
    """Describe a run before it begins: base, adapters, kernels, optimizer, rows, steps and planned memory.

    Args:
        run: new or resumed.

    Returns:
        (name, value) pairs.
    """
    trainable = sum(parameter.numel() for group in run.state.groups for parameter in group.parameters.values())
    data, optimizer, settings = run.prepared.report, run.state.optimizer, run.config.adapter
    name = Path(run.config.model.name).name if Path(run.config.model.name).exists() else run.config.model.name
    card = Card.of(run.base.device) if run.base.device.type == "cuda" else None
    pages = (
        f"{gibibytes(optimizer.paged_bytes)} of it paged"
        if run.base.device.type == "cuda"
        else "not paged: nothing pages on a CPU"
    )
    return [
        ("base", f"{name}, {run.base.quantized_fraction:.0%} of its linear weights in NF4"),
        ("compute", f"{dtype_name(run.base.compute_dtype)} on {run.base.device}"),
        (
            "adapters",
            f"{adapter_kind(settings).in_words(settings)} on {counted(len(run.adapted), 'layer')}, "
            f"{trainable:,} numbers in {settings.dtype}",
        ),
        ("attention", attention_taken(run.base.model, card, run.base.compute_dtype, run.state.loader.packing)),
        ("kernels", kernels_in_words(run.base.device.type)),
        ("activation checkpointing", f"{run.state.policy}; memory-efficient: {run.state.patches}"),
        ("optimizer", f"{run.config.optimizer.name}, state {gibibytes(optimizer.state_bytes)}, {pages}"),
        (
            "training rows",
            f"{data.train.examples:,}, {counted(data.train.tokens, 'token')}, {data.train.trained_tokens:,} trained",
        ),
        *([("rows of an epoch", _rows_by_source(run.prepared))] if run.prepared.mixture else []),
        ("eval rows", f"{data.eval.examples:,}, {counted(data.eval.tokens, 'token')}"),
        ("steps", f"{run.state.total_steps:,}, each of up to {counted(run.config.training.global_batch_size, 'row')}"),
        *([("planned memory", _planned(run.plan, run.base.device.type))] if run.plan else []),
        *_speed(run),
    ]


def _speed(run: Run) -> list[tuple[str, str]]:
    """Describe how fast the run is, what was chosen for that, and how long it takes."""
    hours = hours_of(run)
    duration = [("duration", str(hours))] if hours else []
    if run.plan and run.plan.speed:
        return [*speed_in_words(run.plan.speed), *duration]
    limit = f"of up to {counted(run.state.loader.micro_batch_tokens, 'token')}"
    is_auto = run.config.training.micro_batch_tokens == "auto"
    why = "" if run.plan else ", as a base this small is not planned"
    note = [] if run.pace.rates.is_known else [("note", run.pace.rates.note)]
    return [("micro-batches", f"{limit}: one longest row{why}" if is_auto else limit), *duration, *note]


def next_to_full(run: Run) -> dict[str, Parts]:
    """Set what a run keeps in memory next to what full fine-tuning of its base would.

    Args:
        run: new or resumed. Activations and all else are in it where the run has a plan.

    Returns:
        Bytes by way and part.
    """
    if run.plan:
        return {"this run": parts_of(run.plan.components), FULL: run.plan.elsewhere[FULL]}
    ours = {
        "weights": run.base.bytes + sum(group.data.nbytes for group in run.state.groups),
        "gradients": sum(group.grad.nbytes for group in run.state.groups),
        "adam_states": run.state.optimizer.state_bytes,
    }
    return {"this run": ours, FULL: full_parts(base_parameters(run.base.model))}


def _planned(plan: MemoryPlan, device_type: str) -> str:
    what = (
        f"{gib(plan.total)} of GPU memory: {gib(plan.allocated)} in tensors, the rest reserved by torch and CUDA"
        if device_type == "cuda"
        else f"{gib(plan.total)} of host memory for model and training step, without the program itself"
    )
    return f"{what}; the most is needed in {plan.operation}"


def write_run_report(run: Run, measured: Sequence[tuple[str, str]] = (), title: str | None = None) -> Path:
    """Write report.html of the run in its present state.

    Args:
        run: trained, or stopped.
        measured: (name, value) pairs shown before all others.
        title: of the page; None for the name of the run directory.

    Returns:
        The file's path.
    """
    metrics = read_metrics(run.directory / METRICS_NAME)
    losses = [record["eval_loss"] for record in metrics if record.get("eval_loss") is not None]
    is_finished = run.state.step == run.state.total_steps
    unfinished = [] if is_finished else [("stopped at", f"step {run.state.step:,}")]
    loss = [("eval loss", f"{losses[-1]:.4f} (first {losses[0]:.4f})")] if losses else []
    full = ("full fine-tuning", f"{estimate_in_words(base_parameters(run.base.model))}, before activations")
    return write_report(
        run.directory,
        title=title or run.directory.name,
        config_yaml=(run.directory / "config.yaml").read_text(encoding="utf-8"),
        metrics=metrics,
        summary=[*measured, *loss, *unfinished, *summarize(run), full, *_plan_and_peak(run, metrics)],
        samples=[Sample(**sample) for sample in read_samples(run.directory)],
        warnings=[*run.warnings, *(record["recovered"] for record in metrics if "recovered" in record)],
        data=_data_part(run),
    )


def _data_part(run: Run) -> DataPart:
    """Collect the rows in numbers, as `qlora inspect` shows them."""
    prepared, report = run.prepared, run.prepared.report
    overview = make_overview(
        run.state.loader, prepared.train.lengths, prepared.eval.lengths, run.state.forward.can_pack
    )
    tables = [(source.name, source_facts(source, report.max_length)) for source in report.sources]
    tables += [("training", train_facts(report, overview.epoch)), ("kept for evaluation", eval_facts(report))]
    return DataPart(tables, bin_labels(overview.lengths), overview.lengths.train)


def _plan_and_peak(run: Run, metrics: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Compare the most memory that training took with the plan; empty without a plan or a step."""
    if run.plan is None or not metrics:
        return []
    if run.base.device.type == "cuda":
        peak, planned = max(record["peak_memory_bytes"] for record in metrics), run.plan.allocated
        in_words = f"{gib(peak)} at most, planned {gib(planned)} ({peak / planned - 1:+.1%})"
        return [("GPU memory in tensors", in_words)]
    if run.program_bytes is None or (measured := peak_private_bytes()) is None:
        return []
    planned = run.program_bytes + run.plan.total
    return [
        (
            "memory of the process",
            f"{gib(measured)} at most, not shared with others; planned {gib(planned)} ({measured / planned - 1:+.1%}), "
            f"of it {gib(run.program_bytes)} the program itself",
        )
    ]


def _rows_by_source(prepared: Prepared) -> str:
    parts = [f"{source.epoch:,} of {source.name}" for source in prepared.report.sources if source.epoch]
    return f"{prepared.report.epoch_examples:,}: {', '.join(parts)}"
