"""Write report.html: one page about a run and its results, which can be read offline, kept, or sent to somebody.

Everything is inside the file: style, curves (plot.py draws them) and a few lines of script that show values under the
pointer; without scripts only those are missing. A content policy forbids it to fetch anything. Text from a model, a row
or a config is escaped. Left out: the numbers themselves, which are in metrics.jsonl next to it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from qlora_trainer.common.atomic import write_text
from qlora_trainer.common.units import counted
from qlora_trainer.runs.report.plot import PlotLine, draw_bars, draw_plot, in_words, smooth
from qlora_trainer.runs.report.style import SCRIPT, STYLE

REPORT_NAME = "report.html"
FEW_POINTS = 40


@dataclass(frozen=True)
class Sample:
    """Hold an eval row and the model's answers before and after training; None where it did not answer."""

    prompt: str
    reference: str | None
    before: str | None
    after: str | None


@dataclass(frozen=True)
class DataPart:
    """Hold the run's rows in numbers: titled tables of (name, value), and training rows counted by bins of tokens."""

    tables: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    bins: Sequence[str]
    counts: Sequence[int]


def write_report(
    run_dir: Path,
    *,
    title: str,
    config_yaml: str,
    metrics: Sequence[dict[str, Any]],
    summary: Sequence[tuple[str, str]],
    samples: Sequence[Sample] = (),
    warnings: Sequence[str] = (),
    data: DataPart | None = None,
) -> Path:
    """Write run_dir/report.html, under a temporary name first; if that fails, DiskError is raised.

    Args:
        run_dir: directory to write to.
        title: of the page.
        config_yaml: the run's resolved config.
        metrics: records of metrics.jsonl.
        summary: (label, value) pairs, values already formatted.
        samples: eval rows with the model's answers.
        warnings: sentences shown at the top.
        data: the run's rows in numbers; None leaves the section out.

    Returns:
        The file's path.
    """
    path = run_dir / REPORT_NAME
    write_text(path, render_report(title, config_yaml, metrics, summary, samples, warnings, data))
    return path


def render_report(
    title: str,
    config_yaml: str,
    metrics: Sequence[dict[str, Any]],
    summary: Sequence[tuple[str, str]],
    samples: Sequence[Sample],
    warnings: Sequence[str],
    data: DataPart | None = None,
) -> str:
    """Render the page.

    Args:
        title: of the page.
        config_yaml: the run's resolved config.
        metrics: records of metrics.jsonl.
        summary: (label, value) pairs, values already formatted.
        samples: eval rows with the model's answers.
        warnings: sentences shown at the top.
        data: the run's rows in numbers; None leaves the section out.

    Returns:
        The page as HTML.
    """
    body = [f"<header><h1>{escape(title)}</h1></header>"]
    body += [f'<p class="warning">{escape(warning)}</p>' for warning in warnings]
    if summary:
        tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in summary)
        body.append(f'<dl class="summary">{tiles}</dl>')
    body.append(f"<section><h2>Curves</h2>{_curves(metrics)}</section>")
    if samples:
        body.append(f"<section><h2>Answers before and after</h2>{_samples(samples)}</section>")
    if data:
        body.append(f"<section><h2>Data</h2>{_data(data)}</section>")
    body.append(
        f"<section><h2>Config</h2><details><summary>config.yaml, as resolved</summary>"
        f"<pre>{escape(config_yaml)}</pre></details></section>"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>{chr(10).join(body)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _curves(metrics: Sequence[dict[str, Any]]) -> str:
    if not metrics:
        return '<p class="empty">No step has been taken yet.</p>'
    loss, eval_set = _series(metrics, "loss"), _series(metrics, "eval_loss")
    lines = [PlotLine("loss", loss, marks=len(loss) <= FEW_POINTS)]
    if len(loss) >= 20:
        lines = [PlotLine("loss", loss, "faint"), PlotLine("loss, smoothed", smooth(loss), "first")]
    if eval_set:
        lines.append(PlotLine("eval loss", eval_set, "second", marks=len(eval_set) <= FEW_POINTS))
    figures = [_figure("Loss", "nats per trained token", lines, wide=True)]
    memory = max(_finite(metrics, "peak_memory_bytes"), default=0.0)
    memory_unit, unit_bytes = ("GiB", 2.0**30) if memory >= 2.0**30 else ("MiB", 2.0**20)
    for key, name, note, unit in (
        ("learning_rate", "Learning rate", "", 1.0),
        ("grad_norm", "Gradient norm", "before clipping", 1.0),
        ("tokens_per_second", "Speed", "tokens/s", 1.0),
        ("peak_memory_bytes", "Peak memory of a GPU's tensors, or of a CPU's process", memory_unit, unit_bytes),
    ):
        if points := _series(metrics, key, unit):
            figures.append(
                _figure(name, note, [PlotLine(name.lower(), points, marks=len(points) <= FEW_POINTS)], from_zero=True)
            )
    return (
        f'<div class="figures">{"".join(figures)}</div>'
        '<p class="source">Every number is in <a href="metrics.jsonl">metrics.jsonl</a>, one step a line.</p>'
    )


def _figure(
    name: str,
    note: str,
    lines: Sequence[PlotLine],
    *,
    from_zero: bool = False,
    wide: bool = False,
) -> str:
    first = lines[0]
    values = [(step, value) for step, value in first.points if value is not None]
    gaps = sum(value is None for line in lines if line.style != "first" or line is first for _, value in line.points)
    last = " · ".join(
        (f"{escape(line.name)} " if len(lines) > 1 else "") + in_words(ends[-1])
        for line in lines
        if (ends := [value for _, value in line.points if value is not None]) and line.style != "faint"
    )
    label = name + (
        f" from {in_words(values[0][1])} at step {values[0][0]} to {in_words(values[-1][1])} at step {values[-1][0]}"
        if values
        else ": no values"
    )
    legend = ""
    if len(lines) > 1:
        keys = "".join(f'<li class="{line.style}">{escape(line.name)}</li>' for line in lines)
        legend = f'<ul class="legend">{keys}</ul>'
    missing = (
        f'<p class="gaps">{counted(gaps, "value is not finite and", "values are not finite and")} not drawn</p>'
        if gaps
        else ""
    )
    drawing = draw_plot(lines, label=label, from_zero=from_zero, width=1140 if wide else 560)
    return (
        f'<figure class="{"wide" if wide else ""}"><figcaption><h3>{escape(name)} <small>{escape(note)}</small></h3>'
        f'<span class="last">{"last " + last if last else ""}</span></figcaption>{drawing}{legend}{missing}</figure>'
    )


def _data(data: DataPart) -> str:
    label = f"Training rows by their length, from {data.bins[0]} to {data.bins[-1]} tokens"
    plot = draw_bars(data.bins, data.counts, label=label, axis="tokens")
    figure = (
        '<figure class="wide"><figcaption><h3>Lengths <small>training rows, by tokens</small></h3></figcaption>'
        f'<div class="bars">{plot}</div></figure>'
    )
    tables = ""
    for title, facts in data.tables:
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts)
        tables += f"<figure><figcaption><h3>{escape(title)}</h3></figcaption><table>{rows}</table></figure>"
    return f'<div class="figures">{figure}{tables}</div>'


def _series(metrics: Sequence[dict[str, Any]], key: str, unit: float = 1.0) -> list[tuple[int, float | None]]:
    """List (step, value / unit) of the records that have the key; the value is None for null, NaN and infinities."""
    points = []
    for record in metrics:
        if key in record:
            value = record[key]
            number = value / unit if isinstance(value, int | float) and math.isfinite(value) else None
            points.append((int(record["step"]), number))
    return points


def _finite(metrics: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [value for _, value in _series(metrics, key) if value is not None]


def _samples(samples: Sequence[Sample]) -> str:
    judged = [sample for sample in samples if sample.reference is not None]
    counts = [
        f"{sum(_matches(sample, answer) for sample, answer in answers)} of {len(answers)} {when}"
        for when, answers in (
            ("before", [(sample, sample.before) for sample in judged if sample.before is not None]),
            ("after", [(sample, sample.after) for sample in judged if sample.after is not None]),
        )
        if answers
    ]
    heading = f"<p>Answers that match the expected one exactly: {', '.join(counts)}.</p>" if counts else ""
    cards = []
    for sample in samples:
        columns = [_answer("Expected", sample.reference)] if sample.reference is not None else []
        for name, answer in (("Before", sample.before), ("After", sample.after)):
            if answer is not None:
                match = None if sample.reference is None else _matches(sample, answer)
                columns.append(_answer(name, answer, match))
        cards.append(
            f'<article class="sample"><div class="request"><h3>Request</h3><pre>{escape(sample.prompt)}</pre></div>'
            f'<div class="answers">{"".join(columns)}</div></article>'
        )
    return heading + "".join(cards)


def _matches(sample: Sample, answer: str) -> bool:
    return sample.reference is not None and answer.strip() == sample.reference.strip()


def _answer(name: str, text: str, match: bool | None = None) -> str:
    mark = "" if match is None else '<b class="right">✓ exact</b>' if match else '<b class="wrong">✗ differs</b>'
    shown = escape(text) if text.strip() else '<span class="empty">(empty)</span>'
    return f"<div><h3>{name} {mark}</h3><pre>{shown}</pre></div>"
