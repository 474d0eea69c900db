"""The documentation is what the code is: pages from the code are current, examples are read, and commands run."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from doc_pages import NOT_RUN, PAGES, ROOT, blocks, has_commands, run_page
from rich.console import Console

from docs_build.__main__ import pages
from qlora_trainer.cli.console import TrainingBar
from qlora_trainer.config.load import make_config
from qlora_trainer.data.formats.detect import resolve_format
from qlora_trainer.merging.verify import PlainAgreement, choose_base
from qlora_trainer.planning.step_memory import ACTIVATIONS, BASE

Qlora = Callable[..., tuple[int, str, str]]
DOCS = ROOT / "docs"
FIRST_RUN = DOCS / "start" / "first-run.md"
AFTER_IT = (DOCS / "start" / "use-the-result.md", DOCS / "guides" / "merge.md")  # they use its run
MARKDOWN = [*PAGES, *ROOT.glob("*.md"), ROOT / "configs" / "README.md", ROOT / "kernels" / "README.md"]


def test_pages_from_the_code_are_what_the_code_gives() -> None:
    old = [str(path.relative_to(ROOT)) for path, text in pages().items() if path.read_text("utf-8") != text]
    assert old == [], "run python -m docs_build, which make docs does"


def test_the_menu_has_every_page_and_no_other() -> None:
    def listed(entries: list[Any]) -> list[str]:
        values = [value for entry in entries for value in (entry.values() if isinstance(entry, dict) else [entry])]
        return [page for value in values for page in (listed(value) if isinstance(value, list) else [value])]

    menu = listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(menu) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_the_readme_is_short_and_says_in_its_third_line_what_is_not_proven() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 100
    assert "Not proven on a GPU" in lines[2]


def test_output_in_the_readme_is_in_the_words_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = "".join(block.text for block in blocks(ROOT / "README.md") if block.language == "text")
    shown = " ".join(printed.replace("│", " ").split())
    lines = io.StringIO()
    monkeypatch.setattr("qlora_trainer.cli.console.console", Console(file=lines, width=200))
    record = {"step": 1, "loss": 9.1363, "learning_rate": 5e-4, "tokens_per_second": 27.0}
    record["peak_memory_bytes"] = 1.7 * 2**30
    TrainingBar(36, memory="memory of the process")(record)
    TrainingBar(36, memory="memory of the process")(record | {"step": 36, "eval_loss": 0.0714})
    step, *_, eval_loss = lines.getvalue().splitlines()
    answers = PlainAgreement(4, 13, stopped=4, ties=0, by_arithmetic=0, dtype="float16", left_out=0)
    for words in (step, eval_loss, choose_base(0.0714, 0.1033).reason, str(answers), BASE, ACTIVATIONS):
        assert " ".join(words.split()) in shown


def anchors(page: Path) -> set[str]:
    """List the headings of a page as GitHub and the site name them in a URL."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_within_the_repository_lead_to_a_file_and_a_heading() -> None:
    broken = []
    for page in MARKDOWN:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
            path, _, heading = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if "://" not in link and (not target.exists() or (heading and heading not in anchors(target))):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []


def test_configs_in_the_docs_are_configs() -> None:
    found = [yaml.safe_load(block.text) for page in PAGES for block in blocks(page) if block.language == "yaml"]
    ours = [config for config in found if {"model", "data"} <= config.keys()]
    assert len(ours) > 5
    for config in ours:
        make_config(config)


def test_each_example_of_a_row_is_read_as_the_format_it_is_shown_under() -> None:
    shown = [block for block in blocks(DOCS / "guides" / "data.md") if "format=" in block.info]
    for block in shown:
        (line,) = block.text.splitlines()
        assert resolve_format(json.loads(line), "auto", {}, "the page") == block.info.removeprefix("format=")
    assert {block.info for block in shown} == {
        f"format={name}"
        for name in ("chat", "sharegpt", "alpaca", "dolly", "question_answer", "prompt_completion", "text")
    }


def test_few_blocks_are_not_run() -> None:
    """Only those that install packages, need a login or another program, or depend on the machine."""
    marked = [page.name for page in PAGES for block in blocks(page) if block.comment.startswith(NOT_RUN)]
    assert len(marked) == 8, marked


@pytest.fixture
def workspace(rows: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a reader types in: rows.jsonl is there, and a config of a short run."""
    monkeypatch.chdir(rows.parent)
    config = {
        "model": {"name": str(tiny_llama)},
        "data": {"train": "rows.jsonl", "max_length": 128},
        "training": {"output_dir": "runs/mine", "max_steps": 2, "global_batch_size": 2},
        "evaluation": {"samples": 1, "max_new_tokens": 2},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    return rows.parent


def test_commands_of_the_readme_run_as_typed(
    qlora: Qlora, workspace: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_page(ROOT / "README.md", qlora, tiny_llama, monkeypatch)
    assert (workspace / "merged" / "config.json").is_file()


@pytest.mark.slow
def test_commands_of_getting_started_run_as_typed_and_leave_what_the_reference_lists(
    qlora: Qlora, workspace: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_page(FIRST_RUN, qlora, tiny_llama, monkeypatch)
    run = workspace / "runs" / "mine"
    reference = (DOCS / "reference" / "run-directory.md").read_text()
    for path in run.iterdir():
        assert f"`{path.name}{'/' * path.is_dir()}`" in reference, path.name
    for path in (run / "checkpoints" / "step-000002").iterdir():
        assert f"`{path.name}`" in reference, path.name
    keys = re.findall(r"^\| `(\w+)` \|", (DOCS / "reference" / "metrics.md").read_text(), re.MULTILINE)
    written = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert [key for key in keys if key != "recovered"] == list(written)
    for page in AFTER_IT:
        for old in workspace.glob("merged*"):
            old.rename(old.with_name(f"{page.stem}-before-{old.name}"))
        run_page(page, qlora, tiny_llama, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if has_commands(page) and page not in (ROOT / "README.md", FIRST_RUN, *AFTER_IT)],
    ids=lambda page: page.stem,
)
def test_commands_of_a_page_run_as_typed(
    page: Path, qlora: Qlora, workspace: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_page(page, qlora, tiny_llama, monkeypatch)


@pytest.mark.slow
def test_programs_of_the_python_api_run_as_written(
    qlora: Qlora, workspace: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_page(DOCS / "reference" / "python.md", qlora, tiny_llama, monkeypatch)
    assert (workspace / "merged" / "config.json").is_file()
