"""Read docs/reference/json.md, which lists the keys of what commands print as JSON."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "json.md"


def documented(*headings: str) -> set[str]:
    """Return the keys of the table under a command's heading, or under one of its subheadings."""
    text = PAGE.read_text("utf-8")
    for level, heading in enumerate(headings, start=2):
        text = re.split(rf"^{'#' * level} {re.escape(heading)}\n", text, maxsplit=1, flags=re.MULTILINE)[1]
        text = re.split(rf"^#{{2,{level}}} ", text, maxsplit=1, flags=re.MULTILINE)[0]
    table = re.split(r"^#", text, maxsplit=1, flags=re.MULTILINE)[0]
    cells = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
