"""Define the style sheet of report.html, and its script, which shows a curve's values under the pointer.

Colors have names, so that a reader's light or dark theme changes them in one place; everything drawn is styled by
class. Both are written into the page, which fetches nothing. Left out: what is shown (page.py) and drawn (plot.py).
"""

STYLE = """
:root { --page: #f6f7f9; --card: #fff; --ink: #1b2330; --soft: #5d6776; --line: #dfe3e9; --first: #1f6fc4;
  --second: #c2570c; --good: #16713d; --bad: #a5301f; --warning: #fdf3dc; --warning-edge: #b7791f; --code: #f1f3f6; }
@media (prefers-color-scheme: dark) {
  :root { --page: #11151b; --card: #1a2029; --ink: #e7ebf1; --soft: #9aa5b4; --line: #313a47; --first: #66b0ff;
    --second: #ff9f52; --good: #6fd397; --bad: #ff9583; --warning: #2d2717;
    --warning-edge: #d9a441; --code: #131820; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 20px; letter-spacing: -.015em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 14px; letter-spacing: -.01em; }
h3 { font-size: 14px; margin: 0; } h3 small { color: var(--soft); font-weight: 400; font-size: 13px; margin-left: 4px; }
a { color: var(--first); }
.warning { background: var(--warning); border-left: 4px solid var(--warning-edge); border-radius: 4px; margin: 0 0 12px;
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
.bar { fill: var(--first); opacity: .85; } .count { text-anchor: middle; fill: var(--ink);
  font-variant-numeric: tabular-nums; }
.bars { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 4px 0; font-weight: 400; overflow-wrap: anywhere; }
th { color: var(--soft); padding-right: 16px; width: 42%; }
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
