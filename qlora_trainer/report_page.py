"""report.html: one page that tells how a run went, to be read offline, kept, or sent to somebody.

Everything is inside the file: style, curves (report_plot.py draws them) and a few lines of script that show values
under the pointer; without script the page reads the same. A content policy forbids it to fetch anything. Whatever
came from a model, a row or a config is escaped. Left out: the numbers themselves, which are in metrics.jsonl beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from qlora_trainer.directories import write_text
from qlora_trainer.report_plot import Line, draw_plot, in_words, smooth

REPORT_NAME = "report.html"
FEW_POINTS = 40


@dataclass(frozen=True)
class Sample:
    """A held-out row answered by the model; an answer is None where it was not asked for."""

    prompt: str
    reference: str | None
    before: str | None
    after: str | None


def write_report(
    run_dir: Path,
    *,
    title: str,
    config_yaml: str,
    metrics: Sequence[dict[str, Any]],
    summary: Sequence[tuple[str, str]],
    samples: Sequence[Sample] = (),
    notices: Sequence[str] = (),
) -> Path:
    """Write run_dir/report.html, under a temporary name first, and return its path.

    `metrics` are the records of metrics.jsonl, `summary` pairs of a label and a value already in words.

    Raises:
        DiskError: the file cannot be written.
    """
    path = run_dir / REPORT_NAME
    write_text(path, render_report(title, config_yaml, metrics, summary, samples, notices))
    return path


def render_report(
    title: str,
    config_yaml: str,
    metrics: Sequence[dict[str, Any]],
    summary: Sequence[tuple[str, str]],
    samples: Sequence[Sample],
    notices: Sequence[str],
) -> str:
    """The page as text."""
    body = [f"<header><h1>{escape(title)}</h1></header>"]
    body += [f'<p class="notice">{escape(notice)}</p>' for notice in notices]
    if summary:
        tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in summary)
        body.append(f'<dl class="summary">{tiles}</dl>')
    body.append(f"<section><h2>Curves</h2>{_curves(metrics)}</section>")
    if samples:
        body.append(f"<section><h2>Answers before and after</h2>{_samples(samples)}</section>")
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
    loss, heldout = _series(metrics, "loss"), _series(metrics, "heldout_loss")
    lines = [Line("loss", loss, marks=len(loss) <= FEW_POINTS)]
    if len(loss) >= 20:
        lines = [Line("loss", loss, "faint"), Line("loss, smoothed", smooth(loss), "first")]
    if heldout:
        lines.append(Line("held-out loss", heldout, "second", marks=len(heldout) <= FEW_POINTS))
    figures = [_figure("Loss", "nats per label token", lines, wide=True)]
    memory = max(_finite(metrics, "peak_memory_bytes"), default=0.0)
    memory_unit, unit_bytes = ("GiB", 2.0**30) if memory >= 2.0**30 else ("MiB", 2.0**20)
    for key, name, note, unit in (
        ("learning_rate", "Learning rate", "", 1.0),
        ("grad_norm", "Gradient norm", "before clipping", 1.0),
        ("tokens_per_second", "Speed", "tokens/s", 1.0),
        ("peak_memory_bytes", "Peak memory", memory_unit, unit_bytes),
    ):
        if points := _series(metrics, key, unit):
            figures.append(
                _figure(name, note, [Line(name.lower(), points, marks=len(points) <= FEW_POINTS)], from_zero=True)
            )
    return (
        f'<div class="figures">{"".join(figures)}</div>'
        '<p class="source">Every number is in <a href="metrics.jsonl">metrics.jsonl</a>, one step a line.</p>'
    )


def _figure(
    name: str,
    note: str,
    lines: Sequence[Line],
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
    missing = f'<p class="gaps">{gaps} value(s) were not finite and are not drawn.</p>' if gaps else ""
    drawing = draw_plot(lines, label=label, from_zero=from_zero, width=1140 if wide else 560)
    return (
        f'<figure class="{"wide" if wide else ""}"><figcaption><h3>{escape(name)} <small>{escape(note)}</small></h3>'
        f'<span class="last">{"last " + last if last else ""}</span></figcaption>{drawing}{legend}{missing}</figure>'
    )


def _series(metrics: Sequence[dict[str, Any]], key: str, unit: float = 1.0) -> list[tuple[int, float | None]]:
    """Step, and value in multiples of `unit`, of the records that have the key; None for null, NaN and infinities."""
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


STYLE = """
:root { --page: #f6f7f9; --card: #fff; --ink: #1b2330; --soft: #5d6776; --line: #dfe3e9; --first: #1f6fc4;
  --second: #c2570c; --good: #16713d; --bad: #a5301f; --notice: #fdf3dc; --notice-edge: #b7791f; --code: #f1f3f6; }
@media (prefers-color-scheme: dark) {
  :root { --page: #11151b; --card: #1a2029; --ink: #e7ebf1; --soft: #9aa5b4; --line: #313a47; --first: #66b0ff;
    --second: #ff9f52; --good: #6fd397; --bad: #ff9583; --notice: #2d2717; --notice-edge: #d9a441; --code: #131820; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 20px; letter-spacing: -.015em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 14px; letter-spacing: -.01em; }
h3 { font-size: 14px; margin: 0; } h3 small { color: var(--soft); font-weight: 400; font-size: 13px; margin-left: 4px; }
a { color: var(--first); }
.notice { background: var(--notice); border-left: 4px solid var(--notice-edge); border-radius: 4px; margin: 0 0 12px;
  padding: 10px 14px; }
.summary { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); margin: 0; overflow: hidden;
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.summary div { padding: 13px 16px; box-shadow: 1px 1px 0 var(--line); }
.summary dt { color: var(--soft); font-size: 13px; }
.summary dd { margin: 2px 0 0; font-size: 18px; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 16px; }
figure, .sample, details { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 4px 16px; margin-bottom: 8px; }
.last { color: var(--soft); font-size: 13px; font-variant-numeric: tabular-nums; }
.plot { position: relative; overflow-x: auto; }
svg { display: block; width: 100%; min-width: 400px; height: auto; font-size: 12px; }
figure.wide svg { min-width: 640px; }
.grid { stroke: var(--line); } .notch { stroke: var(--soft); }
.tick, .axis { fill: var(--soft); text-anchor: middle; font-variant-numeric: tabular-nums; }
.tick.y { text-anchor: end; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.curve.first { stroke: var(--first); } .curve.second { stroke: var(--second); stroke-dasharray: 7 4; }
.curve.faint { stroke: var(--first); stroke-width: 1.2; opacity: .38; }
.dot { stroke: var(--card); stroke-width: 1.5; } .dot.first { fill: var(--first); } .dot.second { fill: var(--second); }
.dot.faint { fill: var(--first); opacity: .5; }
.cursor { visibility: hidden; } .cursor line { stroke: var(--soft); stroke-dasharray: 3 3; }
.tip { position: absolute; top: 8px; padding: 7px 10px; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card); box-shadow: 0 3px 12px rgb(0 0 0 / .18); font-size: 13px; pointer-events: none;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
.tip b { display: block; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; list-style: none; margin: 8px 0 0; padding: 0; font-size: 13px;
  color: var(--soft); }
.legend li::before { content: ""; display: inline-block; width: 22px; margin-right: 7px; vertical-align: middle;
  border-top: 2px solid var(--first); }
.legend li.second::before { border-top: 2px dashed var(--second); } .legend li.faint::before { opacity: .38; }
.empty, .source, .gaps { color: var(--soft); } .source, .gaps { font-size: 13px; margin: 10px 0 0; }
.sample { margin-top: 14px; padding: 0; overflow: hidden; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px), 1fr)); gap: 1px;
  background: var(--line); border-top: 1px solid var(--line); }
.request, .answers > div { padding: 12px 16px; background: var(--card); min-width: 0; }
.sample h3 { color: var(--soft); font-size: 13px; font-weight: 500; display: flex; justify-content: space-between; }
.right { color: var(--good); } .wrong { color: var(--bad); }
pre { margin: 6px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 320px; overflow: auto;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
details pre { max-height: none; background: var(--code); border-radius: 6px; padding: 12px 14px; }
details summary { cursor: pointer; }
@media print { body { background: none; } figure, .sample { break-inside: avoid; } }
"""

SCRIPT = """
for (const plot of document.querySelectorAll(".plot")) {
  const svg = plot.querySelector("svg"), cursor = svg.querySelector(".cursor");
  const lines = JSON.parse(plot.querySelector("script").textContent);
  const tip = document.createElement("div");
  tip.className = "tip"; tip.hidden = true; plot.append(tip);
  const nearest = (points, x) =>
    points.reduce((best, point) => Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best);
  const hide = () => { tip.hidden = true; cursor.style.visibility = "hidden"; };
  svg.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const filled = lines.filter((line) => line.points.length);
    const main = nearest(filled.flatMap((line) => line.points), at.x);
    tip.replaceChildren();
    const head = document.createElement("b");
    head.textContent = "step " + main[2].toLocaleString("en"); tip.append(head);
    for (const line of filled) {
      const point = nearest(line.points, main[0]);
      const row = document.createElement("div");
      row.textContent = line.name + " " + point[3]
        + (point[2] === main[2] ? "" : " (step " + point[2].toLocaleString("en") + ")");
      tip.append(row);
    }
    const rule = cursor.querySelector("line");
    rule.setAttribute("x1", main[0]); rule.setAttribute("x2", main[0]);
    cursor.style.visibility = "visible"; tip.hidden = false;
    const box = plot.getBoundingClientRect(), x = event.clientX - box.left + plot.scrollLeft;
    tip.style.left = (event.clientX - box.left > box.width / 2 ? x - tip.offsetWidth - 14 : x + 14) + "px";
  });
  svg.addEventListener("pointerleave", hide);
}
"""
