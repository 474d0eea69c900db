"""Make docs/decisions/index.md: every decision with its title and status, from the files."""

import re
from pathlib import Path

INTRODUCTION = """\
# Decisions

<!-- Made by `make docs` from the files next to it. -->

A decision is a choice between real alternatives, with its reason and what was measured. A decision that no longer
holds is not deleted: its status names the one that replaced it. Figures in a decision are those of its day; the ones
that hold today are in [Benchmarks](../benchmarks.md).

| number | decision | status |
|---|---|---|
"""


def decisions_page(folder: Path) -> str:
    """Make the page.

    Args:
        folder: of the decisions; each begins with "# 0001. Title" and has a line "Status: …".

    Returns:
        Markdown.
    """
    rows = []
    for path in sorted(folder.glob("[0-9]*.md")):
        text = path.read_text(encoding="utf-8")
        heading = re.match(r"# (\d{4})\. (.+)\n\nStatus: (.+)\n", text)
        assert heading, f"{path} should begin with '# 0001. Title', an empty line and 'Status: …'"
        number, title, status = heading.groups()
        rows.append(f"| [{number}]({path.name}) | {title} | {status} |")
    return INTRODUCTION + "\n".join(rows) + "\n"
