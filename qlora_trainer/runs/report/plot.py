"""Draw curves and bars as inline SVG: axes with round ticks, and for curves the points that a hover script reads.

No plotting package is used, because a report must open offline, follow the reader's light or dark colors, and need
nothing installed. Colors and fonts come from the page's style sheet by class; nothing here depends on what is plotted.
Left out: logarithmic axes, and line styles other than the three of the style sheet.
"""

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Point = tuple[int, float]  # step, value

HEIGHT = 250
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 66, 26, 12, 38
MAX_DRAWN_POINTS = 600


@dataclass(frozen=True)
class PlotLine:
    """Hold one curve. `style` is its class in the style sheet: first, faint (the unsmoothed curve), or second."""

    name: str
    points: Sequence[tuple[int, float | None]]  # by rising step; None where the value was not finite
    style: str = "first"
    marks: bool = False  # a dot at each point, for curves of few points


def draw_plot(lines: Sequence[PlotLine], *, label: str, from_zero: bool, width: int = 560) -> str:
    """Draw curves over steps.

    Args:
        lines: the curves; their values share an axis.
        label: describes the plot to those who cannot see it.
        from_zero: begin the axis of values at 0 rather than near the lowest value.
        width: of the drawing, in SVG units.

    Returns:
        An svg element, and the points as JSON for the hover script; a sentence if there is no finite value.
    """
    finite = [(step, value) for line in lines for step, value in line.points if value is not None]
    if not finite:
        return '<p class="empty">There is no value to draw.</p>'
    first, last = min(step for step, _ in finite), max(step for step, _ in finite)
    x_ticks = [tick for tick in nice_ticks(first, last, 8, whole=True) if first <= tick <= last] or [first]
    low = 0.0 if from_zero else min(value for _, value in finite)
    y_ticks = nice_ticks(low, max(value for _, value in finite), 5)
    bottom, top = y_ticks[0], y_ticks[-1]

    def x_of(step: float) -> float:
        inner = width - MARGIN_LEFT - MARGIN_RIGHT
        return MARGIN_LEFT + inner * ((step - first) / (last - first) if last > first else 0.5)

    def y_of(value: float) -> float:
        return HEIGHT - MARGIN_BOTTOM - (HEIGHT - MARGIN_TOP - MARGIN_BOTTOM) * (value - bottom) / (top - bottom)

    parts = [_horizontal(tick, y_of(tick), width) for tick in y_ticks]
    parts += [_vertical(tick, x_of(tick)) for tick in x_ticks]
    parts.append(f'<text class="axis" x="{(MARGIN_LEFT + width - MARGIN_RIGHT) / 2}" y="{HEIGHT - 4}">step</text>')
    hover = []
    for line in lines:
        drawn = thin(line.points)
        parts += _curve(drawn, line, x_of, y_of)
        hover.append(
            {
                "name": line.name,
                "style": line.style,
                "points": [
                    [round(x_of(step), 1), round(y_of(value), 1), step, in_words(value)]
                    for step, value in drawn
                    if value is not None
                ],
            }
        )
    parts.append(f'<g class="cursor"><line y1="{MARGIN_TOP}" y2="{HEIGHT - MARGIN_BOTTOM}"/></g>')
    # "</" would end the script element; in JSON a slash may be escaped.
    data = json.dumps(hover, ensure_ascii=False).replace("</", "<\\/")
    return (
        f'<div class="plot"><svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{html.escape(label)}">'
        f'{"".join(parts)}</svg><script type="application/json">{data}</script></div>'
    )


def draw_bars(names: Sequence[str], counts: Sequence[int], *, label: str, axis: str, width: int = 1140) -> str:
    """Draw a bar for each name, its count above it; a count that is not 0 always has a visible bar.

    Args:
        names: written under the bars.
        counts: of each name; not all are 0.
        label: describes the plot to those who cannot see it.
        axis: written under the axis of names.
        width: of the drawing, in SVG units.

    Returns:
        An svg element.
    """
    ticks = nice_ticks(0, max(counts), 4, whole=True)
    bottom, inner = HEIGHT - MARGIN_BOTTOM, HEIGHT - MARGIN_TOP - MARGIN_BOTTOM
    slot = (width - MARGIN_LEFT - MARGIN_RIGHT) / len(names)
    parts = [_horizontal(tick, bottom - inner * tick / ticks[-1], width) for tick in ticks]
    for place, (name, count) in enumerate(zip(names, counts, strict=True)):
        left, height = MARGIN_LEFT + slot * place, max(inner * count / ticks[-1], 1.0 if count else 0.0)
        middle = f"{left + slot / 2:.1f}"
        parts.append(
            f'<rect class="bar" x="{left + slot * 0.08:.1f}" y="{bottom - height:.1f}" width="{slot * 0.84:.1f}" '
            f'height="{height:.1f}"></rect>'
            f'<text class="tick" x="{middle}" y="{bottom + 17}">{html.escape(name)}</text>'
        )
        if count:
            parts.append(f'<text class="count" x="{middle}" y="{bottom - height - 5:.1f}">{count:,}</text>')
    parts.append(
        f'<text class="axis" x="{(MARGIN_LEFT + width - MARGIN_RIGHT) / 2}" y="{HEIGHT - 4}">{html.escape(axis)}</text>'
    )
    return f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{html.escape(label)}">{"".join(parts)}</svg>'


def in_words(value: float) -> str:
    """Format a number with four digits: 1,234, 0.02512, 2.5e-5, 0.

    Args:
        value: finite.

    Returns:
        Its text; from 1000 on all digits before the decimal point, and none after it.
    """
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 1e-3:
        digits, exponent = f"{value:.3e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.4g}"


def nice_ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Choose round numbers at equal distances that enclose a range.

    Args:
        low: the first tick is at or below it.
        high: the last tick is at or above it.
        most: about so many ticks at most.
        whole: choose whole numbers only.

    Returns:
        The ticks, rising.
    """
    if high <= low:  # a single value gets space around it, but no negative side where it has none
        spread = abs(low) * 0.1 or 1.0
        low, high = (0.0 if 0 <= low <= spread else low - spread), high + spread
    raw = (high - low) / most
    magnitude = 10.0 ** math.floor(math.log10(raw))
    size = next(multiple * magnitude for multiple in (1, 2, 2.5, 5, 10) if multiple * magnitude >= raw * (1 - 1e-9))
    if whole:
        size = max(1.0, math.ceil(size))
    begin, end = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [round(index * size, 12) if size > 1e-6 else index * size for index in range(begin, end + 1)]


def thin(points: Sequence[tuple[int, float | None]]) -> list[tuple[int, float | None]]:
    """Thin out a long curve: of each span of steps keep the lowest and the highest point, so that no spike is lost.

    Args:
        points: (step, value) by rising step; None where the value was not finite.

    Returns:
        At most about MAX_DRAWN_POINTS of them; a span without any value keeps a None.
    """
    if len(points) <= MAX_DRAWN_POINTS:
        return list(points)
    span = math.ceil(len(points) / (MAX_DRAWN_POINTS // 2))
    kept: set[int] = {0, len(points) - 1}
    for start in range(0, len(points), span):
        places = range(start, min(start + span, len(points)))
        valued = [(value, place) for place in places if (value := points[place][1]) is not None]
        if valued:
            kept |= {min(valued)[1], max(valued)[1]}
        else:
            kept.add(start)  # a gap stays a gap
    return [points[place] for place in sorted(kept)]


def smooth(points: Sequence[tuple[int, float | None]]) -> list[tuple[int, float | None]]:
    """Smooth a curve by the mean over about a twentieth of the points, centered so that it does not lag behind.

    Args:
        points: (step, value) by rising step; None where the value was not finite.

    Returns:
        Points at the same steps, None where they were None.
    """
    reach = max(2, len(points) // 40)
    sums, counts = [0.0], [0]
    for _, value in points:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    smoothed: list[tuple[int, float | None]] = []
    for place, (step, value) in enumerate(points):
        begin, end = max(0, place - reach), min(len(points), place + reach + 1)
        mean = (sums[end] - sums[begin]) / max(1, counts[end] - counts[begin])
        smoothed.append((step, None if value is None else mean))
    return smoothed


def _horizontal(tick: float, y: float, width: int) -> str:
    return (
        f'<line class="grid" x1="{MARGIN_LEFT}" x2="{width - MARGIN_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick y" x="{MARGIN_LEFT - 8}" y="{y + 4:.1f}">{in_words(tick)}</text>'
    )


def _vertical(tick: float, x: float) -> str:
    base = HEIGHT - MARGIN_BOTTOM
    return (
        f'<line class="notch" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>'
        f'<text class="tick" x="{x:.1f}" y="{base + 17}">{tick:,.0f}</text>'
    )


def _curve(
    points: Sequence[tuple[int, float | None]],
    line: PlotLine,
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
) -> list[str]:
    """Draw a path that starts again after each gap, and a dot for every point that has no neighbor to connect to."""
    spans: list[list[Point]] = [[]]
    for step, value in points:
        if value is not None:
            spans[-1].append((step, value))
        elif spans[-1]:
            spans.append([])
    path = " ".join(
        "M" + " L".join(f"{x_of(step):.1f} {y_of(value):.1f}" for step, value in span)
        for span in spans
        if len(span) > 1
    )
    dots = [point for span in spans for point in span if line.marks or len(span) == 1]
    parts = [f'<path class="curve {line.style}" d="{path}"/>'] if path else []
    parts += [
        f'<circle class="dot {line.style}" cx="{x_of(step):.1f}" cy="{y_of(value):.1f}" r="3"/>' for step, value in dots
    ]
    return parts
