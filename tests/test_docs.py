"""The documentation is what the code is: pages from the code are current, examples are read, and commands run."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from doc_pages import PAGES, ROOT, blocks

from docs_build.__main__ import pages
from qlora_trainer.config.load import make_config
from qlora_trainer.data.formats.detect import resolve_format

DOCS = ROOT / "docs"
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
