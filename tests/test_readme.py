"""Figures in the README are those of docs/benchmarks.md, and what it shows of a plan is what the plan prints today."""

import re
from collections.abc import Callable

import pytest
import torch
from doc_pages import ROOT, blocks

README = ROOT / "README.md"
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
Table = dict[str, list[str]]  # by the first cell of a row its other cells


def section(text: str, heading: str) -> str:
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def tables(text: str) -> list[Table]:
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    rows = [[[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()] for table in found]
    return [{first: others for first, *others in table} for table in rows]


def tokens(cell: str) -> list[str]:
    """The numbers with a comma for thousands, as all of these are."""
    return re.findall(r"\d+,\d{3}", cell)


def as_in_the_readme(plain: str, with_options: str) -> list[str]:
    """The longest row, and where options make it so, that without them."""
    (shorter,), (longest,) = tokens(plain), tokens(with_options)
    by_options = int(longest.replace(",", "")) > int(shorter.replace(",", ""))
    return [longest, shorter] if by_options else [shorter]


def test_the_longest_rows_in_the_readme_are_those_of_their_card_in_the_benchmarks() -> None:
    (readme,) = tables(section(README.read_text("utf-8"), "What fits"))
    llama, qwen = tables(section(BENCHMARKS, "Longest rows"))
    cards = ["8 GB", "12 GB", "16 GB", "24 GB"]
    assert [card for card in readme if card.endswith("GB")] == cards
    shown = {card: [tokens(cell) for cell in readme[card]] for card in cards}
    of_llama = {card: as_in_the_readme(*llama[card][:2]) for card in cards}
    of_qwen = {card: tokens(qwen["12 GB and more"][0]) for card in cards}
    of_qwen["8 GB"] = as_in_the_readme(qwen["8 GB"][0], qwen["8 GB, memory-efficient options"][0])
    assert shown == {card: [of_llama[card], of_qwen[card]] for card in cards}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the README shows a plan of a machine without a GPU")
def test_the_readme_shows_the_plan_that_its_command_prints(
    qlora: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the benchmarks have its sums, next to those of other ways."""
    monkeypatch.setenv("COLUMNS", "80")
    command = "qlora plan --model benchmarks/models/qwen3-8b --gpu-memory 16GB --no-search"
    in_benchmarks = " ".join(section(BENCHMARKS, "Longest rows").split())
    assert f"(`{command}`)" in in_benchmarks
    assert command.replace("benchmarks/models/qwen3-8b", "Qwen/Qwen3-8B") in README.read_text("utf-8")
    monkeypatch.chdir(ROOT)
    code, out, reported = qlora(*command.split()[1:])
    assert code == 0, reported
    printed = out.splitlines()
    (shown,) = [block.text for block in blocks(README) if "base in NF4" in block.text]
    assert [line for line in shown.splitlines() if line.strip() != "…" and line not in printed] == []
    (totals,) = [re.findall(r"[\d.]+ GiB", line) for line in printed if re.match(r"│ total +│.*│.*│.*│.*│", line)]
    assert len(totals) == 4
    assert [total for total in totals if f" {total}" not in in_benchmarks] == []
