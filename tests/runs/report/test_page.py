"""What a run logs survives a kill and a resume, and its page shows it, whatever it holds."""

import html.parser
import json
import math
import re
from pathlib import Path

import pytest

from qlora_trainer.common.atomic import write_text
from qlora_trainer.common.errors import CheckpointError
from qlora_trainer.runs.metrics import MetricsLog, RunLog, TensorBoardLog, read_metrics
from qlora_trainer.runs.report.page import DataPart, Sample, write_report
from qlora_trainer.runs.report.plot import (
    HEIGHT,
    MARGIN_BOTTOM,
    MARGIN_TOP,
    PlotLine,
    draw_plot,
    in_words,
    nice_ticks,
    smooth,
    thin,
)


def test_records_read_back_as_they_were_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    records = [{"step": 1, "loss": 2.5, "tokens": 100}, {"step": 2, "loss": 0.1 + 0.2, "eval_loss": 1e-9}]
    for count, record in enumerate(records, start=1):
        log.append(record)
        assert len(read_metrics(log.path)) == count  # flushed: another reader sees it at once
    assert read_metrics(log.path) == records


def test_numbers_that_json_lacks_are_written_as_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "loss": math.nan, "grad_norm": math.inf, "tokens": 5})
    (line,) = log.path.read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "grad_norm": None, "tokens": 5}


@pytest.mark.parametrize("kept", range(1, 30))
def test_line_cut_short_by_a_kill_is_dropped_and_writing_goes_on(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "loss": 2.0}\n'
    path.write_text(whole + '{"step": 2, "loss": 1.5, "é": 1}'[:kept])
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    log = MetricsLog(path)
    log.append({"step": 2, "loss": 1.0})
    assert [record["loss"] for record in read_metrics(path)] == [2.0, 1.0]


def test_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in range(6):
        log.append({"step": step, "loss": float(step)})
    log.close()
    resumed = RunLog(tmp_path, after_step=3)
    resumed.append({"step": 4, "loss": 40.0})
    resumed.close()
    assert [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [0.0, 1.0, 2.0, 3.0, 40.0]


def test_truncation_in_the_middle_of_a_run_keeps_appending(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.append({"step": step})
    log.truncate_after(1)
    log.append({"step": 2})
    assert [record["step"] for record in read_metrics(log.path)] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_damaged_line_in_between_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2, is not JSON"):
        read_metrics(path)


def test_missing_metrics_are_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_tensorboard_gets_each_finite_number(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = TensorBoardLog(tmp_path)
    log.append({"step": 1, "loss": 2.0, "grad_norm": None, "note": "text"})
    log.append({"step": 2, "loss": math.nan, "eval_loss": 1.5})
    log.close()
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval_loss", "loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0)]


def test_run_without_tensorboard_logs_metrics_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    log = RunLog(tmp_path)
    log.append({"step": 1, "loss": 2.0})
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


class Page(html.parser.HTMLParser):
    """Checks that elements nest, and keeps what is asked about."""

    VOID = ("meta", "line", "circle", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.curves: list[str] = []
        self.elements: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.links += [value for name in ("href", "src") if (value := values.get(name))]
        if tag in ("path", "circle"):
            self.curves.append(" ".join(str(value) for value in values.values()))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data + "\n"


def page_of(tmp_path: Path, metrics: list[dict], samples: list[Sample] | None = None, **other: object) -> Page:
    arguments: dict = {"title": "A run", "config_yaml": "a: 1", "summary": [], "warnings": []} | other
    path = write_report(tmp_path, metrics=metrics, samples=samples or [], **arguments)
    assert path == tmp_path / "report.html"
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(nan|inf|None)\b", text.replace("'none'", ""), flags=0), "a number leaked into the page"
    return Page(text)


def test_page_shows_the_data_with_a_bar_for_every_length_that_has_rows(tmp_path: Path) -> None:
    facts = [("rows read", "12"), ("dropped: <b>odd</b>", "3")]
    data = DataPart([("rows & more.jsonl", facts)], ["0-49", "50-99", "100-149"], [7, 0, 1_234])
    page = page_of(tmp_path, [], data=data)
    for words in ("Data", "rows & more.jsonl", "rows read", "12", "dropped: <b>odd</b>", "50-99", "1,234"):
        assert words in page.text.splitlines(), words
    assert page.elements.count("rect") == 3
    heights = [float(h) for h in re.findall(r'class="bar".*?height="([\d.]+)"', (tmp_path / "report.html").read_text())]
    assert heights[1] == 0.0
    assert heights[0] == pytest.approx(heights[2] * 7 / 1234, abs=0.1)


def full_record(step: int) -> dict:
    return {
        "step": step,
        "loss": 2.0 / (step + 1),
        "learning_rate": 1e-4,
        "grad_norm": 1.0,
        "tokens_per_second": 1500.0,
        "peak_memory_bytes": 2**31,
    }


def test_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = page_of(tmp_path, [full_record(step) for step in range(1, 50)])
    assert page.links == ["metrics.jsonl"]
    assert "http" not in (tmp_path / "report.html").read_text().replace("http-equiv", "")


def test_page_has_every_curve_and_says_the_last_values(tmp_path: Path) -> None:
    metrics = [{"step": 0, "eval_loss": 2.25}] + [full_record(step) for step in range(1, 50)]
    metrics[-1]["eval_loss"] = 0.125
    page = page_of(tmp_path, metrics, summary=[("Speed", "1,500 tokens/s")], warnings=["Two rows were cut."])
    for name in ("Loss", "Learning rate", "Gradient norm", "Speed", "Peak memory", "GiB", "Two rows were cut."):
        assert name in page.text
    assert "eval loss 0.125" in page.text
    assert "\nlast 2\n" in page.text  # of 2**31 bytes, in GiB
    assert page.elements.count("svg") == 5


def test_page_escapes_what_models_rows_and_configs_hold(tmp_path: Path) -> None:
    evil = "</pre></script><script>alert(1)</script><img src=x>&amp;"
    page = page_of(
        tmp_path,
        [full_record(1)],
        [Sample(evil, evil, evil, evil)],
        title=evil,
        config_yaml=evil,
        summary=[(evil, evil)],
        warnings=[evil],
    )
    assert "img" not in page.elements
    assert page.elements.count("script") == 6  # five plots' data, and the page's own
    assert page.text.count("alert(1)</script><img src=x>&amp;") == 10  # the title is there twice


def test_page_marks_exact_answers(tmp_path: Path) -> None:
    samples = [
        Sample("one", "right", "wrong", " right\n"),
        Sample("two", "right", "", "Right"),
        Sample("three", None, "once", "upon"),
    ]
    page = page_of(tmp_path, [full_record(1)], samples)
    assert "Answers that match the expected one exactly: 0 of 2 before, 1 of 2 after." in page.text
    assert (page.text.count("✓ exact"), page.text.count("✗ differs")) == (1, 3)
    assert "(empty)" in page.text


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [full_record(1)],
        [{"step": 0, "eval_loss": 2.0}],
        [{"step": step, "loss": None, "grad_norm": math.nan} for step in (1, 2)],
        [full_record(step) | {"loss": 0.0, "learning_rate": 0.0} for step in (1, 2, 3)],
    ],
    ids=["no step", "one step", "eval only", "nothing finite", "all zero"],
)
def test_page_of_an_empty_or_odd_run_is_whole(tmp_path: Path, metrics: list[dict]) -> None:
    page = page_of(tmp_path, metrics)
    if not metrics:
        assert "No step has been taken yet." in page.text
    if metrics and metrics[0].get("loss", 1.0) is None:
        assert "2 values are not finite" in page.text


def test_gap_in_a_curve_is_not_joined() -> None:
    points = [(1, 1.0), (2, 2.0), (3, None), (4, 4.0), (5, None), (6, 5.0), (7, 6.0)]
    page = Page(draw_plot([PlotLine("loss", points)], label="", from_zero=True))
    path, lone = page.curves
    assert path.count("M") == 2
    assert path.count("L") == 2
    assert lone.startswith("dot")


def test_curve_lies_where_its_axes_say() -> None:
    svg = draw_plot([PlotLine("loss", [(0, 0.0), (10, 10.0)])], label="", from_zero=True)
    ends = re.search(r'd="M([\d.]+) ([\d.]+) L([\d.]+) ([\d.]+)"', svg)
    assert ends is not None
    grid = {
        text: float(y)
        for y, text in re.findall(r'<line class="grid"[^>]* y1="([\d.]+)"[^>]*/><text[^>]*>([^<]*)<', svg)
    }
    notches = dict(re.findall(r'<line class="notch" x1="([\d.]+)"[^>]*/><text[^>]*>([^<]*)<', svg))
    at = {text: float(x) for x, text in notches.items()}
    assert (grid["0"], grid["10"]) == (HEIGHT - MARGIN_BOTTOM, MARGIN_TOP)
    assert [float(number) for number in ends.groups()] == [at["0"], grid["0"], at["10"], grid["10"]]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 10.0, [0, 2, 4, 6, 8, 10]),
        (0.0, 2e-4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4]),
        (0.33, 2.9, [0, 1, 2, 3]),
        (-1.0, 1.0, [-1, -0.5, 0, 0.5, 1]),
        (0.0, 0.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high, 5) == pytest.approx(expected, abs=1e-15)


def test_thinning_keeps_every_spike_and_the_ends() -> None:
    points: list[tuple[int, float | None]] = [(step, 1.0 + step * 1e-6) for step in range(50_000)]
    points[12_345] = (12_345, 99.0)
    points[23_456] = (23_456, -99.0)
    thinned = thin(points)
    assert len(thinned) <= 610
    assert thinned[0] == points[0]
    assert thinned[-1] == points[-1]
    assert {points[12_345], points[23_456]} <= set(thinned)


def test_smoothing_keeps_a_constant_a_slope_and_the_gaps() -> None:
    assert smooth([(step, 3.0) for step in range(100)]) == [(step, 3.0) for step in range(100)]
    slope = smooth([(step, float(step)) for step in range(100)])
    assert slope[50][1] == pytest.approx(50.0)
    assert smooth([(0, 1.0), (1, None), (2, 3.0)]) == [(0, 2.0), (1, None), (2, 2.0)]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1234.5, "1,234"), (0.025123, "0.02512"), (2.5e-5, "2.5e-5"), (2e-4, "2e-4")]
)
def test_numbers_are_written_as_people_write_them(value: float, text: str) -> None:
    assert in_words(value) == text


def test_a_report_is_written_though_a_columns_name_is_no_text(tmp_path):
    write_text(tmp_path / "report.html", "column \ud800 is not used")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "column \\ud800 is not used"
